"""That other programs read what an evaluation leaves, and find the same in it."""

import json
from argparse import Namespace

import ir_measures
import numpy as np
import pandas
import pytest
from conftest import read_csv, write_csv, write_data
from ir_measures import RR, Success

from data import read_datasets
from evaluate import write_metric_csv, write_trec
from metrics import TOP_K, compute_metrics
from model import DualEncoderConfig


@pytest.fixture
def dataset(tmp_path):
    """With a relevant element that is missing, words that pandas takes for nothing, and keys with a space (write_data's)."""
    data_dir = write_data(tmp_path / "data")
    path = data_dir / "csv" / "test_vocabulary.csv"
    rows = read_csv(path)
    rows[3]["resourceKey"] = next(
        f"element_{n}"
        for n in (1, 2, 3, 4)
        if f"element_{n}" not in rows[3]["candidate_resourceKey"]
    )
    rows[4]["search_word"], rows[5]["search_word"], rows[6]["template_idx"] = "NA", "", "007"
    write_csv(path, [list(row.values()) for row in rows])
    config = Namespace(data_dir=data_dir, max_candidates=400, num_negatives=3, seed=0)
    return read_datasets(config, Namespace(config=DualEncoderConfig()), ("test_vocabulary",))[0]


@pytest.fixture
def scores(dataset):
    """float32 (N, C), some of them tied, among these all of a row and negative ones."""
    random = np.random.default_rng(0)
    scores = random.integers(-3, 4, dataset.candidates.shape).astype(np.float32) / 7
    scores[8:] = random.normal(size=scores[8:].shape)
    scores[7] = scores[7, 0]
    return np.where(dataset.candidates < 0, -np.inf, scores).astype(np.float32)


def test_ir_measures_finds_our_metrics_in_the_trec_files(dataset, scores, tmp_path):
    write_trec(tmp_path / "trec", dataset, scores)
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "trec" / "qrels")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "trec" / "run")))
    names = {Success @ k: f"Recall@{k}" for k in TOP_K} | {RR @ k: f"MRR@{k}" for k in TOP_K}
    found = ir_measures.calc_aggregate(names, qrels, run)
    expected = compute_metrics(Namespace(predictions=scores, label_ids=dataset.labels.numpy()))
    assert {names[name]: value for name, value in found.items()} == pytest.approx(
        expected, abs=1e-12
    )
    assert len(qrels) == len({query.query_id for query in run}) == len(dataset.labels)
    assert "요소%2010" in {found.doc_id for found in run}
    for row in range(8, len(scores)):  # where nothing is tied the scores are the model's
        written = [found.score for found in run if found.query_id == str(dataset.rows.numbers[row])]
        real = scores[row][np.isfinite(scores[row])]
        assert np.array_equal(np.float32(written), np.sort(real)[::-1])


def test_metric_csv_in_pandas(dataset, scores, tmp_path):
    write_metric_csv(tmp_path / "metric.csv", dataset, scores)
    table = pandas.read_csv(
        tmp_path / "metric.csv",
        dtype=dict.fromkeys(dataset.rows.columns, str),
        keep_default_na=False,
    )
    for name, values in dataset.rows.columns.items():
        assert table[name].tolist() == values
    for row in range(len(scores)):
        assert (
            tuple(json.loads(table["candidate_resourceKey"][row])) == dataset.rows.candidates[row]
        )
        assert np.array_equal(
            np.float32(json.loads(table["score"][row])), scores[row][np.isfinite(scores[row])]
        )
    expected = compute_metrics(Namespace(predictions=scores, label_ids=dataset.labels.numpy()))
    assert {name: table[name].mean() for name in expected} == pytest.approx(expected, abs=1e-12)
    assert np.isinf(table["rank"][3])
