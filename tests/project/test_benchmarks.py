"""That the benchmarks work: each with little data, in one round. How fast anything is they say only when run by themselves."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SIDE_BY_SIDE, launch_environment

ROWS = {
    "training": ["train.py", "Trainer", "Trainer, images in memory", "Trainer, same DataLoader"]
    + ["bare loop, same DataLoader", "bare loop, batches in memory"],
    "rerank_evaluation": [
        "evaluate.py",
        "Trainer reference",
        "Trainer reference, embeddings not kept",
    ]
    + ["Trainer reference, nothing kept", "floor", "lower floor", "85"],
    "ranking_metrics": ["metrics.py", "one NumPy pass", "DataFrame, apply", "pytrec_eval"],
    "reading": ["Python literals", "JSON"],
    "start": [
        "python train.py, imports only",
        "accelerate launch, PreTrainedModel and an Accelerator",
        "accelerate launch train.py",
        "of it: imports",
        "of it: first update",
    ],
    "scale": ["s to the first update, second launch", "MB of the machine, 2 processes"],
    "input_pipeline": [
        "kept decoded, 0 workers",
        "decoded at every use, 4 workers",
        "the model, training",
    ],
}


LONG = {*ROWS} - {"ranking_metrics"}  # they take four minutes of CI


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in ROWS]
)
def test_a_small_version(name):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "benchmarks" / f"{name}.py", "--small"],
        env=launch_environment() | SIDE_BY_SIDE,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    assert set(ROWS[name]) <= {row[0] for row in rows}
    for row in rows:
        if row[0] in ROWS[name]:
            assert all(
                re.fullmatch(r"-?[\d,.]+( MB)?|training|rerank", cell) for cell in row[1:]
            ), row


def test_each_benchmark_is_tried():
    assert {path.stem for path in (REPOSITORY / "tests" / "benchmarks").glob("*.py")} == {
        *ROWS,
        "measure",
    }
