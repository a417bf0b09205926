"""The scripts in tools/ find in metric.csv what the evaluation found, and tell it to others."""

import base64
import io
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser

import ir_measures
import numpy as np
import pytest
from conftest import REPOSITORY
from fontTools.ttLib import TTFont
from ir_measures import RR, Success
from page_data import read_csv, write_csv
from PIL import Image
from test_report import (
    MISSING,
    NASTY,
    expected_candidates,
    predict,
    read_rerank,
    show_texts,
    with_scores,
    write_hard_data,
)

import metrics
import report


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return read_rerank(write_hard_data(tmp_path_factory.mktemp("tools") / "data"))


@pytest.fixture
def run(dataset, monkeypatch, tmp_path):
    """Run a tool as a command on a metric.csv in tmp_path: its lines, or its error."""

    def run(name, data_dir=dataset.data_dir):
        command = [str(REPOSITORY / "tools" / name), str(tmp_path), "--data_dir", str(data_dir)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", [*sys.path])
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return run


class Page(HTMLParser):
    """The elements of gallery.html, and its data."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.data, self.links = [], None, []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and self.tags.count("script") == 1 and data.strip():
            self.data = json.loads(data)

    def font(self):
        return base64.b64decode(re.search("data:font/woff;base64,([^)]*)", self.text)[1])


def test_the_gallery_holds_what_metric_csv_says(dataset, run, tmp_path):
    report.write(tmp_path, dataset, predict(dataset))
    table = read_csv(tmp_path / "metric.csv")
    assert run("gallery.py") is None
    page = Page(tmp_path / "gallery.html")
    assert page.tags.count("script") == 2 and not {"b", "i"} & set(page.tags) and not page.links
    pictures, queries = page.data["pictures"], page.data["queries"]
    assert [query["word"] for query in queries[:2]] == [NASTY, "하트"]
    assert len(queries) == len(table)
    looks = set()
    for number, (line, query) in enumerate(zip(table, queries, strict=True), start=2):
        rank = float(line["rank"])
        assert query["rank"] == (rank if np.isfinite(rank) else None)
        assert query["row"] == number
        expected = expected_candidates(dataset, line)
        assert query["right"] == [right for _, right in expected].index(True)
        ordered = json.loads(line["sorted_candidate_resourcekey"])
        names = [page.data["candidates"][number][0] for number in query["candidates"]]
        last = [line["resourceKey"]] * (len(names) > min(len(ordered), report.TOP))
        assert names == ordered[: report.TOP] + last and query["of"] == len(ordered)
        by_key = dict(zip(ordered, json.loads(line["sorted_score"]), strict=True))
        assert query["scores"] == [by_key.get(name) for name in names]  # eighths are exact
        looks |= {path for path, _ in expected} | {report.show_query(dataset.data_dir, line)[1]}
    for row in MISSING:
        assert queries[row]["rank"] is None and queries[row]["scores"][-1] is None
    # Each picture once.
    assert len(pictures) == len({picture["image"] for picture in pictures}) == len(looks)
    letters = {ord(letter) for word in ("하트", "heart", "0.125") for letter in word}
    assert letters <= TTFont(io.BytesIO(page.font())).getBestCmap().keys()
    encoded = [base64.b64decode(picture["image"].split(",")[1]) for picture in pictures]
    assert {Image.open(io.BytesIO(image)).size for image in encoded} == {(128, 128), (80, 80)}


def test_the_gallery_of_a_task_of_texts(dataset, run, monkeypatch, tmp_path):
    report.write(tmp_path, dataset, predict(dataset))
    show_texts(monkeypatch)
    assert run("gallery.py") is None
    pictures = Page(tmp_path / "gallery.html").data["pictures"]
    assert all(list(picture) == ["text"] for picture in pictures)
    assert all(len(picture["text"]) <= report.TEXT_LIMIT + 1 for picture in pictures)
    assert pictures[0]["text"].startswith("질문 1 test_vocabulary 0: what does it say of <script>")


@pytest.mark.parametrize("hidden", ["pylopdf_fonts_ko", "fontTools"])
def test_the_gallery_without_a_font(hidden, dataset, run, monkeypatch, capsys, tmp_path):
    report.write(tmp_path, dataset, predict(dataset))
    monkeypatch.setitem(sys.modules, hidden, None)
    assert run("gallery.py") is None
    page = Page(tmp_path / "gallery.html")
    assert page.font() == b"" and len(page.data["queries"]) == 17
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "font" in line]
    assert "pip install pylopdf-fonts-ko fonttools" in line


@pytest.mark.parametrize("tool", ["gallery.py", "trec.py"])
def test_a_metric_csv_that_cannot_be_used(tool, dataset, run, tmp_path):
    message = run(tool)
    assert message.startswith(f"error: {tmp_path}/metric.csv: ") and "No such file" in message
    report.write(tmp_path, dataset, predict(dataset))
    lines = read_csv(tmp_path / "metric.csv")
    write_csv(
        tmp_path / "metric.csv", [list(line.values())[:6] for line in lines], list(lines[0])[:6]
    )
    assert "not found: [" in run(tool) and "sorted_score" in run(tool)
    lines[3]["sorted_score"] = lines[3]["sorted_score"][:9]  # as a spreadsheet cuts long cells
    write_csv(tmp_path / "metric.csv", [line.values() for line in lines], list(lines[0]))
    assert run(tool).startswith(f"error: {tmp_path}/metric.csv") and "\n" not in run(tool)
    assert [path.name for path in tmp_path.iterdir() if path.name != "metric.csv"] == [
        "contact_sheet.png"
    ]


def test_a_data_folder_without_the_images(dataset, run, tmp_path):
    report.write(tmp_path, dataset, predict(dataset))
    (tmp_path / "else").mkdir()
    message = run("gallery.py", tmp_path / "else")
    assert message.startswith(f"error: {tmp_path}/metric.csv, row 2: {tmp_path}/else/images")
    assert "'test_vocabulary 0.png'" in message and "--data_dir" in message
    data_dir = write_hard_data(tmp_path / "data")
    (data_dir / "elements" / "it's <i>.png").unlink()
    assert ", row 3: " in run("gallery.py", data_dir) and "it's <i>.png" in run(
        "gallery.py", data_dir
    )
    (data_dir / "elements" / "it's <i>.png").write_text("no image")
    assert ", row 3: " in run("gallery.py", data_dir)
    assert not (tmp_path / "gallery.html").exists()


def test_ir_measures_finds_our_metrics_in_the_trec_files(dataset, run, tmp_path):
    random = np.random.default_rng(0)
    scores = predict(dataset, step=7).predictions  # some are tied, and some below 0
    scores[7] = np.where(np.isinf(scores[7]), -np.inf, 1 / 7)  # a row of ties
    scores[8:] = np.where(np.isinf(scores[8:]), -np.inf, random.normal(size=scores[8:].shape))
    prediction = with_scores(dataset, scores)
    report.write(tmp_path, dataset, prediction)
    assert run("trec.py") is None
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    ranked = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    names = {Success @ k: f"Recall@{k}" for k in metrics.TOP_K}
    names |= {RR @ k: f"MRR@{k}" for k in metrics.TOP_K}
    found = ir_measures.calc_aggregate(names, qrels, ranked)
    found = {names[name]: value for name, value in found.items()}
    assert found == pytest.approx(metrics.compute_metrics(prediction), abs=1e-12)
    assert len(qrels) == len({query.query_id for query in ranked}) == len(dataset.labels)
    assert "요소%2010" in {found.doc_id for found in ranked}
    for row in range(8, len(scores)):  # where nothing is tied the scores are the model's
        written = [found.score for found in ranked if found.query_id == str(row + 2)]
        real = scores[row][np.isfinite(scores[row])]
        assert np.array_equal(np.float32(written), np.sort(real)[::-1])


@pytest.mark.slow
def test_the_commands(dataset, tmp_path):
    """As documented, from any folder: the files, or an error in one line."""

    def start(tool):
        command = [sys.executable, REPOSITORY / "tools" / tool, ".", "--data_dir", dataset.data_dir]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    failed = start("trec.py")
    assert failed.returncode == 1 and re.fullmatch(r"error: metric.csv: .*\n", failed.stderr)
    report.write(tmp_path, dataset, predict(dataset))
    for tool in ("gallery.py", "trec.py"):
        done = start(tool)
        assert done.returncode == 0, done.stderr
    made = {"metric.csv", "contact_sheet.png", "gallery.html", "run", "qrels"}
    assert {path.name for path in tmp_path.iterdir()} == made
