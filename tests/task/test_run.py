"""A run of our task from end to end, on one process, and what it leaves."""

import functools
import json
import re
import sys
from argparse import Namespace

import numpy as np
import pandas
import pytest
import torch
from conftest import REPOSITORY, column, read_log
from page_data import make_tiny_model, write_data

import evaluate
import train
from data import decode_image
from model import DualEncoder

OPTIONS = ["--max_steps", 4, "--eval_steps", 2, "--num_negatives", 3, "--report_to", "none"]
OPTIONS += ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 4]
SEQUENCE = "evaluate get_eval_dataloader evaluation_loop _rerank_evaluate rerank_evaluate"
SEQUENCE += " get_rerank_eval_dataloader rerank_evaluation_loop compute_metrics"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and the functions of the documented sequence in the order of their calls."""
    folder, calls = tmp_path_factory.mktemp("run"), []

    def recorded(function):
        @functools.wraps(function)
        def wrapper(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return wrapper

    data, model = write_data(folder / "data"), make_tiny_model(folder / "model")
    flags = ["--data_dir", data, "--model_name_or_path", model, "--output_dir", folder / "output"]
    with pytest.MonkeyPatch.context() as patch:
        for name in SEQUENCE.split():
            patch.setattr(evaluate, name, recorded(getattr(evaluate, name)))
        log = recorded(evaluate.maybe_log_save_evaluate)
        patch.setattr(train, "maybe_log_save_evaluate", log)
        patch.setattr(train.launch, "watch_for_stop", lambda accelerator: None)
        patch.setattr(sys, "argv", ["train.py", *map(str, [*flags, *OPTIONS])])
        with pytest.raises(SystemExit) as ended:
            train.main()
    assert not ended.value.code
    return Namespace(folder=folder / "output", data=data, calls=calls)


@pytest.mark.slow
def test_the_order_of_calls_is_the_documented_one(run):
    update = ["maybe_log_save_evaluate"]
    shared = ["evaluate", "get_eval_dataloader", "evaluation_loop", "compute_metrics"]
    rerank = ["_rerank_evaluate", "rerank_evaluate", "get_rerank_eval_dataloader"]
    rerank += ["get_eval_dataloader", "rerank_evaluation_loop", "compute_metrics"]
    expected = []
    for step in range(5):
        expected += update + (shared + rerank if step in (0, 2, 4) else [])
    assert run.calls == expected
    # The table for a Trainer user names the functions of the rerank evaluation, in this order.
    page = (REPOSITORY / "docs" / "FROM_TRAINER.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)`, \d+ \|", page, re.MULTILINE)
    rerank.remove("get_eval_dataloader")
    assert table == ["_maybe_log_save_evaluate", *rerank[:-1]]


@pytest.mark.slow
def test_what_our_reports_leave(run):
    names = {path.name for path in run.folder.iterdir()}
    ours = {"metric.csv", "contact_sheet.png", "curves.png"}
    assert names == ours | {"best", "checkpoints", "log.jsonl", "run.yaml"}
    first, lines = read_log(run.folder)
    others = "no_candidates", "too_many_candidates", "relevant_missing", "relevant_alone"
    assert list(first["data"].values())[0] == {"used": 41} | dict.fromkeys(others, 0)
    assert list(column(lines, "rerank/MRR@100")) == [0, 2, 4]


@pytest.mark.slow
def test_metric_csv_has_the_scores_and_the_metrics(run):
    table = pandas.read_csv(run.folder / "metric.csv")
    source = pandas.read_csv(run.data / "csv" / "test_vocabulary.csv")
    for name in ("search_word", "template_idx", "page_num", "x_image_path", "resourceKey"):
        assert table[name].tolist() == source[name].tolist()
    logged = read_log(run.folder)[1][-1]
    for k in (1, 4, 5, 10, 20, 50, 100):
        assert table[f"Recall@{k}"].mean() == logged[f"rerank/Recall@{k}"]
        assert table[f"MRR@{k}"].mean() == pytest.approx(logged[f"rerank/MRR@{k}"], abs=1e-15)
    model = DualEncoder.from_pretrained(run.folder / "checkpoints" / "step_00000004").eval()
    size = model.config.page_size
    for _, row in table.iterrows():
        keys, scores = json.loads(row["candidate_resourceKey"]), json.loads(row["score"])
        ordered = json.loads(row["sorted_candidate_resourcekey"])
        assert json.loads(row["sorted_score"]) == sorted(scores, reverse=True)
        assert sorted(ordered) == sorted(keys)
        assert ordered[int(row["rank"]) - 1] == row["resourceKey"]
        page = decode_image(run.data / "images" / f"{row['x_image_path']}.png", size)
        paths = [run.data / "elements" / f"{key}.png" for key in keys]
        elements = torch.stack([decode_image(path, size) for path in paths])
        with torch.no_grad():
            page = model(images=page[None])["outputs"][0]
            assert np.allclose(model(images=elements)["outputs"] @ page, scores, atol=1e-6)


def test_learning_rate():
    config = Namespace(learning_rate=2.0, warmup_steps=0.1)
    rates = [train.learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) * 0.2) and max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert train.learning_rate_at(0, 1, config) == 2.0


def test_weight_decay_groups():
    model = train.load_model(None)
    decayed, others = train.parameter_groups(model, 0.1)
    assert {parameter.ndim for parameter in others["params"]} == {1} and others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
