"""The default data: the same bytes each time, whole or absent, with the splits and the odd rows that it promises."""

import ast
import hashlib
import itertools

import pytest
from page_data import read_csv
from PIL import Image

import sample_data
from runtime.launch import UserError

SPLITS = ("train", "eval", "test_vocabulary")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "data"
    sample_data.build(folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def rows(built):
    read = {split: read_csv(built / "csv" / f"{split}.csv") for split in SPLITS}
    for row in sum(read.values(), []):
        row["keys"] = ast.literal_eval(row["candidate_resourceKey"])
    return read


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)
    ).hexdigest()


@pytest.mark.slow
def test_the_same_bytes_on_every_run(tmp_path, monkeypatch):
    some = dict(itertools.islice(sample_data.read_icons().items(), 0, None, 8))
    monkeypatch.setattr(sample_data, "read_icons", lambda: some)
    monkeypatch.setattr(sample_data, "PAGES", {"train": 40, "eval": 5, "test_vocabulary": 5})
    for name in ("once", "again"):
        sample_data.build(tmp_path / name, progress=False)
    assert digest(tmp_path / "once") == digest(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "once"]


def test_an_interrupted_build_is_not_a_data_set(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    few = dict(itertools.islice(sample_data.read_icons().items(), 50))
    monkeypatch.setattr(sample_data, "read_icons", lambda: few)
    monkeypatch.setattr(sample_data, "compose_pages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_data.build(tmp_path / "data", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_is_never_overwritten(built):
    with pytest.raises(UserError, match="is there already"):
        sample_data.build(built)


@pytest.mark.slow
def test_words_and_elements_of_the_test_are_in_no_other_split(rows):
    usable = {split: [row for row in rows[split] if 0 < len(row["keys"]) < 400] for split in SPLITS}
    assert {split: len(of_split) for split, of_split in usable.items()} == sample_data.PAGES
    for one, other in (
        ("train", "eval"),
        ("train", "test_vocabulary"),
        ("eval", "test_vocabulary"),
    ):
        for name in ("search_word", "resourceKey", "x_image_path"):
            assert not {row[name] for row in rows[one]} & {row[name] for row in rows[other]}
        assert not {key for row in rows[one] for key in row["keys"]} & {
            key for row in rows[other] for key in row["keys"]
        }


@pytest.mark.slow
def test_one_candidate_has_the_style_of_the_page_and_the_word(rows):
    for row in rows["test_vocabulary"]:
        style = row["resourceKey"].split("_")[0]
        if row["keys"]:
            assert [key for key in row["keys"] if key.split("_")[0] == style] == [
                row["resourceKey"]
            ]
        if 0 < len(row["keys"]) < 400:
            assert all(row["search_word"] in key.split("_")[1].split("-") for key in row["keys"])


@pytest.mark.slow
def test_odd_rows(rows):
    for split in SPLITS:
        assert sum(not row["keys"] for row in rows[split]) == sample_data.ODD_ROWS
        assert sum(len(row["keys"]) >= 400 for row in rows[split]) == sample_data.ODD_ROWS


@pytest.mark.slow
def test_images(built, rows):
    modes = {Image.open(path).mode for path in (built / "elements").iterdir()}
    assert modes == {"L", "LA"}  # half of them are transparent
    for row in rows["eval"][:50]:
        page = Image.open(built / "images" / f"{row['x_image_path']}.png").convert("L")
        assert page.crop(ast.literal_eval(row["y_info"])).getextrema() == (
            255,
            255,
        )  # the removed element is gone
        assert list(page.size) == ast.literal_eval(row["x_info"]) and page.getextrema()[0] < 100
