"""Ranking metrics: metrics.py, a DataFrame with `apply`, ranx and pytrec_eval, on the same scores; time and peak memory.

    python tests/benchmarks/ranking_metrics.py

ranx is compared where it is installed (pip install ranx==0.3.21). At 1,000,000 x 100 only what works on arrays is run: the
others want a Python object for each score, 10 GB and more.
"""

import importlib.util

import measure
import numpy as np
import pandas
import pytrec_eval
from transformers import EvalPrediction

from metrics import TOP_K, compute_metrics


def main():
    arguments = measure.arguments(__doc__)
    for queries, rounds in ((50, 1),) if arguments.small else ((10_000, 3), (1_000_000, 5)):
        compare(queries, rounds)


def compare(queries, rounds):
    random = np.random.default_rng(0)
    scores = random.random((queries, 100), dtype=np.float32)  # (N, 100)
    labels = random.integers(0, 100, queries)  # (N,)
    alternatives = {
        "metrics.py": lambda: ours(scores, labels),
        "one NumPy pass": lambda: numpy_pass(scores, labels),
    }
    if queries <= 10_000:
        keys = [f"key_{number:02d}" for number in range(100)]
        frame = pandas.DataFrame(
            {
                "score": scores.tolist(),
                "key": [keys] * queries,
                "relevant": [keys[i] for i in labels],
            }
        )
        alternatives["DataFrame, apply"] = lambda: with_apply(frame)
        names = [str(number) for number in range(queries)]
        run = {
            name: dict(zip(keys, row, strict=True))
            for name, row in zip(names, scores.tolist(), strict=True)
        }
        qrels = {name: {keys[i]: 1} for name, i in zip(names, labels, strict=True)}
        alternatives["pytrec_eval"] = lambda: with_pytrec_eval(run, qrels)
        if importlib.util.find_spec("ranx"):
            alternatives["ranx"] = ranx_alternative(run, qrels)
        found = {
            name: evaluate() for name, evaluate in alternatives.items() if name != "one NumPy pass"
        }
        for name, values in found.items():  # they agree, or the comparison is of nothing
            assert np.allclose(
                [values[k] for k in values], [found["metrics.py"][k] for k in values]
            ), name
    memory = {name: measure.peak_memory(run) for name, run in alternatives.items()}
    seconds = measure.in_turn(alternatives, rounds)
    rows = [
        [
            name,
            f"{np.median(took) * 1000:,.1f}",
            f"{measure.ratio(seconds, name, 'one NumPy pass'):,.2f}",
            f"{measure.ratio(seconds, name, 'metrics.py'):,.2f}",
            f"{memory[name] / scores.nbytes:.2f}",
        ]
        for name, took in seconds.items()
    ]
    header = ["", "ms", "× one NumPy pass", "× metrics.py", "extra memory, × the scores"]
    measure.show_table(
        f"Recall@k and MRR@k of {queries:,} queries with 100 candidates", header, rows
    )


def ours(scores, labels):
    return compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))


def numpy_pass(scores, labels):
    """The least that ranking takes: every score compared once, and the comparisons counted."""
    return (scores >= scores[np.arange(len(scores)), labels][:, None]).sum(1)


def with_apply(frame):
    """As it is often written: a row at a time, sorted, and looked through once for each metric and each k."""
    frame = frame.copy()
    frame["ranked"] = frame.apply(
        lambda row: [key for _, key in sorted(zip(row.score, row.key, strict=True))][::-1], axis=1
    )
    values = {}
    for k in TOP_K:
        values[f"Recall@{k}"] = frame.apply(
            lambda row, k=k: float(row.relevant in row.ranked[:k]), axis=1
        ).mean()
        values[f"MRR@{k}"] = frame.apply(
            lambda row, k=k: (
                1 / (1 + row.ranked.index(row.relevant)) if row.relevant in row.ranked[:k] else 0.0
            ),
            axis=1,
        ).mean()
    return values


def with_pytrec_eval(run, qrels):
    measures = {f"success.{','.join(map(str, TOP_K))}", "recip_rank"}
    evaluated = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    values = {
        f"Recall@{k}": np.mean([query[f"success_{k}"] for query in evaluated.values()])
        for k in TOP_K
    }
    return values | {"MRR@100": np.mean([query["recip_rank"] for query in evaluated.values()])}


def ranx_alternative(run, qrels):
    import ranx  # with numba, 300 MB, and compiles for a minute: not in tests/requirements.txt

    ranx_qrels, ranx_run = ranx.Qrels(qrels), ranx.Run(run)
    names = {f"hit_rate@{k}": f"Recall@{k}" for k in TOP_K} | {
        f"mrr@{k}": f"MRR@{k}" for k in TOP_K
    }

    def evaluate():
        return {
            names[name]: value
            for name, value in ranx.evaluate(ranx_qrels, ranx_run, list(names)).items()
        }

    return evaluate


if __name__ == "__main__":
    main()
