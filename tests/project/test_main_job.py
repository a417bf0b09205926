"""What the README shows: its commands, its files, and what the default run reaches."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, column, launch, read_csv, read_log
from transformers import AutoModel

from data import decode_image

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def arguments_of(marker, script):
    """What the README's command after <!-- marker --> gives to a script that it launches."""
    words = shlex.split(README.split(f"{marker}\n```bash\n")[1].split("\n```")[0])
    first = words.index(script)
    assert words[first - 4 : first] == [
        ".venv/bin/accelerate",
        "launch",
        "--config_file",
        "accelerate_config/cpu.yaml",
    ]
    return words[first + 1 :]


@pytest.mark.slow
def test_the_default_run_learns(tmp_path, monkeypatch):
    """The README's commands, in an empty folder: they build the data, train, reach what is promised, and evaluate it again."""
    launch("train.py", *arguments_of("<!-- main job -->", "train.py"), cwd=tmp_path, wandb=True)
    first, lines = read_log(tmp_path / "output")
    assert first["data"]["default_data/csv/test_vocabulary.csv"] == {
        "used": 500,
        "no_candidates": 5,
        "too_many_candidates": 5,
    }
    last = lines[-1]["step"]
    for name, least in (("rerank/Recall@1", 0.62), ("rerank/MRR@100", 0.73)):
        assert column(lines, name)[0] < 0.4 and column(lines, name)[last] >= least
    done = launch("evaluate.py", *arguments_of("<!-- evaluate -->", "evaluate.py"), cwd=tmp_path)
    losses = column(lines, "eval/loss")
    best = column(lines, "rerank/MRR@100")[min(losses, key=losses.get)]
    assert f"{'rerank/MRR@100':<20}{best:10.6f}" in done.stdout

    # the example of how to use the model: the scores of a query's candidates
    monkeypatch.chdir(tmp_path)
    row = next(
        row
        for row in read_csv(Path("evaluation/metric.csv"))
        if row["x_image_path"] == "test_vocabulary_00000"
    )
    paths = [f"default_data/elements/{key}.png" for key in json.loads(row["candidate_resourceKey"])]
    names = {"AutoModel": AutoModel, "torch": torch, "decode_image": decode_image, "paths": paths}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert names["scores"].tolist() == pytest.approx(json.loads(row["score"]), abs=1e-5)


def test_the_file_map_is_the_repository():
    named = set(
        re.findall(
            r"^\| `([\w/]+(?:\.py)?)/?` \|",
            README.split("## The files")[1].split("##")[0],
            re.MULTILINE,
        )
    )
    there = {path.name for path in REPOSITORY.glob("*.py")} | {"accelerate_config", "tests"}
    assert {name.rstrip("/") for name in named} == there


def test_arrows_go_one_way():
    ours = {path.stem for path in REPOSITORY.glob("*.py")}
    imports = {
        name: ours
        & set(
            re.findall(
                r"^(?:import|from) (\w+)",
                (REPOSITORY / f"{name}.py").read_text(encoding="utf-8"),
                re.MULTILINE,
            )
        )
        for name in ours
    }
    assert not imports["metrics"] and not imports["data"] and not imports["model"]
    assert imports["checkpoint"] == imports["tracking"] == {"data"}
    assert imports["evaluate"] == {
        "metrics",
        "data",
        "model",
        "checkpoint",
        "launch",
        "gallery",
        "tracking",
    }
    assert imports["gallery"] == {"metrics", "data", "tracking"}
    assert not any("train" in imported for imported in imports.values())


def test_the_places_to_edit_are_marked():
    for name in ("data.py", "model.py", "train.py"):
        assert "EDIT HERE" in (REPOSITORY / name).read_text(encoding="utf-8")
