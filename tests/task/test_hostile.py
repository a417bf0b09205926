"""Hostile input by kind, generated. Each case gives the numbers of a brute force written here, or a UserError of one line.

Nothing of data.py is used to say what is right: pictures are drawn with NumPy and their files written here by the format's
definition, rows are made as objects before they become text, and cells are read with ast and json.
"""

import ast
import csv
import io
import json
import os
import random
import struct
import unicodedata
import zlib
from argparse import Namespace

import numpy as np
import pytest
from page_data import COLUMNS, read_table, write_csv
from PIL import Image

from config import Config, read_config
from data import Images, decode_image, find_image, read_tables
from runtime.launch import UserError

REFUSED = "refused"


def outcome(function, *arguments):
    """What it returns, or (REFUSED, its message of one line)."""
    try:
        return function(*arguments)
    except UserError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1 and "Traceback" not in message
        return REFUSED, message


# ---- images


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def packed(values, depth, order=">"):
    """Rows of whole numbers as the bytes of an image: uint (h, w, channels)."""
    if depth >= 16:
        return values.astype(f"{order}u{depth // 8}").tobytes()
    bits = [[format(value, f"0{depth}b") for value in row.ravel()] for row in values]
    rows = ["".join(row) + "0" * (-len(row) * depth % 8) for row in bits]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def png_bytes(values, kind, depth, extra):
    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    lines = b"".join(b"\0" + packed(values[i : i + 1], depth) for i in range(height))
    body = extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
PNGS = [(GREY, depth) for depth in (1, 2, 4, 8, 16)]
PNGS += [(PALETTE, depth) for depth in (1, 2, 4, 8)]
PNGS += [(kind, depth) for kind in (COLOUR, GREY_ALPHA, COLOUR_ALPHA) for depth in (8, 16)]
TRANSPARENT = {GREY: (False, True), COLOUR: (False, True), PALETTE: (False, True)}
PNGS = [(*each, transparent) for each in PNGS for transparent in TRANSPARENT.get(each[0], (False,))]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "depth", "transparent"), PNGS)
def test_png_of_every_kind(tmp_path, kind, depth, transparent, seed):
    draw = np.random.default_rng((seed, kind, depth))
    most, extra, key = 2**depth - 1, b"", None
    values = draw.integers(0, most + 1, (8, 8, CHANNELS[kind]))
    alpha = np.ones((8, 8, 1))
    if kind == PALETTE:
        palette, alphas = draw.integers(0, 256, (most + 1, 3)), draw.integers(0, 256, most + 1)
        extra = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        colours = palette[values[..., 0]] / 255
        if transparent:
            extra += chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
            alpha = alphas[values] / 255
    else:
        if transparent:
            key = values[3, 4].copy()
            values[5:] = key
            extra = chunk(b"tRNS", b"".join(struct.pack(">H", one) for one in key))
            alpha = 1.0 - (values == key).all(-1, keepdims=True)
        last = -1 if kind in (GREY_ALPHA, COLOUR_ALPHA) else None
        alpha = values[..., last:] / most if last else alpha
        colours = np.broadcast_to(values[..., :last] / most, (8, 8, 3))
    expected = 255 * (colours * alpha + 1 - alpha)
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(values, kind, depth, extra))
    found = outcome(decode_image, path, 8)
    if (kind, depth, transparent) == (COLOUR, 16, True):
        assert found[0] == REFUSED and "RGB of 16 with a transparent colour" in found[1]
    else:  # within what 16 bits lose in 8
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < (3 if depth == 16 else 1)


def tiff_bytes(values, depth, meaning, order, extra_sample):
    """An uncompressed TIFF. meaning: its PhotometricInterpretation: 0 is white, 0 is black, colours."""
    height, width, channels = values.shape
    content = packed(values, depth, order)
    content += b"\0" * (len(content) % 2)
    tags = {256: [width], 257: [height], 258: [depth] * channels, 259: [1], 262: [meaning]}
    tags |= {273: [8], 277: [channels], 278: [height], 279: [len(content)]}
    tags |= {338: [extra_sample]} if extra_sample is not None else {}
    start = 8 + len(content)
    entries, beyond = b"", b""
    for tag, numbers in tags.items():
        value = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(value) > 4:
            after = start + 2 + 12 * len(tags) + 4 + len(beyond)
            value, beyond = struct.pack(f"{order}L", after), beyond + value
        entries += struct.pack(f"{order}HHL", tag, 3, len(numbers)) + value.ljust(4, b"\0")
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, start)
    count = struct.pack(f"{order}H", len(tags))
    return header + content + count + entries + b"\0\0\0\0" + beyond


TIFFS = [(depth, meaning, 1, None) for depth in (1, 2, 4, 8, 12, 16, 32) for meaning in (0, 1)]
TIFFS += [(depth, 2, 3, None) for depth in (8, 16)]
TIFFS += [(depth, 2, 4, extra) for depth in (8, 16) for extra in (1, 2)]  # premultiplied, or not


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("depth", "meaning", "channels", "extra"), TIFFS)
def test_tiff_of_every_kind(tmp_path, depth, meaning, channels, extra, order):
    draw, most = np.random.default_rng((depth, channels)), 2**depth - 1
    values = draw.integers(0, most + 1, (8, 8, channels))
    if extra == 1:
        values = np.minimum(values, values[..., 3:])
    colours = np.broadcast_to(values[..., :3] / most, (8, 8, 3))
    colours = 1 - colours if meaning == 0 else colours
    alpha = values[..., 3:] / most if extra else 1
    expected = 255 * (colours * (alpha if extra == 2 else 1) + 1 - alpha)
    path = tmp_path / "x.png"
    path.write_bytes(tiff_bytes(values, depth, meaning, order, extra))
    found = outcome(decode_image, path, 8)
    if found[0] is not REFUSED:
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < (3 if depth == 16 else 1.1)
    accepted = depth in (1, 2, 4, 8) or (depth == 16 and meaning > 0)
    assert accepted == (found[0] is not REFUSED), found


TURNED = {  # how a picture that is stored so is meant to be seen, as EXIF defines it
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
SHARP = {"quality": 100, "subsampling": 0}
CARRIERS = [("JPEG", mode, SHARP) for mode in ("RGB", "L", "CMYK")] + [("MPO", "RGB", SHARP)]
CARRIERS += [("PNG", mode, {}) for mode in ("RGB", "L", "P", "RGBA", "LA", "I;16", "1")]
CARRIERS += [("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")]
CARRIERS += [("TIFF", mode, {}) for mode in ("RGB", "L", "CMYK", "I;16")]
CARRIERS += [("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("RGB", "L")]


@pytest.mark.parametrize(("kind", "mode", "options"), CARRIERS)
def test_pictures_are_turned_once(tmp_path, kind, mode, options):
    stored = np.zeros((8, 16), np.uint8)
    stored[:4, :4], stored[4:, :4], stored[:4, 12:] = 255, 255, 255
    image = Image.fromarray(stored).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(stored.astype(np.uint16) * 257)
    for orientation in TURNED if "compression" in options else (0, *TURNED, 9):  # 0, 9: nothing
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(tmp_path / "x.png", kind, exif=exif, **options)
        seen = TURNED.get(orientation, TURNED[1])(stored)
        expected = np.full((16, 16), 255, np.uint8)
        top, left = (16 - seen.shape[0]) // 2, (16 - seen.shape[1]) // 2
        expected[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
        found = decode_image(tmp_path / "x.png", 16).numpy().astype(int)
        assert np.abs(found - expected).max() < 6, orientation  # what JPEG loses


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"", b"junk", b"Exif\0\0junkjunk", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_turns_nothing(tmp_path, kind, exif):
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "x.png", kind, exif=exif)
    found = decode_image(tmp_path / "x.png", 8)
    assert (found[:, :2] == 255).all() and (found[1, 3:5] < 9).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5), (64, 64), (1000, 999)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_any_size_is_fitted_onto_white(tmp_path, mode, size):
    Image.new(
        mode, size, 0 if len(mode) == 1 else (0,) * (len(mode) - 1) + (255 * ("A" in mode),)
    ).save(tmp_path / "x.png")
    found = decode_image(tmp_path / "x.png", 16).numpy()
    width, height = (max(1, round(side * 16 / max(size))) for side in size)
    black = (found == 0).all(0)
    assert black.sum() == width * height and (found[:, ~black] == 255).all()
    rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
    assert (len(rows), len(columns)) == (height, width)
    assert abs(rows.mean() - 7.5) <= 0.5 and abs(columns.mean() - 7.5) <= 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_half_a_picture_is_refused(tmp_path, kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    for cut in (0, 1, 8, 30, 60, 100):
        (tmp_path / "x.png").write_bytes(file.getvalue()[:cut])
        found = outcome(decode_image, tmp_path / "x.png", 16)
        assert found[0] == REFUSED and str(tmp_path / "x.png") in found[1]


# ---- keys and their files


FILES_THERE = ("a", "a.b", " a ", "sub/a", "-", "요소", "é")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "elements"
    (folder / "sub").mkdir(parents=True)
    for name in (
        "a",
        "a.b",
        " a ",
        "sub/a",
        "-",
        "요소",
        unicodedata.normalize("NFD", "하트"),
        "é",
    ):
        (folder / f"{name}.png").touch()
    (tmp_path / "outside.png").touch()
    links = {"in": "a.png", "out": "../outside.png", "loop": "loop.png", "gone": "gone", "up": ".."}
    for name, target in (links | {"null": "/dev/null", "zero": "/dev/zero"}).items():
        (folder / f"{name}.png").symlink_to(target)
    os.mkfifo(folder / "fifo.png")
    (folder / "to fifo.png").symlink_to("fifo.png")
    return folder


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_keys_that_name_a_file(folder, form):
    names = {"in": "a", "./a": "a"} | {key: key for key in (*FILES_THERE, "하트")}
    for key, name in names.items():
        found = find_image(os.path.realpath(folder), unicodedata.normalize(form, key))
        there = unicodedata.normalize("NFC", os.path.relpath(found, folder))
        assert there == f"{name}.png" and os.path.exists(found)


def test_a_name_that_is_spelled_both_ways(folder):
    mixed = "가" + unicodedata.normalize("NFD", "나")
    (folder / f"{mixed}.png").touch()
    with pytest.raises(UserError, match=r"가나.png': a file there .* \(NFD\): rename it"):
        find_image(os.path.realpath(folder), "가나")
    with pytest.raises(UserError, match="No such file"):
        find_image(f"{folder}/nowhere", "가나")


def test_many_missing_images_list_no_folder(folder, monkeypatch):
    """To look for each among millions of names would take hours, before the first is told."""
    monkeypatch.setattr(os, "listdir", None)
    for key in ("가나", "no", "a\0"):
        with pytest.raises((OSError, ValueError)):
            Images.stat(Namespace(root=str(folder)), key)


NO_FILES = {
    "A": "No such file", "a ": "No such file", "": "No such file", "a.png": "No such file",
    "b/a": "No such file", "gone": "No such file", "a\n": "No such file", "ａ": "No such file",
    "fifo": "not a regular file", "to fifo": "not a regular file", "up": "not a regular file",
    "null": "not a regular file", "zero": "not a regular file", "loop": "Too many levels",
    "a.png/x": "Not a directory", "x" * 300: "File name too long", "a\0": "null byte",
    "\ud800": "surrogates not allowed", "a\udcff": "surrogates not allowed", "out": "points outside",
    "../outside": "points outside", "sub/../../outside": "points outside", "/etc/x": "No such file",
}  # fmt: skip


def test_keys_that_name_none(folder):
    for key, reason in NO_FILES.items():
        kind, message = outcome(find_image, os.path.realpath(folder), key)
        assert kind == REFUSED and reason in message and str(folder) in message, ascii(key)


def as_nobody(function, *arguments):
    if os.geteuid() == 0:  # to whom no folder is closed
        os.seteuid(65534)
    try:
        return outcome(function, *arguments)
    finally:
        os.seteuid(os.getuid())


def test_a_folder_that_cannot_be_searched_says_so(folder):
    os.chmod(folder, 0)
    found = as_nobody(find_image, str(folder), "a"), as_nobody(read_table, folder / "x", 9, {}, {})
    os.chmod(folder, 0o700)
    assert all(kind == REFUSED and "Permission denied" in message for kind, message in found)


def test_a_file_system_that_cannot_spell_a_name_says_so(folder, monkeypatch):
    def refuse(path, **options):
        "가".encode("ascii")

    monkeypatch.setattr(os.path, "realpath", refuse)
    assert "'ascii' codec can't encode" in outcome(find_image, str(folder), "a")[1]

    def unmountable(path, **options):
        raise OSError(84, os.strerror(84))

    monkeypatch.setattr(os.path, "realpath", unmountable)
    assert os.strerror(84) in outcome(find_image, str(folder), "a")[1]


# ---- cells


CELLS = [
    "",
    " ",
    "[]",
    "()",
    "[1]",
    "[1, '1']",
    "['a','a']",
    '["a"]',
    "['a', 'k']",
    "('a',)",
    "null",
]
CELLS += [
    "None",
    "['k'",
    "k",
    "'k'",
    "{'k'}",
    "{'k': 1}",
    "['k', 1.0]",
    "[['k']]",
    "[None]",
    "[b'k']",
]
CELLS += [
    "['k'] # x",
    "['k'], ['l']",
    "'k','l'",
    "['k' 'l']",
    "[k]",
    "['k',]",
    "['k',,]",
    " ['k']\n",
]
CELLS += [
    '["\\u0041", "\\ud83d\\ude00"]',
    "['\\x41']",
    "[r'k']",
    "[f'k']",
    "['a']*3",
    "[-1]",
    "[1_0]",
]
CELLS += [
    "[0x10]",
    "[True, 'True']",
    "[true]",
    "[NaN]",
    "[1e3]",
    "['\\n']",
    '["it\'s", "k"]',
    "[1j]",
]
CELLS += ["[" * 2000, "[" + "1," * 300 + "]", "['" + "k" * 5000 + "']", "[" + "9" * 5000 + "]"]
CELLS += [
    "__import__('os')",
    "lambda: 0",
    "[x for x in 'k']",
    "['k'].copy()",
    "\ufeff['k']",
    "[\u00a0'k']",
]


def keys_by_brute_force(text):
    """The keys, each as often as it is listed, or REFUSED."""
    if not text.strip():
        return []
    for read in (json.loads, lambda text: ast.literal_eval(text.strip())):
        try:
            value = read(text)
            break
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            value = REFUSED
    if value is None:
        return []
    try:
        right = isinstance(value, (list, tuple)) and all(isinstance(k, (str, int)) for k in value)
        return [str(key) for key in value] if right else REFUSED
    except ValueError:  # a number of more digits than Python writes
        return REFUSED


def mutations(count):
    draw = random.Random(0)
    for _ in range(count):
        text = draw.choice(
            [str(["a", 'b"', "k", 7]), json.dumps(["a", "b'", "하트", 7]), "('a', 'k')"]
        )
        for _ in range(draw.randrange(1, 3)):
            place = draw.randrange(len(text))
            text = (
                text[:place]
                + draw.choice(["", "'", '"', ",", "]", "[", "\\", " "])
                + text[place + 1 :]
            )
        yield text


@pytest.mark.parametrize("part", range(10))
@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_cells_of_candidates(tmp_path, part):
    for text in [*CELLS, *mutations(60)][part::10]:
        check_cell(tmp_path, text)


def check_cell(tmp_path, text):
    plain = ["w", 1, 1, "page", "k", "['other', 'k']", "[1]", "[1]"]
    write_csv(tmp_path / "x.csv", [plain, [*plain[:5], text, *plain[6:]]])
    elements = {}
    table = outcome(read_table, tmp_path / "x.csv", 250, {}, elements)
    keys = keys_by_brute_force(text)
    if keys == REFUSED:
        assert table[0] == REFUSED and "x.csv, row 3, column candidate_resourceKey" in table[1]
        return
    used = 0 < len(keys) < 250
    left_out = {"no_candidates": int(not keys), "too_many_candidates": int(len(keys) >= 250)}
    assert {name: table.counts[name] for name in left_out} == left_out
    assert table.counts["used"] == 1 + used == len(table.positions)
    if used:
        found = [list(elements)[number] for number in table.candidates(1)]
        assert found == sorted(set(keys), key=keys.index)
        assert table.labels[1] == (found.index("k") if "k" in found else -1)


# ---- rows


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_every_kind(tmp_path, seed, capsys):
    """Rows are made as objects, written in any way that a CSV may be, and counted by hand."""
    draw = random.Random(seed)
    keys = [
        "a",
        "가",
        unicodedata.normalize("NFD", "가"),
        "7",
        "007",
        "7.0",
        "a ",
        "A",
        'q"',
        "n\n",
        ",",
    ]
    shares = draw.choice(
        [(1, 0, 0), (0, 1, 0), (0, 0, 1), (8, 1, 0), (8, 0, 1), (20, 1, 1), (1, 1, 1)]
    )
    rows = []
    for _ in range(draw.choice([1, 5, 40])):
        relevant, *others = draw.sample(keys, draw.randrange(3, 9))
        kind = draw.choices(["ranked", "missing", "alone"], shares)[0]
        listed = {"ranked": [relevant, *others], "missing": others, "alone": [relevant]}[kind]
        listed = draw.sample(listed, len(listed)) + draw.choices(listed, k=draw.randrange(3))
        if draw.random() < 0.1:
            listed = draw.choice([[], listed * 10])
        rows.append((draw.choice(["p", "페이지"]), relevant, listed))
    columns = draw.sample([*COLUMNS, "more"], len(COLUMNS) + 1)
    ends, quoting = draw.choice(["\n", "\r\n"]), draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    write = draw.choice([str, json.dumps, lambda listed: json.dumps(listed, ensure_ascii=False)])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ends, quoting=quoting)
    writer.writerow(columns)
    for page, relevant, listed in rows:
        cells = dict.fromkeys(columns, "[1]") | {"x_image_path": page, "resourceKey": relevant}
        cells["candidate_resourceKey"] = (
            write(listed) if listed else draw.choice(["", "[]", "None"])
        )
        writer.writerow([cells[name] for name in columns])
        text.write(ends * draw.choice([0, 0, 0, 2]))  # blank lines
    path = tmp_path / "x.csv"
    path.write_bytes(text.getvalue().encode(draw.choice(["utf-8", "utf-8-sig"])))

    elements, pages, limit = {}, {}, 20
    table = outcome(read_table, path, limit, pages, elements)
    used = [(i, row) for i, row in enumerate(rows) if 0 < len(row[2]) < limit]
    missing = [relevant not in listed for _, (_, relevant, listed) in used]
    alone = [{relevant} == set(listed) for _, (_, relevant, listed) in used]
    warnings = capsys.readouterr().out.splitlines()
    if not used or all(missing) or all(alone):
        assert table[0] == REFUSED and str(path) in table[1]
        return
    assert len(warnings) == sum(sum(odd) > 0.1 * len(used) for odd in (missing, alone))
    assert all(line.startswith(f"warning: {path}: in ") for line in warnings)
    assert table.counts == {
        "used": len(used),
        "no_candidates": sum(not listed for _, _, listed in rows),
        "too_many_candidates": sum(len(listed) >= limit for _, _, listed in rows),
        "relevant_missing": sum(missing),
        "relevant_alone": sum(alone),
    }
    assert table.positions.tolist() == [i for i, _ in used]
    for row, (_, (page, relevant, listed)) in enumerate(used):
        distinct = sorted(set(listed), key=listed.index)
        assert [list(elements)[number] for number in table.candidates(row)] == distinct
        assert table.labels[row] == (distinct.index(relevant) if relevant in distinct else -1)
        assert list(elements)[table.relevant[row]] == relevant
        assert list(pages)[table.queries[row]] == page


def test_other_processes_do_not_warn_too(tmp_path, capsys, monkeypatch):
    row = ["w", 1, 1, "page", "k", "['other', 'k']", "[1]", "[1]"]
    write_csv(tmp_path / "x.csv", [row, [*row[:4], "007", "[7]", *row[6:]]])
    monkeypatch.setenv("RANK", "1")
    assert read_table(tmp_path / "x.csv", 9, {}, {}).counts["relevant_missing"] == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    read_table(tmp_path / "x.csv", 9, {}, {})
    assert "in 1 of 2 rows resourceKey is not among the candidates" in capsys.readouterr().out


def test_a_second_launch_warns_too(tmp_path, capsys):
    """It parses nothing: what was read is kept."""
    row = ["w", 1, 1, "page", "k", "['other', 'k']", "[1]", "[1]"]
    (tmp_path / "csv").mkdir()
    write_csv(tmp_path / "csv" / "x.csv", [row, [*row[:4], "007", "[7]", *row[6:]]])
    for _ in range(2):
        (table,), *_ = read_tables(tmp_path, ["x"], 9)
        assert table.counts["relevant_missing"] == 1
        assert "in 1 of 2 rows resourceKey is not among" in capsys.readouterr().out


# ---- columns and encodings


HEADER, LINE = ",".join(COLUMNS), "w,1,1,p,k,\"[1, 'k']\",[1],[1]"
FILES = {f"without {name}": (HEADER.replace(name, "x"), LINE) for name in COLUMNS}
FILES |= {f"twice {name}": (f"{HEADER},{name}", f"{LINE},k") for name in COLUMNS}
FILES |= {
    "a space in the header": (HEADER.replace(",", ", "), LINE),
    "semicolons": (HEADER.replace(",", ";"), LINE.replace(",", ";")),
    "tabs": (HEADER.replace(",", "\t"), LINE.replace(",", "\t")),
    "a cell too many": (HEADER, f"{LINE},1"),
    "a cell too few": (HEADER, LINE[:-4]),
    "a cell too many later": (HEADER, LINE, LINE, f"{LINE},1"),
    "an open quote": (HEADER, LINE[:-4] + '"[1]'),
    "a quote in a cell": (HEADER, LINE.replace('"[', '" ["')),
    "nothing": ("",),
    "a header alone": (HEADER,),
    "no header": (LINE, LINE),
}
CODES = [
    ("utf-16", False),
    ("utf-32", False),
    ("cp949", False),
    ("utf-8", True),
    ("utf-8-sig", True),
]


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_such_table(tmp_path, name):
    (tmp_path / "x.csv").write_text("\n".join(FILES[name]) + "\n", encoding="utf-8")
    kind, message = outcome(read_table, tmp_path / "x.csv", 9, {}, {})
    assert kind == REFUSED and str(tmp_path / "x.csv") in message


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("encoding", "accepted"), CODES)
def test_encodings_and_ends_of_lines(tmp_path, encoding, accepted, ends):
    text = ends.join([HEADER, LINE.replace("k", "하트"), LINE, ""])
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    elements = {}
    found = outcome(read_table, tmp_path / "x.csv", 9, {}, elements)
    assert accepted == (found[0] is not REFUSED if isinstance(found, tuple) else True)
    if accepted:
        assert list(elements) == ["하트", "1", "k"] and found.labels.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "folder", "device", "absent", "loop"])
def test_a_csv_that_is_no_file(tmp_path, kind):
    path = tmp_path / "x.csv"
    if "fifo" in kind:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.symlink_to({"device": "/dev/zero", "loop": "x.csv"}[kind])
    reason = {"absent": "No such file", "loop": "Too many levels"}.get(kind, "not a regular file")
    assert f"x.csv: cannot be read: {reason}" in outcome(read_table, path, 9, {}, {})[1]


# ---- values of options


NUMBERS = [
    "0",
    "1",
    "-1",
    "+7",
    "007",
    "1_0",
    "3.0",
    "3.5",
    "1e3",
    "1e400",
    "-0",
    ".5",
    "5.",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "1,0",
    "１",
    "٣",
    "1e-400",
    "--1",
    "1L",
]
NUMBERS += [
    "9" * 31,
    "9" * 5000,
    "2147483647",
    "2147483648",
    "4294967296",
    " 4 ",
    "\t4",
    "",
    " ",
    "~",
]
TEXTS = [
    "a",
    "~",
    "~/a",
    "a~",
    "a\0",
    "a\nb",
    " ",
    "",
    "\ud800",
    "하트",
    "-",
    "=",
    "null",
    "$HOME",
    "x" * 5000,
]
BOUNDS = {"max_steps": -1, "seed": 0, "num_train_epochs": 1, "per_device_eval_batch_size": 1}
OPTIONS = dict.fromkeys([*BOUNDS, "learning_rate"], NUMBERS)
OPTIONS |= dict.fromkeys(["output_dir", "data_dir"], TEXTS)


def value_by_brute_force(name, text):
    if name.endswith("_dir"):
        wrong = not text.strip() or any(c in "\0\n" or "\ud800" <= c <= "\udfff" for c in text)
        home = os.environ["HOME"]
        return REFUSED if wrong else home + text[1:] if text in ("~", "~/a") else text
    try:
        value = float(text)
    except ValueError:
        return REFUSED
    least = BOUNDS.get(name, 0)
    if not least <= value <= 2**31 - 1 or (name in BOUNDS and value != int(value)):
        return REFUSED
    value = int(value) if name in BOUNDS else value
    return 0 if (name, value) == ("max_steps", -1) else value


@pytest.mark.parametrize("name", OPTIONS)
def test_values_of_options(tmp_path, name):
    """A flag and a YAML say the same, whatever the text."""
    file = tmp_path / "run.yaml"
    for text in OPTIONS[name]:
        expected = value_by_brute_force(name, text)
        found = [outcome(read_config, [f"--{name}={text}"])]
        if "\ud800" not in text:  # no file can hold it
            file.write_text(f"{name}: {json.dumps(text)}\n", encoding="utf-8")
            found.append(outcome(read_config, ["--config", str(file)]))
        for config in found:
            if expected == REFUSED:
                assert not isinstance(config, Config) and name in config[1], text
            else:
                value = getattr(config, name)
                assert value == expected and type(value) is type(expected), text
