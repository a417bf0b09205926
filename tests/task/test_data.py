"""The CSV and image contract: what is accepted comes out right, what is not is one clear error before any training."""

import ast
import hashlib
import io
import itertools
import json
import os
import re
import struct
import zlib
from argparse import Namespace
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from page_data import COLUMNS, read_csv, read_table, write_csv, write_data
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import decode_image, parse_literal, read_datasets
from runtime.batches import Key, TrainSampler, evaluation_batches, whole
from runtime.launch import UserError

MODEL = Namespace(config=Namespace(page_size=64, element_size=32))


def read_all(data_dir, **options):
    config = Namespace(
        **{"data_dir": data_dir, "max_candidates": 400, "num_negatives": 3, "seed": 0} | options
    )
    return read_datasets(config, MODEL, ("train", "eval", "test_vocabulary"))


def read(data_dir, split, max_candidates=400):
    """(the table of one CSV, the candidates of each of its rows: lists of keys)"""
    elements = {}
    table = read_table(data_dir / "csv" / f"{split}.csv", max_candidates, {}, elements)
    keys = list(elements)
    rows = range(len(table.positions))
    return table, [[keys[element] for element in table.candidates(row)] for row in rows]


def change(data_dir, split, row, **cells):
    """Change cells of one row, 2 being the first after the header, as a spreadsheet counts."""
    path = data_dir / "csv" / f"{split}.csv"
    rows = read_csv(path)
    rows[row - 2].update(cells)
    write_csv(path, [list(r.values()) for r in rows])


def refusal(data_dir, **options):
    with pytest.raises(UserError) as error:
        read_all(data_dir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is accepted


def test_rows_are_left_out_and_counted(data_dir):
    change(data_dir, "train", 2, candidate_resourceKey="")
    change(data_dir, "train", 3, candidate_resourceKey="[]")
    change(data_dir, "train", 4, candidate_resourceKey=str(["absent"] * 400))
    change(data_dir, "train", 5, candidate_resourceKey=str(["element_1"] * 399 + ["element_2"]))
    table, _ = read(data_dir, "train")
    left_out = {"no_candidates": 2, "too_many_candidates": 2}
    odd = {"relevant_missing": 0, "relevant_alone": 0}
    assert table.counts == {"used": 37, **left_out, **odd}
    assert table.numbers[0] == 6 and table.name_row(0).endswith("train.csv, row 6")
    assert len(read(data_dir, "train", 401)[1]) == 39


def test_positions_are_those_of_pandas(data_dir):
    """Records are counted: those left out too, blank lines not."""
    change(data_dir, "train", 3, candidate_resourceKey="")
    change(data_dir, "train", 5, candidate_resourceKey=str(["element_1"] * 400))
    change(data_dir, "train", 6, search_word="two\nlines")
    path = data_dir / "csv" / "train.csv"
    lines = path.read_bytes().split(b"\r\n")
    lines[10:10] = [b""] * 3
    path.write_bytes(b"\r\n".join([*lines, b"", b""]))
    train, _, _ = read_all(data_dir)
    frame = pandas.read_csv(path)
    used = frame.iloc[train.positions]
    assert train.positions.tolist() == [0, 2, *range(4, 41)] and len(frame) == 41
    assert used["x_image_path"].tolist() == [train.pages.keys[i] for i in train.table.queries]
    assert used["resourceKey"].tolist() == [train.elements.keys[i] for i in train.table.relevant]
    # Messages count as a spreadsheet does: the header is row 1, and blank lines count.
    numbers = [int(train.name_row(row).rpartition(" ")[2]) for row in range(len(train))]
    assert numbers == [position + 2 + 3 * (position >= 9) for position in train.positions]


def test_keys_are_read_from_json_and_from_python_literals(data_dir):
    keys = ["요소 0", "element_1", 'with "quotes"', "it's", "back\\slash", "with space ", "123"]
    for text in (
        str(keys),
        json.dumps(keys),
        json.dumps(keys, ensure_ascii=False),
        str(tuple(keys)),
        f" {keys}\n",
    ):
        change(data_dir, "eval", 2, candidate_resourceKey=text)
        assert read(data_dir, "eval")[1][0] == keys
    change(data_dir, "eval", 2, candidate_resourceKey="[1, '1', 'a', 'a']")
    assert read(data_dir, "eval")[1][0] == ["1", "a"]


def test_the_same_text_in_two_columns_is_read_as_each_needs(data_dir):
    change(data_dir, "eval", 2, candidate_resourceKey="[64, 64]", x_info="[64, 64]")
    change(data_dir, "eval", 3, candidate_resourceKey="", x_info="")
    table, candidates = read(data_dir, "eval")
    assert candidates[0] == ["64"] and table.counts["no_candidates"] == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_foreign_files(data_dir, encoding, line_end):
    path = data_dir / "csv" / "train.csv"
    expected, expected_cells = read(data_dir, "train"), list(data.read_csv(path, data.COLUMNS))
    text = path.read_bytes().decode().replace("\r\n", line_end)
    path.write_bytes(text.encode(encoding))
    got = read(data_dir, "train")
    assert got[1] == expected[1] and got[0].counts == expected[0].counts
    cells = list(data.read_csv(path, data.COLUMNS))
    assert cells == expected_cells and cells[1][1]["search_word"] == "하트"


def opaque(mode, size):
    colors = {
        "L": 100,
        "RGB": (10, 200, 30),
        "CMYK": (0, 255, 255, 0),
        "1": 1,
        "P": 3,
        "I;16": 100 * 257,
    }
    image = Image.new(mode, size, colors[mode])
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [200, 100, 50] + [0, 0, 0] * 252)
    return image


@pytest.mark.parametrize(
    ("mode", "file_format", "expected"),
    [
        ("L", "PNG", (100, 100, 100)),
        ("RGB", "PNG", (10, 200, 30)),
        ("1", "PNG", (255, 255, 255)),
        ("P", "PNG", (200, 100, 50)),
        ("I;16", "PNG", (100, 100, 100)),
        ("CMYK", "TIFF", (255, 0, 0)),
        ("CMYK", "JPEG", (255, 0, 0)),
        ("RGB", "WEBP", (10, 200, 30)),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (50, 50), (301, 301)])
def test_images_of_any_mode_and_size(tmp_path, mode, file_format, expected, size):
    opaque(mode, size).save(tmp_path / "x.png", format=file_format)
    pixels = decode_image(tmp_path / "x.png", 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    assert (
        pixels.float() - torch.tensor(expected)[:, None, None]
    ).abs().max() <= 6  # what JPEG and WebP lose


def test_proportions_are_kept_on_white(tmp_path):
    Image.new("RGB", (80, 40), "black").save(tmp_path / "x.png")
    pixels = decode_image(tmp_path / "x.png", 32)
    assert (
        (pixels[:, :8] == 255).all()
        and (pixels[:, 8:24] == 0).all()
        and (pixels[:, 24:] == 255).all()
    )


@pytest.mark.parametrize("size", [(400, 3), (3, 400)])
def test_a_thin_line_keeps_a_pixel(tmp_path, size):
    Image.new("RGB", size, "black").save(tmp_path / "x.png")
    assert (decode_image(tmp_path / "x.png", 32) == 0).sum() == 3 * 32


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255) if mode != "LA" else (0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(tmp_path / "x.png")
    pixels = decode_image(tmp_path / "x.png", 32)
    assert (pixels[:, :, 16:] == 255).all()
    assert pixels[:, 0, 0].tolist() == ([0, 0, 0] if mode == "LA" else [255, 0, 0])


def test_grey_of_16_bits_with_a_transparent_one(tmp_path):
    pixels = np.full((32, 32), 100 * 257, dtype=np.uint16)
    pixels[:, 16:] = 7
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=7)
    decoded = decode_image(tmp_path / "x.png", 32)
    assert (decoded[:, :, :16] == 100).all() and (decoded[:, :, 16:] == 255).all()


def test_folders_may_be_links_and_keys_may_be_paths(data_dir, tmp_path):
    os.rename(data_dir / "elements", tmp_path / "elsewhere")
    (data_dir / "elements").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "sub" / "a.b.png")
    change(data_dir, "eval", 2, candidate_resourceKey="['sub/a.b']", resourceKey="sub/a.b")
    read_all(data_dir)


# ---- what is refused


@pytest.mark.parametrize("name", COLUMNS)
def test_missing_column(data_dir, name):
    path = data_dir / "csv" / "eval.csv"
    kept = [column for column in COLUMNS if column != name]
    write_csv(path, [[row[column] for column in kept] for row in read_csv(path)], kept)
    assert "eval.csv" in refusal(data_dir) and name in refusal(data_dir)


def test_a_column_that_is_there_twice(data_dir):
    path = data_dir / "csv" / "eval.csv"
    rows = [[*row.values(), "more"] for row in read_csv(path)]
    write_csv(path, rows, [*COLUMNS, "resourceKey"])
    assert "eval.csv: a column is there twice" in refusal(data_dir)
    write_csv(path, rows, [*COLUMNS, "another one"])
    read_all(data_dir)


def test_missing_file(data_dir):
    (data_dir / "csv" / "test_vocabulary.csv").unlink()
    assert "test_vocabulary.csv: cannot be read: No such file" in refusal(data_dir)


@pytest.mark.parametrize(
    "cell",
    [
        "[",
        "['a'",
        "{'a': 1}",
        "3",
        "['a', 2.5]",
        "[['a']]",
        "nan",
        "[1,]]",
        "(" * 5000,
        "[" * 200_000,
    ],
)
def test_unparsable_cell(data_dir, cell):
    change(data_dir, "train", 7, candidate_resourceKey=cell)
    message = refusal(data_dir)
    assert (
        "train.csv, row 7, column candidate_resourceKey" in message
        and cell[:20] in message
        and len(message) < 400
    )


def test_cell_that_is_code(data_dir, tmp_path):
    for cell in (
        f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()",
        "[x for x in ()]",
        "'a' * 10**9",
        "exit()",
    ):
        for column in ("candidate_resourceKey", "x_info", "y_info"):
            with pytest.raises(ValueError, match="expected"):
                parse_literal(cell)
            change(data_dir, "eval", 5, **{column: cell})
            assert f"eval.csv, row 5, column {column}" in refusal(data_dir)
            change(data_dir, "eval", 5, **{column: "[]"})
    assert not (tmp_path / "ran").exists()


def test_cell_above_the_limit(data_dir):
    change(data_dir, "eval", 4, x_info="[" + "1," * 500_001 + "]")
    assert "eval.csv, after row 3" in refusal(
        data_dir
    ) and "field larger than field limit" in refusal(data_dir)


def test_not_utf8_and_ragged(data_dir):
    path = data_dir / "csv" / "eval.csv"
    good = path.read_bytes()
    path.write_bytes(good.decode().encode("cp949"))
    assert "eval.csv" in refusal(data_dir) and "UTF-8" in refusal(data_dir)
    path.write_bytes(good + b"heart,1\r\n")
    assert "eval.csv, row 15: 2 cells under 8 columns" in refusal(data_dir)
    path.write_bytes(b"")
    assert "columns" in refusal(data_dir)


@pytest.mark.parametrize(
    "key", ["../../../etc/passwd", "/etc/passwd", "..", "../images/eval 0", "a\0b", "absent", ""]
)
def test_key_without_an_image_inside_the_folder(data_dir, key):
    change(data_dir, "eval", 6, candidate_resourceKey=json.dumps([key]))
    message = refusal(data_dir)
    assert "eval.csv, row 6" in message
    reasons = ("No such file", "Not a directory", "points outside", "embedded null byte")
    assert any(reason in message for reason in reasons)
    if key == "../images/eval 0":
        assert "points outside" in message


def test_link_that_leaves_the_folder(data_dir, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (data_dir / "elements" / "link.png").symlink_to(tmp_path / "secret.png")
    change(data_dir, "eval", 6, resourceKey="link")
    assert "'link' points outside" in refusal(data_dir)


def saved(image, file_format):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def enormous_png(width, height):
    """A few bytes that claim to be width x height."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_images_that_cannot_be_used(data_dir):
    """Found before training."""
    path = data_dir / "elements" / "element_1.png"
    good = path.read_bytes()
    broken = {
        "truncated": good[: len(good) // 2],
        "enormous": enormous_png(20_000, 20_000),
        "bomb": enormous_png(99_999, 99_999),
    }
    broken |= {f"32 bits, {mode}": saved(Image.new(mode, (9, 9)), "TIFF") for mode in ("I", "F")}
    broken |= {
        "empty": b"",
        "text": b"not an image",
        "flipped": good[:600] + bytes([good[600] ^ 1]) + good[601:],
    }
    for content in broken.values():
        path.write_bytes(content)
        message = refusal(data_dir)
        assert "element_1.png" in message and "train.csv, row" in message
    path.unlink()
    path.mkdir()
    assert "element_1.png" in refusal(data_dir)


@pytest.mark.slow
def test_of_several_that_are_broken_the_first_is_named(tmp_path, monkeypatch):
    """By whichever of the workers meets it."""
    data_dir = write_data(tmp_path / "many", train=2100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for row in (1998, 1400, 1402):
        (data_dir / "images" / f"train {row}.png").unlink()
    message = refusal(data_dir)
    assert re.search(
        r"'train 1400.png': No such file or directory \(named by \S*train.csv, row 1402\)$", message
    )
    assert not list(data_dir.glob(".data-cache-*/*images*/*"))


def test_nothing_left(data_dir):
    assert "no row is left to use" in refusal(data_dir, max_candidates=1)


# ---- what a batch is


def test_the_second_launch_parses_and_decodes_nothing(data_dir, monkeypatch):
    first = read_all(data_dir)
    for images, name in ((first[0].pages, "images"), (first[0].elements, "elements")):
        for number, key in enumerate(images.keys):
            expected = decode_image(data_dir / name / f"{key}.png", images.size)
            assert torch.equal(images.take(np.array([number]))[0], expected)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_table", None)
        patch.setattr(data, "decode_image", None)
        second = read_all(data_dir)
        assert data.fingerprint(second) == data.fingerprint(first)
        for one, other in zip(first, second, strict=True):
            assert one.counts == other.counts and one.name_row(3) == other.name_row(3)
            for index in range(len(one)):
                a, b = (dataset.__getitems__([Key(index)]) for dataset in (one, other))
                assert all(torch.equal(a[name], b[name]) for name in a)
        patch.setattr(data, "CODE", "edited")
        with pytest.raises(TypeError):
            read_all(data_dir)


def test_what_changes_is_read_anew(data_dir):
    path = data_dir / "images" / "train 3.png"

    def read_page(key="train 3"):
        train, _, _ = read_all(data_dir)
        pixels = train.pages.take([list(train.pages.keys).index(key)])[0]
        assert torch.equal(pixels, decode_image(data_dir / "images" / f"{key}.png", 64))
        return data.fingerprint([train])

    fingerprint, size = read_page(), path.stat().st_size
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert read_page() == fingerprint
    os.utime(path, ns=(5, 5))  # a copy of the data has other times, and a run may resume there
    assert read_page() == fingerprint
    path.write_bytes(path.read_bytes() + b"\0")
    assert read_page() != fingerprint
    fingerprint = read_page()
    change(data_dir, "train", 5, x_image_path="train 4")
    assert read_page("train 4") != fingerprint
    (data_dir / "images" / "train 4.png").unlink()
    assert "'train 4.png': No such file or directory (named by" in refusal(data_dir)
    assert refusal(data_dir).endswith("train.csv, row 5)")


def test_a_row_is_its_relevant_element_and_drawn_others(data_dir):
    train, _, _ = read_all(data_dir)
    keys = train.elements.keys
    for row, written in enumerate(read_csv(train.path)):
        listed = ast.literal_eval(written["candidate_resourceKey"])
        relevant = written["resourceKey"]
        item = {name: values[0] for name, values in train.__getitems__([Key(row, epoch=1)]).items()}
        shown = [decode_image(data_dir / "elements" / f"{key}.png", 32) for key in keys]
        found = [
            next(key for key, image in zip(keys, shown, strict=True) if torch.equal(image, c))
            for c in item["candidates"]
        ]
        real = [key for key, there in zip(found, item["candidate_mask"], strict=True) if there]
        assert (
            real[0] == relevant
            and len(real) == len(set(real)) == min(4, len(listed))
            and set(real) <= set(listed)
        )
        assert item["candidates"].dtype == torch.uint8


def test_the_draw_depends_on_seed_epoch_and_row_alone(data_dir):
    def draws(dataset, epoch):
        return dataset.__getitems__([Key(row, epoch) for row in range(len(dataset))])["candidates"]

    train, _, _ = read_all(data_dir)
    again, _, _ = read_all(data_dir)
    other_seed, _, _ = read_all(data_dir, seed=1)
    assert torch.equal(draws(train, 3), draws(again, 3))
    assert not torch.equal(draws(train, 3), draws(train, 4))
    assert not torch.equal(draws(train, 3), draws(other_seed, 3))

    path = data_dir / "csv" / "train.csv"
    rows = [list(row.values()) for row in read_csv(path)]
    write_csv(path, rows[:20])
    fewer, _, _ = read_all(data_dir)
    assert torch.equal(draws(fewer, 3), draws(train, 3)[:20])


def test_the_draw_has_the_bits_that_it_always_had(data_dir):
    """Else a run that began before an upgrade resumes with other negatives."""
    train, _, _ = read_all(data_dir)
    drawn = [train.draw(np.arange(len(train)), epoch) for epoch in (0, 1)]  # (B, 1 + k) each
    digest = hashlib.sha256(np.stack(drawn).astype("<i8").tobytes()).hexdigest()
    assert digest == "a7abf3960fee4f07d82c558900f83ff8fef2aa82e856ed69c8c0edae6c321d0c"
    for epoch in (0, 1):  # whatever the rows of a batch and their order
        rows = np.array([40, 3, 17, 3])
        assert (train.draw(rows, epoch) == drawn[epoch][rows]).all()


def test_rows_of_fewer_candidates_than_are_drawn(data_dir):
    """All of them are given, and no more: not one row has as many as --num_negatives."""
    path = data_dir / "csv" / "train.csv"
    rows = [
        row for row in read_csv(path) if len(ast.literal_eval(row["candidate_resourceKey"])) < 5
    ]
    write_csv(path, [list(row.values()) for row in rows])
    train, _, _ = read_all(data_dir, num_negatives=7)
    keys = [Key(row) for row in reversed(range(len(train)))]
    shown = train.__getitems__(keys)["candidate_mask"].sum(1)
    counts = [len(ast.literal_eval(row["candidate_resourceKey"])) for row in rows]
    assert shown.tolist() == counts[::-1] and train.num_negatives == 3 == max(counts) - 1


@pytest.mark.parametrize("missing", [False, True])
def test_each_choice_of_others_is_drawn_as_often(data_dir, missing):
    path = data_dir / "csv" / "train.csv"
    row = read_csv(path)[0] | {
        "candidate_resourceKey": [f"element_{i}" for i in (1, 2, 3, 4, 6, 7)]
    }
    known = row | {"resourceKey": "element_3"}
    row["resourceKey"] = "element_8" if missing else "element_3"
    write_csv(path, [list(row.values())] * 2000 + [list(known.values())])  # not missing in all
    train, _, _ = read_all(data_dir)
    keys = train.elements.keys
    found = Counter()
    for epoch in range(10):
        relevant, *drawn = train.draw(np.arange(2000), epoch).T
        assert {keys[place] for place in relevant} == {row["resourceKey"]}
        found.update(
            tuple(sorted(keys[place] for place in places)) for places in np.transpose(drawn)
        )
    others = [key for key in row["candidate_resourceKey"] if key != row["resourceKey"]]
    choices = list(itertools.combinations(others, 3))
    assert sorted(found) == choices  # ten, or twenty
    expected = 20_000 / len(choices)
    chi_squared = sum((times - expected) ** 2 / expected for times in found.values())
    assert (
        chi_squared < {10: 27.9, 20: 43.8}[len(choices)]
    )  # what chance exceeds once in a thousand times


def test_any_number_of_workers_gives_the_same_batches(data_dir):
    train, _, _ = read_all(data_dir)

    def batches(workers):
        sampler = TrainSampler(train.item_weights, 8, 12, seed=5)
        return list(
            DataLoader(train, batch_size=4, sampler=sampler, collate_fn=whole, num_workers=workers)
        )

    expected = batches(0)
    for workers in (1, 3):
        for a, b in zip(expected, batches(workers), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", [1, 8, 16, 41])
def test_each_epoch_has_each_row_once_and_means_are_means(size):
    updates = -(-41 // size)
    keys = list(TrainSampler(np.ones(41), size, 3 * updates, seed=0))
    assert len(keys) == 3 * updates * size
    orders = set()
    for epoch in range(3):
        of_epoch = keys[epoch * updates * size : (epoch + 1) * updates * size]
        rows = [key.index for key in of_epoch if key.weight]
        assert sorted(rows) == list(range(41)) and {key.epoch for key in of_epoch} == {epoch}
        orders.add(tuple(rows))
        for start in range(0, len(of_epoch), size):
            batch = of_epoch[start : start + size]
            losses = np.array([key.index for key in batch], float)  # any per-row loss
            real = [key.index for key in batch if key.weight]
            assert np.mean(losses * [key.weight for key in batch]) == pytest.approx(np.mean(real))
    assert len(orders) == 3
    # A function of the update alone, wherever a run resumes.
    assert list(TrainSampler(np.ones(41), size, 2, seed=0)) == keys[: 2 * size]
    resumed = TrainSampler(np.ones(41), size, 3 * updates, seed=0, first_update=updates + 1)
    assert list(resumed) == keys[(updates + 1) * size :] and len(resumed) == len(list(resumed))


@pytest.mark.parametrize("size", [1, 8, 16, 41])
def test_the_loss_is_the_mean_by_weight(size):
    """By brute force, of items that weigh as many tokens as they have: a mean over the tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 100, 41)
    token_losses = [random.random(length) for length in tokens]
    losses = np.array([values.mean() for values in token_losses])  # what `forward` returns
    keys = list(TrainSampler(tokens, size, 2 * -(-41 // size), seed=0))
    for start in range(0, len(keys), size):
        batch = keys[start : start + size]
        index, _, weights = (np.array(values) for values in zip(*batch, strict=True))
        expected = np.concatenate([token_losses[key.index] for key in batch if key.weight]).mean()
        assert np.mean(losses[index] * weights) == pytest.approx(expected, rel=1e-12)
        # However the global batch is cut: micro-batches, processes.
        for parts in (2, 4) if size % 4 == 0 else ():
            cut = (losses[index] * weights).reshape(parts, -1).mean(1)
            assert cut.mean() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_groups(processes):
    batches = list(evaluation_batches([(range(10), 3), (range(10, 33), 1)], 2, processes))
    assert len(batches) % processes == 0
    assert [key.index for batch in batches for key in batch if key.weight] == list(range(33))
    once = list(evaluation_batches([(range(10), 3), (range(10, 33), 1)], 2, 1))
    assert [len(batch) for batch in once] == [6, 4] + [2] * 12  # each of one group
    # Padding is another item of the group: else a mean over it would be the item's own.
    assert [key.index for key in once[-1]] == [32, 10]
    assert batches[: len(once)] == once  # the same batches, whatever the processes
    assert not any(key.weight for batch in batches[len(once) :] for key in batch)


def test_rerank_items_are_the_distinct_images(data_dir):
    _, _, rerank = read_all(data_dir)
    change(
        data_dir,
        "test_vocabulary",
        2,
        candidate_resourceKey="['element_1', 'element_2', 'element_1']",
        resourceKey="element_3",
    )
    _, _, rerank = read_all(data_dir)
    rows = read_csv(data_dir / "csv" / "test_vocabulary.csv")
    used = {key for row in rows for key in ast.literal_eval(row["candidate_resourceKey"])}
    assert len(rerank) == len({row["x_image_path"] for row in rows}) + len(used)
    assert rerank.labels[0] == -1 and (rerank.labels[1:] == 0).all()
    assert (rerank.candidates[0] >= 0).sum() == 2  # a key that occurs twice counts once
    for row in range(len(rows)):
        page = rerank.__getitems__([Key(int(rerank.queries[row]))])["images"][0]
        assert torch.equal(
            page, decode_image(data_dir / "images" / f"{rows[row]['x_image_path']}.png", 64)
        )
        for column, key in enumerate(rerank.keys_of(row)):
            element = rerank.__getitems__([Key(int(rerank.candidates[row, column]))])["images"][0]
            assert torch.equal(element, decode_image(data_dir / "elements" / f"{key}.png", 32))


def test_data_sets_keep_the_contract(data_dir):
    """As runtime/batches.py has it."""
    change(data_dir, "eval", 3, candidate_resourceKey="")
    change(data_dir, "test_vocabulary", 3, candidate_resourceKey="")
    change(data_dir, "test_vocabulary", 6, resourceKey="element_1", candidate_resourceKey="['a']")
    Image.new("L", (8, 8)).save(data_dir / "elements" / "a.png")
    train, shared, rerank = read_all(data_dir)
    for dataset, rows, file in ((train, 41, "train"), (shared, 12, "eval")):
        assert len(dataset) == len(dataset.labels) == len(dataset.positions) == rows
        assert dataset.groups == [(range(rows), 1)] and dataset.labels.tolist() == [0] * rows
        assert dataset.name_item(0) == dataset.name_row(0)
        assert dataset.name_row(0).endswith(f"{file}.csv, row 2")
    assert shared.name_row(1).endswith("eval.csv, row 4")  # row 3 was left out
    assert rerank.labels.tolist() == [0, 0, 0, -1] + [0] * 12
    assert rerank.name_row(3).endswith("test_vocabulary.csv, row 6")

    (elements, several), (pages, one) = rerank.groups
    assert (several, one) == (4, 1)  # elements of 32 pixels, pages of 64
    assert [*elements, *pages] == list(range(len(rerank)))
    names = [os.path.relpath(rerank.name_item(item), data_dir) for item in range(len(rerank))]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names[: len(elements)]} == {"elements"}
    assert {name.split("/")[0] for name in names[len(elements) :]} == {"images"}

    for dataset in (train, shared, rerank):
        assert dataset.item_weights.dtype == np.float64
        assert dataset.item_weights.tolist() == [1.0] * len(dataset)
        assert dataset.positions.dtype == dataset.labels.dtype == np.int64
        keys = [Key(0, weight=2.5), Key(1, weight=1.0), Key(0, weight=0.0)]
        batch = dataset.__getitems__(keys)
        assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == [0, 1, -1]
        assert {len(values) for values in batch.values()} == {3}
    weight = train.__getitems__(keys)["weight"]
    assert weight.dtype == torch.float32 and weight.tolist() == [2.5, 1.0, 0.0]


def test_rerank_scores_stand_at_the_columns_of_the_candidates(data_dir):
    """An embedding that tells its item: a score then tells which two items it is of."""
    _, _, rerank = read_all(data_dir)
    embeddings = torch.eye(len(rerank))
    embeddings[len(rerank.element_ids) :, : len(rerank.element_ids)] = torch.rand(
        len(rerank.page_ids), len(rerank.element_ids)
    )
    scores = rerank.score({"outputs": embeddings}, slice(None))
    rows = read_csv(rerank.path)
    longest = max(len(ast.literal_eval(row["candidate_resourceKey"])) for row in rows)
    assert scores.shape == (17, longest) and scores.dtype == torch.float32
    items = [os.path.relpath(rerank.name_item(item), data_dir) for item in range(len(rerank))]
    for i, row in enumerate(rows):
        keys = ast.literal_eval(row["candidate_resourceKey"])
        page = items.index(f"images/{row['x_image_path']}.png")
        expected = [embeddings[page, items.index(f"elements/{key}.png")] for key in keys]
        assert torch.equal(scores[i, : len(keys)], torch.stack(expected))
        assert (scores[i, len(keys) :] == -torch.inf).all()
        assert rerank.keys_of(i) == keys and rerank.relevant_key(i) == row["resourceKey"]
