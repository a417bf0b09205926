"""What the tests share: a small data set, launches of real processes, and the records of a run."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import DualEncoder, DualEncoderConfig

REPOSITORY = Path(__file__).parents[1]
# For launches that share the cores, where threads that wait without letting go slow all tenfold. One that is alone is slower so.
SIDE_BY_SIDE = {"OMP_WAIT_POLICY": "PASSIVE"}
COLUMNS = [
    "search_word",
    "template_idx",
    "page_num",
    "x_image_path",
    "resourceKey",
    "candidate_resourceKey",
    "x_info",
    "y_info",
]


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also the tests marked long: every way of running, ten minutes more",
    )
    parser.addoption(
        "--write-table", action="store_true", help="write the README's table of test_parity.py anew"
    )


def pytest_collection_modifyitems(config, items):
    if not (config.getoption("--all") or config.getoption("--write-table")):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_runtest_setup(item):
    launch.is_for = item


@pytest.fixture
def data_dir(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def make_tiny_model(folder):
    """A folder with a model that computes next to nothing, and has dropout."""
    backbone = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    backbone |= {"image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.1}
    config = DualEncoderConfig(
        backbone_config=backbone, feature_size=86, embedding_size=16, page_size=16, element_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(
            0
        )  # the same in each run of the tests: when an evaluation is the best one depends on it
        DualEncoder(config).save_pretrained(folder)
    return folder


def write_data(folder, train=41, evaluation=13, test=17, elements=30):
    """A data set of noise, in the layout of data.py, with row counts that divide by nothing. Returns the folder."""
    random = np.random.default_rng(0)
    for name in ("csv", "images", "elements"):
        (folder / name).mkdir(parents=True)
    keys = [
        f"요소 {number}" if number % 5 == 0 else f"element_{number}" for number in range(elements)
    ]
    for key in keys:
        save_image(
            folder / "elements" / f"{key}.png", random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        )
    for split, rows in {"train": train, "eval": evaluation, "test_vocabulary": test}.items():
        written = []
        for row in range(rows):
            page = f"{split} {row}"
            save_image(
                folder / "images" / f"{page}.png",
                random.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            )
            found = [keys[i] for i in random.permutation(elements)[: 2 + row % 9]]
            written.append(
                [
                    "하트" if row % 2 else "heart",
                    row,
                    1,
                    page,
                    found[0],
                    found,
                    [64, 64],
                    [0, 0, 32, 32],
                ]
            )
        write_csv(folder / "csv" / f"{split}.csv", written)
    return folder


def save_image(path, pixels):
    Image.fromarray(pixels).save(path)


def write_csv(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def launch(
    script,
    *arguments,
    config="cpu",
    processes=None,
    mixed_precision=None,
    launch_flags=(),
    check=True,
    cwd=None,
    wandb=False,
    **environment,
):
    """`accelerate launch` of a script of the repository, as a user would, but for wandb, whose service takes seconds to start.

    config: the name of one in accelerate_config, or a path. check: fail, with the output, unless it ends well.
    Returns the CompletedProcess, stdout and stderr in one text.
    """
    assert launch.is_for.get_closest_marker("slow"), "mark this test slow: it launches processes"
    command = launch_command(
        script,
        *arguments,
        config=config,
        processes=processes,
        mixed_precision=mixed_precision,
        launch_flags=launch_flags,
    )
    done = subprocess.run(
        command,
        env=launch_environment()
        | SIDE_BY_SIDE
        | ({} if wandb else {"WANDB_MODE": "disabled"})
        | environment,
        cwd=cwd or REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def refused(script, *arguments, **options):
    """A launch that must fail with one line: the line, with no traceback before it."""
    done = launch(script, *arguments, check=False, **options)
    assert done.returncode != 0
    (message,) = re.findall(
        r"^error: (.*)$", done.stdout, re.MULTILINE
    )  # once, on however many processes
    assert "Traceback" not in done.stdout.split("error: ")[0]
    return message


def launch_command(
    script, *arguments, config="cpu", processes=None, mixed_precision=None, launch_flags=()
):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = f"{config}.yaml" if isinstance(config, str) else config
    command += ["--config_file", REPOSITORY / "accelerate_config" / config] if config else []
    command += ["--num_processes", processes] if processes else []
    command += ["--mixed_precision", mixed_precision] if mixed_precision else []
    command += [*launch_flags, REPOSITORY / script, *arguments]
    return [str(word) for word in command]


def launch_environment():
    """This one without what would change a launch, and with the programs of this Python, ninja and accelerate among them."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "ACCELERATE", "OMP_NUM"))
    }
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def read_log(output_dir):
    """The lines of log.jsonl: (what the first says of the run, the others)."""
    first, *lines = [
        json.loads(line)
        for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return first, lines


def column(lines, name):
    """{step: value} of one name in the log."""
    return {line["step"]: line[name] for line in lines if name in line}
