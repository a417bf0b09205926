"""Generated input of every kind: each is accepted with the right values or refused in one clear message. Nothing is run, nothing
hangs, nothing outside the folder is read."""

import ast
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import launch, refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from page_data import read_table, save_image, write_csv
from PIL import Image

from config import read_config
from data import decode_image, find_image, parse_keys, parse_literal
from runtime.launch import UserError

EXAMPLES = settings(
    max_examples=100, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck)
)
ROW = ["word", "1", "1", "page", "key", "['key']", "[64, 64]", "[0, 0, 1, 1]"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
CODE = st.sampled_from(
    [
        "__import__('os').abort()",
        "open('/tmp/hole', 'w')",
        "[].__class__",
        "lambda: 0",
        "1 if 1 else 2",
        "f'{1}'",
    ]
)
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(TEXT, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


def refusal(function, *arguments, kind=UserError):
    """(value, None) or (None, the message), which must be one line."""
    try:
        return function(*arguments), None
    except kind as error:
        assert str(error) and "\n" not in str(error)
        return None, str(error)


@EXAMPLES
@given(LITERALS.map(repr) | LITERALS.map(str) | TEXT | CODE)
@example("[" * 5000)
@example("9" * 5000)
def test_cells(text):
    def read(text):
        return parse_literal(text)

    value, message = refusal(read, text, kind=(ValueError, RecursionError, MemoryError))
    if message is None and text.strip():
        try:
            expected = json.loads(text)
        except ValueError:
            expected = ast.literal_eval(text.strip())
        assert repr(value) == repr(expected)
    assert not Path("/tmp/hole").exists()


@EXAMPLES
@given(LITERALS)
def test_lists_of_keys(value):
    found, message = refusal(parse_keys, repr(value), kind=ValueError)
    keys = isinstance(value, (list, tuple)) and all(isinstance(key, (str, int)) for key in value)
    assert (message is None) == (value is None or keys)
    if keys:
        assert found == (len(value), tuple(dict.fromkeys(map(str, value))))


@EXAMPLES
@given(st.integers(0, 7), LITERALS.map(repr) | TEXT | CODE)
def test_rows(tmp_path_factory, column, cell):
    data_dir = tmp_path_factory.mktemp("rows")
    (data_dir / "csv").mkdir()
    row = list(ROW)
    row[column] = cell
    write_csv(data_dir / "csv" / "train.csv", [ROW, row])
    table, message = refusal(read_table, data_dir / "csv" / "train.csv", 400, {}, {})
    if message is None:
        used, *others = list(table.counts.values())[:3]
        assert 1 <= used == len(table.positions) and used + sum(others) == 2
    else:
        assert "train.csv" in message


@EXAMPLES
@given(
    TEXT
    | st.sampled_from(
        ["../secret", "/etc/passwd", "..", "a/../../secret", "link", ".", "", "a\0b", "x" * 5000]
    )
)
def test_keys_stay_in_the_folder(tmp_path_factory, key):
    parent = tmp_path_factory.mktemp("keys")
    folder = parent / "images"
    folder.mkdir()
    for path in (parent / "secret.png", folder / "inside.png"):
        save_image(path, np.zeros((2, 2, 3), np.uint8))
    (folder / "link.png").symlink_to(parent / "secret.png")
    path, message = refusal(find_image, os.path.realpath(folder), key)
    assert message is not None or Path(path).is_relative_to(folder.resolve())


def image_bytes(size, mode, kind):
    with io.BytesIO() as file:
        Image.new(mode, size).save(file, kind)
        return file.getvalue()


@EXAMPLES
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["RGB", "RGBA", "L", "P", "1", "I;16"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    st.integers(0, 10**6),
)
def test_image_bytes(tmp_path_factory, size, mode, changes, cut):
    content = bytearray(image_bytes(size, mode, "PNG"))
    for position, value in changes:
        content[position % len(content)] = value
    content = content[: len(content) - cut % len(content) if cut % 3 == 0 else None]
    path = tmp_path_factory.mktemp("image") / "image.png"
    path.write_bytes(content)
    pixels, message = refusal(decode_image, path, 16)
    assert pixels.shape == (3, 16, 16) if message is None else str(path) in message


@EXAMPLES
@given(
    st.sampled_from(
        [
            "learning_rate",
            "num_train_epochs",
            "seed",
            "warmup_steps",
            "metric_for_best_model",
            "max_steps",
            "output_dir",
            "nothing",
        ]
    ),
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
)
def test_config_values(tmp_path_factory, name, value):
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(json.dumps({name: value}), encoding="utf-8")  # JSON is YAML

    config, message = refusal(read_config, ["--config", str(file)])
    if message is None and isinstance(getattr(config, name), float):
        assert math.isfinite(getattr(config, name)) and getattr(config, name) >= 0


def test_an_image_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(image_bytes((9000, 9000), "1", "PNG"))
    with pytest.raises(UserError, match="the limit is 50,000,000"):
        decode_image(path, 16)
    assert path.stat().st_size < 100_000


# ---- by real launches


@pytest.mark.slow
def test_bad_data_is_one_line_on_two_processes(data_dir, tmp_path):
    (data_dir / "elements" / "element_1.png").write_bytes(b"broken")
    arguments = ["--data_dir", data_dir, "--output_dir", tmp_path / "output"]
    message = refused("train.py", *arguments, config="cpu_2_processes")
    assert "element_1.png: cannot be read as an image" in message and "train.csv, row" in message


@pytest.mark.slow
def test_a_worker_meets_a_broken_image(data_dir, tmp_path, tiny_model):
    """Who edits data.py so that workers decode images: what they raise is a line too."""
    done = launch(
        "tests/task/without_cache.py",
        *("--data_dir", data_dir, "--output_dir", tmp_path / "output"),
        *("--model_name_or_path", tiny_model, "--per_device_train_batch_size", 8),
        *("--dataloader_num_workers", 1, "--num_negatives", 3, "--report_to", "none"),
        check=False,
        BREAK=str(data_dir / "images" / "train 7.png"),
    )
    assert done.returncode == 1 and re.search(
        r"^error: .*train 7.png: cannot be read as an image", done.stdout, re.MULTILINE
    ), done.stdout
