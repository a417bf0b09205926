"""The formatter, the linter and the type checker, with the settings of ruff.toml and pyrefly.toml."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
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


def test_no_line_of_the_program_is_long():
    """The formatter cuts code. It leaves comments, docstrings and long texts as they are."""
    files = [
        path for under in ("", "runtime/", "tools/") for path in REPOSITORY.glob(f"{under}*.py")
    ]
    long = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long
