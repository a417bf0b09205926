"""A project that is started as the README says: a copy without what is ours alone, with another
task. It must prove itself by the README's command."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SIDE_BY_SIDE, launch_environment

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Start your project\n")[2].partition("\n## ")[0]
TASKS = ("text_reranking", "text_classification", "causal_lm")
pytestmark = pytest.mark.slow


def start_project(folder, task):
    """A copy without what the README's first step deletes, the task's diff applied."""
    ours = shutil.ignore_patterns(".*", "__pycache__", "default_data*", "output*", "wandb")
    shutil.copytree(REPOSITORY, folder, ignore=ours)
    (step,) = re.findall(r"^1\. .*?: (.*?)\.\n2\. ", SECTION, re.MULTILINE | re.DOTALL)
    deleted = re.findall(r"`(\S+)`", step)
    assert "sample_data.py" in deleted and "tests/task/" in deleted
    for name in deleted:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    diff = REPOSITORY / "docs" / f"{task}.diff"
    subprocess.run(["git", "apply", diff], cwd=folder, check=True)
    tiny = REPOSITORY / "tests" / "project" / "tiny_tasks" / f"{task}.py"
    shutil.copy(tiny, folder / "tests" / "tiny_task.py")


def prove(folder, *options):
    """The README's command, on one process of pytest: what it prints."""
    (command,) = re.findall(r"<!-- prove a copy -->\n```bash\n(.*)\n```", SECTION)
    python, *words = shlex.split(command)
    assert python == ".venv/bin/python" and words[-1] == "tests/loop"
    words[words.index("-n") + 1] = "0"  # other tests run beside
    done = subprocess.run(
        [sys.executable, *words, *options],
        cwd=folder,
        env=launch_environment() | SIDE_BY_SIDE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_started_project_proves_itself(tmp_path):
    """What launches nothing. test_tasks.py has launches of each task, and --all has all."""
    start_project(tmp_path / "copy", "causal_lm")
    said = prove(tmp_path / "copy", "-m", "not slow")
    assert int(re.search(r"(\d+) passed", said)[1]) > 50 and "skipped" not in said, said


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_all_proofs_of_a_started_project(task, tmp_path):
    start_project(tmp_path / "copy", task)
    prove(tmp_path / "copy", "--all")
