"""What an evaluation leaves to look at: the files agree with the scores and with each other."""

import json
import sys
import unicodedata
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
from conftest import column
from matplotlib.figure import Figure
from page_data import read_csv, save_image, write_csv, write_data
from PIL import Image, ImageColor, ImageFont
from transformers import EvalPrediction

import metrics
import report
from data import read_datasets
from model import DualEncoderConfig
from runtime.launch import UserError

NASTY = '</script><b>"it\'s" & 하트\\u003c'
MISSING = [5, 11]  # rows whose relevant element is not among their candidates
DRAWN_WITH = (report.font, report.advance, report.small, report.say)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return read_rerank(write_hard_data(tmp_path_factory.mktemp("report") / "data"))


def write_hard_data(folder):
    """Words, keys and lists that are hard to show: 40 candidates, two elements of one file."""
    write_data(folder, elements=40)
    path = folder / "csv" / "test_vocabulary.csv"
    table = read_csv(path)
    for grey, key in enumerate(('a "quoted" key', "it's <i>")):
        save_image(folder / "elements" / f"{key}.png", np.full((20, 50, 3), 100 * grey, np.uint8))
    (folder / "elements" / "again.png").symlink_to('a "quoted" key.png')
    keys = [table[0]["resourceKey"], 'a "quoted" key', "again"]
    table[0] |= {"search_word": NASTY, "candidate_resourceKey": json.dumps(keys)}
    table[1] |= {"search_word": unicodedata.normalize("NFD", "하트"), "resourceKey": "it's <i>"}
    table[1]["candidate_resourceKey"] = '["it\'s <i>"]'
    everything = [f"요소 {n}" if n % 5 == 0 else f"element_{n}" for n in range(40)]
    table[3] |= {"search_word": "", "candidate_resourceKey": json.dumps(everything)}
    for row in MISSING:
        others = [key for key in everything if key != table[row]["resourceKey"]]
        table[row]["candidate_resourceKey"] = json.dumps(others[:12])
    table[6] |= {"search_word": "NA", "template_idx": "007"}  # pandas would make others of them
    write_csv(path, [row.values() for row in table])
    return folder


def read_rerank(data_dir):
    config = Namespace(data_dir=data_dir, max_candidates=400, num_negatives=3, seed=0)
    return read_datasets(config, Namespace(config=DualEncoderConfig()), ("test_vocabulary",))[0]


def predict(dataset, seed=0, step=8):
    """Random scores with ties, padded."""
    lengths = np.array([len(dataset.keys_of(row)) for row in range(len(dataset.labels))])
    shape = len(lengths), lengths.max()
    scores = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.float32) / step
    return with_scores(dataset, np.where(np.arange(shape[1]) < lengths[:, None], scores, -np.inf))


def with_scores(dataset, scores):
    return EvalPrediction(
        predictions=np.asarray(scores, np.float32),
        label_ids=dataset.labels,
        inputs=dataset.positions,
    )


class Sheet:
    """The contact sheet of a prediction, and what was drawn on it: [query, candidates...] each as
    (corner, picture, whether it is framed)."""

    def __init__(self, monkeypatch, dataset, prediction, folder):
        drawn, draw_picture = [], report.draw_picture

        def watched(sheet, x, y, picture, width, height, framed=False):
            if height == report.QUERY:
                drawn.append([])
            drawn[-1].append(((x, y), picture, framed))
            draw_picture(sheet, x, y, picture, width, height, framed)

        with monkeypatch.context() as patch:
            patch.setattr(report, "draw_picture", watched)
            report.write(folder, dataset, prediction)
        self.image, self.queries = Image.open(folder / "contact_sheet.png"), drawn

    def has_frame(self, corner):
        x, y = corner
        return self.image.getpixel((x - 3, y + 20)) == ImageColor.getrgb(report.RIGHT)


def expected_candidates(dataset, line):
    """[(picture, is it the relevant one)] of what a query must show, by its line of metric.csv."""
    keys, relevant = json.loads(line["sorted_candidate_resourcekey"]), line["resourceKey"]
    keys = keys[: report.TOP] + [relevant] * (relevant not in keys[: report.TOP])
    elements = dataset.data_dir / "elements"
    return [((elements / f"{key}.png").resolve(), key == relevant) for key in keys]


@pytest.fixture
def hidden(monkeypatch):
    """Hides modules, as if they were not installed."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    for made in DRAWN_WITH:
        made.cache_clear()
    yield hide
    for made in DRAWN_WITH:
        made.cache_clear()


def test_metric_csv_in_pandas(dataset, tmp_path):
    prediction = predict(dataset, step=7)
    report.write(tmp_path, dataset, prediction)
    copied = dict.fromkeys(report.COPIED, str)
    table = pd.read_csv(tmp_path / "metric.csv", dtype=copied, keep_default_na=False)
    source = read_csv(dataset.path)
    for name in report.COPIED:
        assert table[name].tolist() == [line[name] for line in source]
    for row, scores in enumerate(prediction.predictions):
        keys, line = dataset.keys_of(row), table.loc[row]
        assert json.loads(line["candidate_resourceKey"]) == keys
        assert np.array_equal(np.float32(json.loads(line["score"])), scores[np.isfinite(scores)])
        ordered = json.loads(line["sorted_candidate_resourcekey"])
        score_of = dict(zip(keys, json.loads(line["score"]), strict=True))
        assert sorted(ordered) == sorted(keys)
        assert json.loads(line["sorted_score"]) == [score_of[key] for key in ordered]
        if row not in MISSING:
            assert ordered.index(line["resourceKey"]) + 1 == line["rank"]
    expected = metrics.compute_metrics(prediction)
    assert list(table)[-len(expected) :] == list(expected)
    assert {name: table[name].mean() for name in expected} == pytest.approx(expected, abs=1e-12)
    assert np.flatnonzero(np.isinf(table["rank"])).tolist() == MISSING


def test_the_bytes_of_metric_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "TOP_K", (1, 4))
    data_dir = write_data(tmp_path / "data", test=2)
    path = data_dir / "csv" / "test_vocabulary.csv"
    rows = [
        ["하트, a", "007", 1, "test_vocabulary 0", "요소 0", ["요소 0", "element_1", "element_2"]]
    ]
    rows += [["", "NA", 1, "test_vocabulary 1", "element_3", ["element_1"]]]
    write_csv(path, [[*row, "", ""] for row in rows])
    dataset = read_rerank(data_dir)
    scores = [[1 / 3, 1e-5, np.nextafter(np.float32(1), 2)], [-2, -np.inf, -np.inf]]
    report.write(tmp_path, dataset, with_scores(dataset, scores))
    assert (tmp_path / "metric.csv").read_bytes().decode().split("\r\n") == [
        "search_word,template_idx,page_num,x_image_path,resourceKey,candidate_resourceKey,score,"
        "sorted_score,sorted_candidate_resourcekey,rank,Recall@1,Recall@4,MRR@1,MRR@4",
        '"하트, a",007,1,test_vocabulary 0,요소 0,"[""요소 0"", ""element_1"", ""element_2""]",'
        '"[0.33333334, 1e-05, 1.0000001]","[1.0000001, 0.33333334, 1e-05]",'
        '"[""element_2"", ""요소 0"", ""element_1""]",2,0,1,0,0.5',
        ',NA,1,test_vocabulary 1,element_3,"[""element_1""]",[-2.0],[-2.0],"[""element_1""]",'
        "inf,0,0,0,0",
        "",
    ]


def test_a_metric_is_added_in_one_place(dataset, monkeypatch, tmp_path):
    measure = metrics.measure_queries

    def with_thirds(prediction):
        return measure(prediction) | {"thirds": np.arange(len(prediction.label_ids)) / 3}

    monkeypatch.setattr(metrics, "measure_queries", with_thirds)
    report.write(tmp_path, dataset, predict(dataset))
    table = read_csv(tmp_path / "metric.csv")
    assert list(table[0])[-1] == "thirds"
    assert [float(line["thirds"]) for line in table] == [row / 3 for row in range(17)]


def test_lines_do_not_depend_on_the_blocks(dataset, monkeypatch, tmp_path):
    written = []
    for block in (256, 17, 5, 1):
        monkeypatch.setattr(report, "BLOCK", block)
        report.write(tmp_path, dataset, predict(dataset))
        written.append((tmp_path / "metric.csv").read_bytes())
    assert len(set(written)) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_are_copied_from_the_rows_that_were_read(end, tmp_path):
    """pandas finds the same rows as the csv module, whatever a spreadsheet has put between them."""
    data_dir = write_data(tmp_path / "data", test=6)
    path = data_dir / "csv" / "test_vocabulary.csv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    words = ['"two\nlines"', '"a\rreturn"', '"a ""quote"", a comma"', '"\r\n"', "  spaces\t", '""']
    lines = [word + line[line.index(",") :] for word, line in zip(words, lines, strict=True)]
    left_out = "left out,,,,,,,"
    lines = [header, "", left_out, *lines[:2], "", "", lines[2], left_out, *lines[3:], ""]
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    dataset = read_rerank(data_dir)
    report.write(tmp_path, dataset, predict(dataset))
    assert dataset.positions.tolist() == [1, 2, 3, 5, 6, 7]
    table = pd.read_csv(tmp_path / "metric.csv", dtype=str, keep_default_na=False)
    expected = ["two\nlines", "a\rreturn", 'a "quote", a comma', "\r\n", "  spaces\t", ""]
    assert table["search_word"].tolist() == expected
    assert table["x_image_path"].tolist() == [f"test_vocabulary {row}" for row in range(6)]


@pytest.mark.parametrize("change", ["another order", "fewer rows", "no column", "not text", "gone"])
def test_a_file_that_has_changed_is_refused(change, tmp_path):
    dataset = read_rerank(write_data(tmp_path / "data"))
    header, *lines = dataset.path.read_text(encoding="utf-8").splitlines()
    changed = {
        "another order": [header, lines[1], lines[0], *lines[2:]],
        "fewer rows": [header, *lines[:-1]],
        "no column": [header.replace("page_num", "page"), *lines],
        "not text": [header, "\udcff", *lines],
    }
    if change == "gone":
        dataset.path.unlink()
    else:
        text = "\n".join(changed[change])
        dataset.path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="test_vocabulary.csv has changed since it was read"):
        report.write(tmp_path, dataset, predict(dataset))
    assert not (tmp_path / "metric.csv").exists()


def test_the_contact_sheet_shows_what_metric_csv_says(dataset, monkeypatch, tmp_path):
    sheet = Sheet(monkeypatch, dataset, predict(dataset), tmp_path)
    table = read_csv(tmp_path / "metric.csv")
    ranks = np.array([float(line["rank"]) for line in table])
    misses = np.flatnonzero((ranks > 1) & np.isfinite(ranks))
    worst = sorted(misses.tolist(), key=lambda row: -ranks[row])[: report.WORST]
    pages = [report.show_query(dataset.data_dir, line)[1] for line in table]
    rows = [pages.index(query[0][1]) for query in sheet.queries]
    assert rows[report.SAMPLE :] == worst
    assert len(set(rows[: report.SAMPLE])) == report.SAMPLE and set(MISSING) & set(rows)
    for row, (_, *candidates) in zip(rows, sheet.queries, strict=True):
        shown = [(picture, framed) for _, picture, framed in candidates]
        assert shown == expected_candidates(dataset, table[row])
        corners = np.array([corner for corner, _, _ in candidates])
        assert [sheet.has_frame(corner) for corner in corners] == [framed for _, framed in shown]
        assert (np.diff(corners[:, 0]) >= report.CANDIDATE).all() and (corners >= 0).all()
        assert (corners + report.CANDIDATE + 20 <= sheet.image.size).all()  # nothing is cut off


def test_the_sample_is_the_same_whatever_the_scores(dataset, monkeypatch, tmp_path):
    samples = []
    for seed in range(3):
        sheet = Sheet(monkeypatch, dataset, predict(dataset, seed), tmp_path)
        samples.append([query[0] for query in sheet.queries[: report.SAMPLE]])
    assert samples[0] == samples[1] == samples[2]


def test_a_model_without_misses(dataset, monkeypatch, tmp_path):
    scores = np.where(np.isinf(predict(dataset).predictions), -np.inf, 0)
    found = np.flatnonzero(dataset.labels >= 0)
    scores[found, dataset.labels[found]] = 1
    sheet = Sheet(monkeypatch, dataset, with_scores(dataset, scores), tmp_path)
    assert len(sheet.queries) == report.SAMPLE


def test_the_numbers_are_rows_of_metric_csv(monkeypatch, tmp_path):
    """As a spreadsheet shows it, so rows that are left out of the data do not count."""
    written, put = [], report.put

    def watched(sheet, x, y, text, *arguments, **options):
        written.append(text)
        put(sheet, x, y, text, *arguments, **options)

    monkeypatch.setattr(report, "put", watched)
    data_dir = write_hard_data(tmp_path / "data")
    path = data_dir / "csv" / "test_vocabulary.csv"
    lines = read_csv(path)
    lines[0]["candidate_resourceKey"] = lines[2]["candidate_resourceKey"] = "[]"
    write_csv(path, [line.values() for line in lines])
    dataset = read_rerank(data_dir)
    report.write(tmp_path, dataset, predict(dataset))
    table = read_csv(tmp_path / "metric.csv")
    numbers = [int(text.removeprefix("row ")) for text in written if text.startswith("row ")]
    assert min(numbers) == 2 and max(numbers) <= len(table) + 1 == 16
    ranks = [text for text in written if text.startswith(("rank ", "not among"))]
    for number, rank in zip(numbers, ranks, strict=True):
        line = table[number - 2]
        count = len(json.loads(line["score"]))
        missing = line["rank"] == "inf"
        assert rank == f"not among the {count}" if missing else f"rank {line['rank']} of {count}"


def test_the_order_is_that_of_the_ranks():
    random = np.random.default_rng(0)
    for _ in range(200):
        scores = random.integers(0, 4, random.integers(1, 9)).astype(np.float32)
        label = random.integers(len(scores))
        order = report.best_first(scores, label).tolist()
        assert sorted(order) == list(range(len(scores))) and (np.diff(scores[order]) <= 0).all()
        assert order.index(label) + 1 == metrics.ranks_of_relevant(scores[None], [label])[0]


def test_korean_is_drawn():
    """Not as boxes, on a machine with no font at all; in pieces too, as a Mac names files."""
    font = report.font(18)
    box = bytes(font.getmask("\U0010fffe"))
    drawn = {bytes(font.getmask(character)) for character in "하트검색어A"}
    assert len(drawn) == 6 and box not in drawn
    assert report.wrap(unicodedata.normalize("NFD", "하트"), 18, 150, 2) == ["하트"]


@pytest.mark.parametrize("installed", ["NanumGothic.ttf", "NotoSansCJK-Regular.ttc", None])
def test_without_the_font_package(installed, dataset, hidden, monkeypatch, tmp_path):
    """A Korean font of the system is taken, else Pillow's own, and the sheet is drawn."""
    if installed:
        fonts = tmp_path / "share" / "fonts" / "some folder"
        fonts.mkdir(parents=True)
        (fonts / installed).symlink_to(report.packaged_font())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "platform", "linux")
    hidden("pylopdf_fonts_ko")
    expected = "Noto Sans KR" if installed else ImageFont.load_default(18).getname()[0]
    assert report.font(18).getname()[0] == expected
    report.write(tmp_path, dataset, predict(dataset))
    assert (tmp_path / "contact_sheet.png").exists()


def test_without_pillow(dataset, hidden, capsys, tmp_path):
    hidden("PIL")
    for _ in range(2):
        report.write(tmp_path, dataset, predict(dataset))
    assert [path.name for path in tmp_path.iterdir()] == ["metric.csv"]
    assert capsys.readouterr().out == "contact_sheet.png is left out: pip install pillow\n"


def test_without_matplotlib(hidden, capsys, tmp_path):
    hidden("matplotlib", "matplotlib.figure")
    (tmp_path / "log.jsonl").write_text('{"step": 0, "config": {}}\n{"step": 1, "a/loss": 1}\n')
    report.draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert capsys.readouterr().out == "curves.png is left out: pip install matplotlib\n"


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
    assert len(lines) <= 3
    assert all(0 < report.font(12).getlength(line.rstrip("…")) <= 100 for line in lines)
    whole = "".join(lines).replace(" ", "")
    assert "".join(text.split()).startswith(whole.rstrip("…"))
    assert whole.endswith("…") == (len(text) > 100)


def test_a_task_of_texts(dataset, monkeypatch, tmp_path):
    """Two functions are edited, and pictures are texts."""
    show_texts(monkeypatch)
    sheet = Sheet(monkeypatch, dataset, predict(dataset), tmp_path)
    for query in sheet.queries:
        for (x, y), text, _ in query:
            assert isinstance(text, str)
            cell = np.asarray(sheet.image.crop((x, y, x + 150, y + report.CANDIDATE)).convert("L"))
            assert 0.05 < (cell < 128).mean() < 0.5  # written over all of it, on white


def show_texts(monkeypatch):
    def show_query(data_dir, row):
        sentence = "what does it say of <script> in a passage that is longer than a line? " * 3
        return "찾기", f"질문 {row['page_num']} {row['x_image_path']}: {sentence}"

    def show_candidate(data_dir, key):
        return f"A passage of {key}, 문장 " * 40

    monkeypatch.setattr(report, "show_query", show_query)
    monkeypatch.setattr(report, "show_candidate", show_candidate)


def test_the_curves_are_those_of_the_log(monkeypatch, tmp_path):
    """All losses; of each evaluation the first and the last metric."""
    lines = [
        {"step": 0, "config": {"loss": 3, "a/loss": None}, "run_id": "12e4", "git_commit": None},
        {
            "step": 0,
            "eval/m": 0.1,
            "eval/loss": 2.0,
            "rerank/a": 0.1,
            "rerank/b": 0.2,
            "rerank/c": 0.3,
        },
        {"step": 5, "train/loss": 1.5, "train/grad_norm": 7.0, "train/learning_rate": 0.1},
        {"step": 9, "train/loss": None, "eval/loss": 1.0, "rerank/a": 0.1 + 0.2, "rerank/c": None},
        {"step": 9, "second/loss": -1.0, "second/b": 0.5},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures, savefig = [], Figure.savefig

    def kept(figure, path, **options):
        assert path.name != "curves.png"
        figures.append(figure)
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    report.draw_curves(tmp_path / "curves.png", log)
    drawn = [
        {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figures[0].axes
    ]
    expected = [
        ["eval/loss", "train/loss", "second/loss"],
        ["eval/m", "rerank/a", "rerank/c", "second/b"],
    ]
    assert drawn == [
        {
            name: {step: value for step, value in column(lines, name).items() if value is not None}
            for name in names
        }
        for names in expected
    ]
    assert figures[0].axes[0].get_ylim()[0] <= -1 and figures[0].axes[1].get_ylim()[0] == 0
    assert Image.open(tmp_path / "curves.png").size == (1100, 420)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


def test_the_curves_of_a_run_without_values(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "config": {}}\n')
    report.draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
    assert (tmp_path / "curves.png").exists()
