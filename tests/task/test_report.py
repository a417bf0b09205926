"""The pictures of a run: what they show is what metric.csv and log.jsonl say."""

import base64
import io
import json
import re
import unicodedata
from argparse import Namespace
from html.parser import HTMLParser

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import column, read_csv, save_image, write_csv, write_data
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from PIL import Image, ImageColor

import metrics
import report
from data import RerankDataset, read_datasets
from evaluate import write_metric_csv
from model import DualEncoderConfig
from runtime.tracking import log_picture

NASTY = '</script><b>"it\'s" & 하트\\u003c'
MISSING = 5  # the row whose relevant element is not among its candidates


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows whose words, keys and lists are as hard to show as they come: 40 candidates in one, two elements of one file."""
    folder = write_data(tmp_path_factory.mktemp("gallery") / "data", elements=40)
    path = folder / "csv" / "test_vocabulary.csv"
    table = read_csv(path)
    for grey, key in enumerate(('a "quoted" key', "it's <i>")):
        save_image(folder / "elements" / f"{key}.png", np.full((20, 50, 3), 100 * grey, np.uint8))
    (folder / "elements" / "again.png").symlink_to('a "quoted" key.png')
    table[0] |= {
        "search_word": NASTY,
        "candidate_resourceKey": json.dumps([table[0]["resourceKey"], 'a "quoted" key', "again"]),
    }
    table[1] |= {
        "search_word": unicodedata.normalize("NFD", "하트"),
        "candidate_resourceKey": '["it\'s <i>"]',
        "resourceKey": "it's <i>",
    }
    everything = [
        f"요소 {number}" if number % 5 == 0 else f"element_{number}" for number in range(40)
    ]
    table[3] |= {"search_word": "", "candidate_resourceKey": json.dumps(everything)}
    table[MISSING]["candidate_resourceKey"] = json.dumps(
        [key for key in everything if key != table[MISSING]["resourceKey"]][:12]
    )
    write_csv(path, [row.values() for row in table], list(table[0]))
    return folder


@pytest.fixture(scope="module")
def dataset(data):
    config = Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0)
    return read_datasets(config, Namespace(config=DualEncoderConfig()), ("test_vocabulary",))[0]


def random_scores(dataset, seed=0):
    """With ties, and padded."""
    scores = (
        np.random.default_rng(seed).integers(-8, 8, dataset.candidates.shape).astype(np.float32) / 8
    )
    return np.where(dataset.candidates.numpy() >= 0, scores, -np.inf).astype(np.float32)


def table_of(dataset, scores, folder):
    write_metric_csv(folder / "metric.csv", dataset, scores)
    return read_csv(folder / "metric.csv")


class Sheet:
    """The contact sheet of some scores, and what was drawn on it: [(corner, picture), the candidates...] of each query."""

    def __init__(self, monkeypatch, dataset, scores, folder):
        drawn, draw_picture = [], report.draw_picture

        def watched(sheet, corner, picture, width, height):
            if height == report.QUERY:
                drawn.append([])
            drawn[-1].append((corner, picture))
            draw_picture(sheet, corner, picture, width, height)

        monkeypatch.setattr(report, "draw_picture", watched)
        report.draw(Namespace(output_dir=folder), dataset, scores)
        monkeypatch.undo()
        self.image, self.queries = Image.open(folder / "contact_sheet.png"), drawn

    def framed(self, corner):
        x, y = corner
        return self.image.getpixel((x - 3, y + 20)) == ImageColor.getrgb(report.RIGHT)


def expected_row(dataset, row, table):
    """[(picture, is it the relevant one)] of what a query must show, by metric.csv."""
    ordered, relevant = (
        json.loads(table[row]["sorted_candidate_resourcekey"]),
        table[row]["resourceKey"],
    )
    keys = ordered[: report.TOP] + [relevant] * (relevant not in ordered[: report.TOP])
    elements = dataset.rows.path.parent.parent / "elements"
    return [((elements / f"{key}.png").resolve(), key == relevant) for key in keys]


def test_the_contact_sheet_shows_what_metric_csv_says(dataset, monkeypatch, tmp_path):
    scores = random_scores(dataset)
    table = table_of(dataset, scores, tmp_path)
    sheet = Sheet(monkeypatch, dataset, scores, tmp_path)
    assert not (tmp_path / "gallery.html").exists()
    ranks = np.array([float(row["rank"]) for row in table])
    finite = [row for row in range(17) if np.isfinite(ranks[row])]
    worst = sorted((row for row in finite if ranks[row] > 1), key=lambda row: -ranks[row])[
        : report.WORST
    ]
    pages = {path: row for row, path in enumerate(dataset.show_query(row)[1] for row in range(17))}
    rows = [pages[query[0][1]] for query in sheet.queries]
    assert (
        rows[report.SAMPLE :] == worst
        and len(set(rows[: report.SAMPLE])) == report.SAMPLE
        and MISSING in rows
    )
    for row, (_, *candidates) in zip(rows, sheet.queries, strict=True):
        assert [(picture, sheet.framed(corner)) for corner, picture in candidates] == expected_row(
            dataset, row, table
        )
        corners = np.array([corner for corner, _ in candidates])
        assert (np.diff(corners[:, 0]) >= report.CANDIDATE).all() and (corners >= 0).all()
        assert (corners + report.CANDIDATE + 20 <= sheet.image.size).all()  # nothing is cut off


def test_the_sample_is_the_same_whatever_the_scores(dataset, monkeypatch, tmp_path):
    samples = []
    for seed in range(3):
        sheet = Sheet(monkeypatch, dataset, random_scores(dataset, seed), tmp_path)
        samples.append([query[0] for query in sheet.queries[: report.SAMPLE]])
    assert samples[0] == samples[1] == samples[2]


def test_a_model_without_misses(dataset, monkeypatch, tmp_path):
    scores = np.where(dataset.candidates.numpy() >= 0, 0, -np.inf).astype(np.float32)
    found = np.flatnonzero(dataset.labels.numpy() >= 0)
    scores[found, dataset.labels[found]] = 1
    assert len(Sheet(monkeypatch, dataset, scores, tmp_path).queries) == report.SAMPLE


def test_the_order_is_that_of_the_ranks():
    random = np.random.default_rng(0)
    for _ in range(200):
        scores = random.integers(0, 4, random.integers(1, 9)).astype(np.float32)
        label = random.integers(len(scores))
        order = metrics.best_first(scores, label).tolist()
        assert sorted(order) == list(range(len(scores))) and (np.diff(scores[order]) <= 0).all()
        assert order.index(label) + 1 == metrics.ranks_of_relevant(scores[None], [label])[0]


def test_korean_is_drawn():
    """Not as boxes, on a machine with no font at all; in pieces too, as a Mac names files."""
    font = report.font(18)
    box = bytes(font.getmask("\U0010fffe"))
    drawn = {bytes(font.getmask(character)) for character in "하트검색어A"}
    assert len(drawn) == 6 and box not in drawn
    assert report.wrap(unicodedata.normalize("NFD", "하트"), 18, 150, 2) == ["하트"]


@pytest.mark.parametrize(
    "text",
    [
        "하트 " * 40,
        "가나다라마바사" * 30,
        "a long_key_without_any_space" * 9,
        "two words",
        "",
        " \n\t",
    ],
)
def test_text_stays_in_its_width(text):
    lines = report.wrap(text, 12, 100, 3)
    assert len(lines) <= 3 and all(
        0 < report.font(12).getlength(line.rstrip("…")) <= 100 for line in lines
    )
    whole = "".join(lines).replace(" ", "")
    assert "".join(text.split()).startswith(whole.rstrip("…")) and whole.endswith("…") == (
        len(text) > 100
    )


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


def test_the_gallery_holds_what_metric_csv_says(dataset, tmp_path):
    scores = random_scores(dataset)
    table = table_of(dataset, scores, tmp_path)
    report.draw(Namespace(output_dir=tmp_path, gallery=True), dataset, scores)
    page = Page(tmp_path / "gallery.html")
    assert (
        page.tags.count("script") == 2
        and "b" not in page.tags
        and "i" not in page.tags
        and not page.links
    )
    pictures, queries = page.data["pictures"], page.data["queries"]
    assert [query["word"] for query in queries[:2]] == [NASTY, "하트"]
    looks = set()
    for row, query in enumerate(queries):
        rank = float(table[row]["rank"])
        assert (
            query["rank"] == (rank if np.isfinite(rank) else None)
            and query["row"] == dataset.rows.numbers[row]
        )
        expected = expected_row(dataset, row, table)
        assert query["right"] == [right for _, right in expected].index(True)
        ordered = json.loads(table[row]["sorted_candidate_resourcekey"])
        names = [page.data["candidates"][number][0] for number in query["candidates"]]
        assert names == ordered[: report.TOP] + [table[row]["resourceKey"]] * (
            len(names) > min(len(ordered), report.TOP)
        )
        by_key = dict(zip(ordered, json.loads(table[row]["sorted_score"]), strict=True))
        assert query["scores"] == [by_key.get(name) for name in names]  # eighths are exact
        looks |= {path for path, _ in expected} | {dataset.show_query(row)[1]}
    assert queries[MISSING]["rank"] is None and queries[MISSING]["scores"][-1] is None
    assert (
        len(pictures) == len({picture["image"] for picture in pictures}) == len(looks)
    )  # each once
    font = TTFont(
        io.BytesIO(base64.b64decode(re.search("data:font/woff;base64,([^)]*)", page.text)[1]))
    )
    assert {
        ord(character) for word in ("하트", "heart", "0.125") for character in word
    } <= font.getBestCmap().keys()
    sizes = {
        Image.open(io.BytesIO(base64.b64decode(picture["image"].split(",")[1]))).size
        for picture in pictures
    }
    assert sizes == {(128, 128), (80, 80)}


def test_a_task_of_texts(data, dataset, monkeypatch, tmp_path):
    """With no more than the two methods of the data set, whose pictures are then texts."""

    class Texts(RerankDataset):
        def show_query(self, row):
            return (
                "찾기",
                f"질문 {row}: what does it say of <script> in a passage that is longer than a line? "
                * 3,
            )

        def show_candidate(self, row, column):
            key, _ = super().show_candidate(row, column)
            return key, f"A passage of {key}, 문장 " * 40

    texts, scores = Texts(dataset.rows, dataset.inputs), random_scores(dataset)
    sheet = Sheet(monkeypatch, texts, scores, tmp_path)
    report.draw(Namespace(output_dir=tmp_path, gallery=True), texts, scores)
    for query in sheet.queries:
        for (x, y), text in query:
            assert isinstance(text, str)
            cell = np.asarray(sheet.image.crop((x, y, x + 150, y + report.CANDIDATE)).convert("L"))
            assert 0.05 < (cell < 128).mean() < 0.5  # written over all of it, on white
    data = Page(tmp_path / "gallery.html").data
    assert all(
        list(picture) == ["text"] and len(picture["text"]) <= report.TEXT_LIMIT + 1
        for picture in data["pictures"]
    )
    assert data["pictures"][0]["text"].startswith("질문 0: what does it say of <script>")


def test_the_curves_are_those_of_the_log(monkeypatch, tmp_path):
    lines = [
        {"step": 0, "config": {}},
        {"step": 0, "eval/loss": 2.0, "rerank/Recall@1": 0.1, "rerank/Recall@4": 0.2},
    ]
    lines += [
        {"step": 5, "train/loss": 1.5},
        {"step": 9, "train/loss": None, "eval/loss": 1.0, "rerank/Recall@1": 0.3},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures, savefig = [], Figure.savefig

    def kept(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    report.draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
    drawn = [
        {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figures[0].axes
    ]
    assert drawn == [
        {
            name: {step: value for step, value in column(lines, name).items() if value is not None}
            for name in names
        }
        for names in (("train/loss", "eval/loss"), ("rerank/Recall@1",))
    ]
    assert Image.open(tmp_path / "curves.png").size == (1100, 420)


def test_tensorboard_gets_the_picture(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    for step in (0, 500):
        save_image(tmp_path / "picture.png", np.full((30, 50 + step, 3), 7, np.uint8))
        log_picture(accelerator, "rerank/contact_sheet", tmp_path / "picture.png", step)
    accelerator.end_training()
    logged = events.EventAccumulator(str(tmp_path / "run")).Reload().Images("rerank/contact_sheet")
    assert [(image.step, image.width, image.height) for image in logged] == [
        (0, 50, 30),
        (500, 550, 30),
    ]
