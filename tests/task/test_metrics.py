"""The metrics against a brute force, against another library, and against what a metric must not do."""

import numpy as np
import pytest
import pytrec_eval
from transformers import EvalPrediction

from metrics import TOP_K, compute_metrics, measure_queries, ranks_of_relevant


def brute_force(rows):
    """rows: (list of scores, column of the relevant one or -1). The contract, word for word, one candidate at a time."""
    ranks = []
    for scores, label in rows:
        if label < 0:
            ranks.append(float("inf"))
            continue
        others = [score for column, score in enumerate(scores) if column != label]
        ranks.append(1 + sum(1 for score in others if score >= scores[label]))
    values = {}
    for k in TOP_K:
        values[f"Recall@{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        values[f"MRR@{k}"] = sum(1 / rank for rank in ranks if rank <= k) / len(ranks)
    return ranks, values


def padded(rows, extra=0, dtype=np.float32):
    width = max(len(scores) for scores, _ in rows) + extra
    scores = np.full((len(rows), width), -np.inf, dtype)
    for row, (values, _) in enumerate(rows):
        scores[row, : len(values)] = values
    return scores, np.array([label for _, label in rows])


def metrics_of(rows, **options):
    scores, labels = padded(rows, **options)
    return compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))


def random_rows(random, ties, longest=130):
    rows = []
    for _ in range(random.integers(1, 40)):
        size = random.integers(1, longest)
        # A few values only: many ties; -10 among them, which is a score like any other.
        values = (
            random.choice([-10.0, -1.5, 0.0, 0.25, 3.0], size) if ties else random.normal(size=size)
        )
        rows.append((values.astype(np.float16).tolist(), int(random.integers(-1, size))))
    return rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ties", [True, False])
def test_brute_force(ties, dtype):
    random = np.random.default_rng(0)
    for _ in range(100):
        rows = random_rows(random, ties)
        ranks, values = brute_force(rows)
        assert ranks_of_relevant(*padded(rows, dtype=dtype)).tolist() == ranks
        assert metrics_of(rows, dtype=dtype) == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_each_query_is_measured_and_the_mean_is_logged(ties):
    random = np.random.default_rng(4)
    rows = random_rows(random, ties)
    scores, labels = padded(rows, extra=3)
    prediction = EvalPrediction(predictions=scores, label_ids=labels)
    measured = measure_queries(prediction)
    assert list(measured) == [f"Recall@{k}" for k in TOP_K] + [f"MRR@{k}" for k in TOP_K]
    alone = [brute_force([row])[1] for row in rows]  # one query at a time
    for name, values in measured.items():
        assert values.dtype == np.float64 and values.shape == (len(rows),)
        assert values.tolist() == [values_of_one[name] for values_of_one in alone]
    logged = compute_metrics(prediction)
    assert logged == {name: np.mean(values) for name, values in measured.items()}
    assert {type(value) for value in logged.values()} == {float}


def test_many_rows_and_columns():
    """More than a block of rows, and fewer columns than any block."""
    random = np.random.default_rng(1)
    for shape in ((5000, 60), (3, 300_000), (200_000, 1)):
        scores = random.integers(0, 50, shape).astype(np.float32)
        labels = random.integers(0, shape[1], shape[0])
        expected = (scores >= scores[np.arange(len(scores)), labels][:, None]).sum(1)
        assert (ranks_of_relevant(scores, labels) == expected).all()


def test_another_library():
    """trec_eval, where its rules and ours agree: no ties, every query with its relevant candidate among the candidates."""
    random = np.random.default_rng(2)
    rows = [
        (random.permutation(size).astype(float).tolist(), int(random.integers(size)))
        for size in random.integers(1, 150, 200)
    ]
    qrels = {f"q{q}": {f"c{label}": 1} for q, (_, label) in enumerate(rows)}
    ours = metrics_of(rows)
    for k in TOP_K:
        best = [sorted(enumerate(scores), key=lambda item: -item[1])[:k] for scores, _ in rows]
        run = {f"q{q}": {f"c{c}": score for c, score in items} for q, items in enumerate(best)}
        measured = (
            pytrec_eval.RelevanceEvaluator(qrels, {f"recall.{k}", "recip_rank"})
            .evaluate(run)
            .values()
        )
        assert len(measured) == len(rows)
        assert ours[f"Recall@{k}"] == pytest.approx(
            np.mean([values[f"recall_{k}"] for values in measured]), abs=1e-12
        )
        assert ours[f"MRR@{k}"] == pytest.approx(
            np.mean([values["recip_rank"] for values in measured]), abs=1e-12
        )


def test_constant_model_is_the_worst():
    rows = [([0.5] * size, size // 2) for size in range(2, 30)]
    values = metrics_of(rows)
    assert values["Recall@1"] == values["MRR@1"] == 0
    assert ranks_of_relevant(*padded(rows)).tolist() == list(range(2, 30))
    assert metrics_of([([0.5], 0)])["Recall@1"] == 1  # one candidate is always right


def test_order_and_padding_change_nothing():
    random = np.random.default_rng(3)
    rows = random_rows(random, ties=True)
    shuffled = []
    for scores, label in rows:
        order = random.permutation(len(scores))
        shuffled.append(
            ([scores[i] for i in order], -1 if label < 0 else order.tolist().index(label))
        )
    assert metrics_of(shuffled) == metrics_of(rows) == metrics_of(rows, extra=7)


def test_missing_relevant_stays_in_the_denominator():
    assert metrics_of([([1.0, 0.0], 0), ([1.0, 0.0], -1)])["Recall@100"] == 0.5


def test_nan_never_helps():
    nan = float("nan")
    assert ranks_of_relevant([[0.5, nan, 0.1]], [0]).tolist() == [2]


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[1.0, -np.inf]], [1], "no finite score in rows"),
        ([[np.nan, 1.0]], [0], "no finite score in rows"),
        ([[1.0, 2.0]], [2], "column of scores"),
        ([[1.0, 2.0]], [-2], "column of scores"),
        ([[1.0, 2.0]], [0, 1], "expected scores"),
        (np.zeros((0, 4)), np.zeros(0, int), "expected scores"),
    ],
)
def test_what_makes_no_sense_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        ranks_of_relevant(scores, labels)
