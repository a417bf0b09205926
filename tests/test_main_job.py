"""What the README shows: its commands, its files, and what the default run reaches."""

import re
import shlex

import pytest
from conftest import REPOSITORY, column, launch, read_log

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    """The README's command, in an empty folder: it builds the data, trains, and reaches what is promised."""
    command = re.search(r"<!-- main job -->\n```bash\n(.*)\n```", README)[1]
    assert shlex.split(command)[-5:] == [
        ".venv/bin/accelerate",
        "launch",
        "--config_file",
        "accelerate_config/cpu.yaml",
        "train.py",
    ]
    launch("train.py", config="cpu", cwd=tmp_path, wandb=True)
    first, lines = read_log(tmp_path / "output")
    assert first["data"]["default_data/csv/test_vocabulary.csv"] == {"used": 500, "no_candidates": 5, "too_many_candidates": 5}
    last = lines[-1]["step"]
    for name, least in (("rerank/Recall@1", 0.62), ("rerank/MRR@100", 0.73)):
        assert column(lines, name)[0] < 0.4 and column(lines, name)[last] >= least


def test_the_file_map_is_the_repository():
    named = set(re.findall(r"^\| `([\w/]+(?:\.py)?)/?` \|", README.split("## The files")[1].split("##")[0], re.MULTILINE))
    there = {path.name for path in REPOSITORY.glob("*.py")} | {"accelerate_config", "tests"}
    assert {name.rstrip("/") for name in named} == there


def test_arrows_go_one_way():
    ours = {path.stem for path in REPOSITORY.glob("*.py")}
    imports = {
        name: ours
        & set(re.findall(r"^(?:import|from) (\w+)", (REPOSITORY / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE))
        for name in ours
    }
    assert not imports["metrics"] and not imports["data"] and not imports["model"]
    assert imports["checkpoint"] == imports["tracking"] == {"data"}
    assert imports["evaluate"] == {"metrics", "data", "model", "checkpoint", "launch"}
    assert not any("train" in imported for imported in imports.values())


def test_the_places_to_edit_are_marked():
    for name in ("data.py", "model.py", "train.py"):
        assert "EDIT HERE" in (REPOSITORY / name).read_text(encoding="utf-8")
