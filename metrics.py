"""Ranking metrics: arrays in, floats out. No accelerate, no torch.distributed, no file is opened.

N queries, C candidates (of the longest list). One candidate of a query is the relevant one.
"""

import numpy as np
from numpy.typing import ArrayLike
from transformers import EvalPrediction

TOP_K = (1, 4, 5, 10, 20, 50, 100)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Recall@k and MRR@k for each k of TOP_K.

    prediction.predictions: float (N, C), the scores, padded with -inf at the end of a row.
    prediction.label_ids: int (N,), the column of the relevant candidate; -1 where it is not among the candidates.

    The signature is the one that Trainer's `compute_metrics` has, so either can be used in place of the other.
    Raises ValueError as `ranks_of_relevant` does.
    """
    ranks = ranks_of_relevant(prediction.predictions, prediction.label_ids)
    metrics = {}
    for k in TOP_K:
        metrics[f"Recall@{k}"] = float(recall_at(k, ranks).mean())
    for k in TOP_K:
        metrics[f"MRR@{k}"] = float(reciprocal_rank_at(k, ranks).mean())
    return metrics


def ranks_of_relevant(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Rank of the relevant candidate of each query: float64 (N,), from 1; inf where it is not among the candidates.

    rank = 1 + the number of other candidates that score at least as high. So a tie counts against the model, the order of
    the candidates never matters, and a model that gives all the same score ranks last, not first.

    scores: float (N, C), padded with -inf. labels: int (N,), -1 for a relevant candidate that is missing: its query stays
    in every mean, with recall 0 and reciprocal rank 0 (leaving it out would reward losing it).
    Raises ValueError if there is no query, if shapes disagree, or if a label points at padding or at a score that is not finite.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(scores) == 0:
        raise ValueError(
            f"expected scores (N, C) and labels (N,) with N > 0, got {scores.shape} and {labels.shape}"
        )
    if labels.min() < -1 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels must be -1 or a column of scores (N, C) = {scores.shape}, got {labels.min()} to {labels.max()}"
        )
    relevant = np.where(labels >= 0, scores[np.arange(len(scores)), labels], 0)  # (N,)
    if not np.isfinite(relevant).all():
        raise ValueError(
            f"the relevant candidate has no finite score in rows {np.flatnonzero(~np.isfinite(relevant))[:10].tolist()}"
        )

    ranks = np.empty(len(scores))
    # A block of rows at a time: the (rows, C) comparison stays in the processor's cache, and memory does not grow with N.
    rows = max(1, 2**17 // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = slice(start, start + rows)
        # Counting those that score less, not those that score as much, makes a NaN count against the model too.
        # The relevant candidate is never less than itself, so it is the 1 of "1 + the number of others".
        lower = np.count_nonzero(scores[block] < relevant[block, None], axis=1)
        ranks[block] = scores.shape[1] - lower
    ranks[labels < 0] = np.inf
    return ranks


def best_first(scores: np.ndarray, label: int) -> np.ndarray:
    """The columns of one query's candidates in order: int64 (C,). Among equals the relevant one is last, and so at its rank.

    scores: float (C,), without padding. label: the column of the relevant candidate, -1 if it is missing.
    """
    return np.lexsort((np.arange(len(scores)) == label, -scores))


def recall_at(k: int, ranks: np.ndarray) -> np.ndarray:
    """1.0 where rank <= k, else 0.0: float64 (N,). With one relevant candidate a query, recall is the hit rate."""
    return (ranks <= k).astype(np.float64)


def reciprocal_rank_at(k: int, ranks: np.ndarray) -> np.ndarray:
    """1/rank where rank <= k, else 0.0: float64 (N,). Its mean is MRR@k (Craswell, "Mean Reciprocal Rank", Encyclopedia of
    Database Systems, 2009)."""
    return np.where(ranks <= k, 1 / ranks, 0.0)
