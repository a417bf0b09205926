"""The formatter, the linter and the type checker, with the settings of ruff.toml and pyrefly.toml."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize(
    "command",
    [
        "ruff format --check",
        "ruff check",
        f"pyrefly check --python-interpreter-path {sys.executable}",
    ],
    ids=lambda command: command.split(" --")[0],
)
def test_nothing_to_mend(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
