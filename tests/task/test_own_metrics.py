"""A team's own compute_metrics, written for Trainer, comes over: its numbers are ours.

`before` is such a function: it reads the CSV again, filters it as the data set does, takes -10 for
padding, computes by DataFrame.apply, and writes a file. `adapted` is the same one for this loop.
"""

import ast
import difflib
import inspect
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
from accelerate import Accelerator
from conftest import REPOSITORY
from page_data import make_tiny_model, read_csv, write_csv, write_data
from transformers import EvalPrediction

import evaluate as our_evaluate
from data import read_datasets
from metrics import compute_metrics
from model import load_model
from runtime.launch import UserError

PATH = None  # of test_vocabulary.csv; the fixture `data` sets it


def before(pred):
    df = pd.read_csv(PATH)
    df = df[~df.candidate_resourceKey.isna()]
    df["candidate_resourceKey"] = df["candidate_resourceKey"].map(eval)
    df = df[df.candidate_resourceKey.str.len() < 400]
    df["score"] = pred.predictions.tolist()
    df["score"] = df["score"].apply(lambda row: np.array([x for x in row if x != -10]))
    df["sorted_candidate_resourcekey"] = df.apply(sort_by_score, axis=1)
    df["rank"] = df.apply(get_rank, axis=1)
    df.to_csv("./metric.csv", index=False)
    return average(df)


def adapted(pred):
    df = pd.read_csv(PATH).iloc[pred.inputs]  # the rows, in the order of the scores: no filter
    df["candidate_resourceKey"] = df["candidate_resourceKey"].map(distinct)  # as the scores are
    df["score"] = pred.predictions.tolist()
    df["score"] = df["score"].apply(lambda row: np.array([x for x in row if x != -np.inf]))
    df["sorted_candidate_resourcekey"] = df.apply(sort_by_score, axis=1)
    df["rank"] = df.apply(get_rank, axis=1)
    return average(df)  # every process runs this: no file


def distinct(cell):
    """A key that occurs twice in a list counts once."""
    return list(dict.fromkeys(ast.literal_eval(cell)))


def sort_by_score(row):
    return [row.candidate_resourceKey[i] for i in np.argsort(-row.score, kind="stable")]


def get_rank(row):
    found = row.sorted_candidate_resourcekey
    return found.index(row.resourceKey) + 1 if row.resourceKey in found else np.inf


def average(df, top_k_list=(1, 4, 5, 10, 20, 50, 100)):
    metric = {}
    for k in top_k_list:
        metric[f"Recall@{k}"] = (df["rank"] <= k).sum() / df.shape[0]
        metric[f"MRR@{k}"] = (1 / df["rank"]).where(df["rank"] <= k, 0).sum() / df.shape[0]
    return metric


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that are left out, blank lines, repeated keys, relevant elements that are missing."""
    folder = write_data(tmp_path_factory.mktemp("own") / "data", test=40)
    path = folder / "csv" / "test_vocabulary.csv"
    rows = read_csv(path)
    rows[3]["candidate_resourceKey"] = ""
    rows[8]["candidate_resourceKey"] = "[]"
    rows[9]["candidate_resourceKey"] = str(["element_1"] * 400)
    for row in (rows[5], rows[6]):
        keys = ast.literal_eval(row["candidate_resourceKey"])
        row["candidate_resourceKey"] = str(keys[1:] + keys)
    rows[7]["resourceKey"] = "element_1"
    rows[7]["candidate_resourceKey"] = "['element_2', 'element_3']"
    write_csv(path, [list(row.values()) for row in rows])
    lines = path.read_bytes().split(b"\r\n")
    path.write_bytes(b"\r\n".join([*lines[:5], b"", *lines[5:]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "PATH", path)
        yield folder


def rerank(data, folder, function):
    """(prediction, metrics) of the rerank evaluation, with this compute_metrics."""
    model = load_model(make_tiny_model(folder / "model"))
    config = Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0)
    config.dataloader_num_workers, config.per_device_eval_batch_size = 0, 8
    datasets = read_datasets(config, model, ("eval", "test_vocabulary"))
    evaluation = our_evaluate.make_evaluations(*datasets)["rerank"]
    evaluation = evaluation._replace(compute_metrics=function)
    return evaluation.run(Accelerator(cpu=True), model, evaluation, config)


def test_its_numbers_are_ours(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prediction, theirs = rerank(data, tmp_path, adapted)
    for scores in prediction.predictions:  # no ties: those it would break by their order
        scores = scores[scores > -np.inf]
        assert len(np.unique(scores)) == len(scores)
    ours = compute_metrics(prediction)
    assert ours.keys() == theirs.keys() and 0 < ours["Recall@1"] < ours["MRR@100"] < 1
    assert theirs == pytest.approx(ours, abs=1e-12)
    assert not (tmp_path / "metric.csv").exists()


def test_few_lines_are_adapted():
    texts = [inspect.getsource(function).splitlines()[1:] for function in (before, adapted)]
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len([line for line in changes if line[0] == "+"]) == 4
    assert len([line for line in changes if line[0] == "-"]) == 7


def test_unchanged_it_would_not_do(data, tmp_path, monkeypatch):
    """It filters by its own rule, and its rows are not those of the scores."""
    monkeypatch.chdir(tmp_path)
    prediction, _ = rerank(data, tmp_path, adapted)
    scores = np.where(prediction.predictions == -np.inf, -10, prediction.predictions)
    with pytest.raises(ValueError, match="Length of values"):
        before(EvalPrediction(predictions=scores, label_ids=prediction.label_ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "line"),
    [("train.py", "import evaluate"), ("evaluate.py", "from evaluate import load")],
)
def test_the_library_evaluate_is_hidden(program, line, tmp_path):
    """Most scripts for Trainer import it. In metrics.py of a copy that ends in one line."""
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(REPOSITORY / "runtime", tmp_path / "runtime")
    text = (tmp_path / "metrics.py").read_text(encoding="utf-8")
    (tmp_path / "metrics.py").write_text(f"{line}\n{text}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: in metrics.py `import evaluate` is our evaluate.py")


def test_the_library_is_hidden_from_a_function_too():
    def imported():
        from evaluate import load  # pyrefly: ignore[missing-module-attribute]

        return load

    for use in (imported, lambda: our_evaluate.load("accuracy"), lambda: our_evaluate.combine([])):
        with pytest.raises(UserError, match="^in metrics.py `import evaluate` is our evaluate.py"):
            use()
    assert not hasattr(our_evaluate, "nothing")
