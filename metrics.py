"""Ranking metrics: arrays in, numbers out. No accelerate, no torch.distributed, no files.

N queries, C candidates in the longest list. One candidate of a query is the relevant one.
"""

import numpy as np
from numpy.typing import ArrayLike
from transformers import EvalPrediction

TOP_K = (1, 4, 5, 10, 20, 50, 100)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The mean over the queries of each metric of `measure_queries`, as for Trainer.

    prediction.predictions: float (N, C), scores. Short rows end in -inf.
    prediction.label_ids: int (N,), the column of the relevant candidate, or -1 where it is missing.
    prediction.inputs: int (N,), rows of the CSV: pandas.read_csv(it).iloc[inputs] are the queries.
    """
    return {name: float(values.mean()) for name, values in measure_queries(prediction).items()}


def measure_queries(prediction: EvalPrediction) -> dict[str, np.ndarray]:
    """The metrics of each query: {name: float64 (N,)}.

    EDIT HERE to add one. Its mean is in the log and in the closing table. metric.csv, which has a
    row for each query, gets a column. A resume does not notice an edited formula.
    """
    ranks = ranks_of_relevant(prediction.predictions, prediction.label_ids)  # (N,)
    # With one relevant candidate, recall is the hit rate: 1 where the rank is at most k.
    recall = {f"Recall@{k}": (ranks <= k).astype(np.float64) for k in TOP_K}
    # 1/rank, 0 beyond k (Craswell, "Mean Reciprocal Rank", Encyclopedia of Database Systems, 2009).
    reciprocal = {f"MRR@{k}": np.where(ranks <= k, 1 / ranks, 0.0) for k in TOP_K}
    return recall | reciprocal


def ranks_of_relevant(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The rank of each query's relevant candidate: float64 (N,), from 1; inf where it is missing.

    rank = 1 + the number of other candidates that score at least as high. Ties count against the
    model, so equal scores rank last. The order of candidates never matters.

    scores: float (N, C), padded with -inf. labels: int (N,), -1 where the relevant one is missing.
    Such a query counts as 0 in every mean: dropping it would raise the metrics.
    Raises ValueError without queries, for other shapes, or for a label without a finite score.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(scores) == 0:
        shapes = f"{scores.shape} and {labels.shape}"
        raise ValueError(f"expected scores (N, C) and labels (N,) with N > 0, got {shapes}")
    if labels.min() < -1 or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels must be -1 or a column of scores: {labels.min()}, {labels.max()}")
    relevant = np.where(labels >= 0, scores[np.arange(len(scores)), labels], 0)  # (N,)
    broken = np.flatnonzero(~np.isfinite(relevant))
    if len(broken) > 0:
        raise ValueError(f"the relevant one has no finite score in rows {broken[:10].tolist()}")

    ranks = np.empty(len(scores))
    # A block of rows at a time: the comparison (rows, C) stays in the processor's cache.
    rows = max(1, 2**17 // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = slice(start, start + rows)
        # Count those that score less, so that NaN counts against the model. The relevant candidate
        # is not less than itself: that is the 1 in the rank.
        lower = np.count_nonzero(scores[block] < relevant[block, None], axis=1)
        ranks[block] = scores.shape[1] - lower
    ranks[labels < 0] = np.inf
    return ranks
