"""What the README shows: its commands, its files, and what the default run reaches."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, column, launch, read_log
from page_data import read_csv
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
        "relevant_missing": 0,
        "relevant_alone": 0,
    }
    last = lines[-1]["step"]
    for name, least in (("rerank/Recall@1", 0.62), ("rerank/MRR@100", 0.73)):
        assert column(lines, name)[0] < 0.4 and column(lines, name)[last] >= least
    done = launch("evaluate.py", *arguments_of("<!-- evaluate -->", "evaluate.py"), cwd=tmp_path)
    losses = column(lines, "eval/loss")
    best = column(lines, "rerank/MRR@100")[min(losses, key=losses.get)]
    assert f"{'rerank/MRR@100':<24}{best:10.6f}" in done.stdout

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
    files = README.split("## The files")[1].split("##")[0]
    named = re.findall(r"^\| `([\w/]+(?:\.py)?)/?` \|", files, re.MULTILINE)
    there = {path.name for path in REPOSITORY.glob("*.py")}
    there |= {"accelerate_config", "runtime", "tests", "tools"}
    assert {name.rstrip("/") for name in named} == there and len(named) == len(there)


# What a file may import: of the project, or of the two folders.
ARROWS = {
    "train.py": {"evaluate", "report", "config", "data", "model", "runtime", "sample_data"},
    "evaluate.py": {"report", "config", "data", "metrics", "model", "runtime"},
    "report.py": {"data", "metrics", "runtime"},
    "config.py": {"runtime"},
    "data.py": {"model", "runtime"},
    "model.py": set(),
    "metrics.py": set(),
    "sample_data.py": {"runtime"},
    "runtime": {"runtime"},
    "tools": {"report"},
}


def test_arrows_go_one_way():
    """train -> evaluate -> {report, data, config} -> {model, metrics, runtime}"""
    top = list(REPOSITORY.glob("*.py"))
    assert {path.name for path in top} | {"runtime", "tools"} == ARROWS.keys()
    ours = {path.stem for path in top} | {"runtime", "tools", "tests"}
    for name, allowed in ARROWS.items():
        path = REPOSITORY / name
        for file in path.glob("*.py") if path.is_dir() else [path]:
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            imported = {
                alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
            }
            imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            imported = {module.partition(".")[0] for module in imported} & ours
            assert imported <= allowed, (file.name, imported - allowed)


def test_the_places_to_edit_are_marked():
    for name in ("data.py", "model.py", "metrics.py", "config.py", "evaluate.py", "train.py"):
        assert "EDIT HERE" in (REPOSITORY / name).read_text(encoding="utf-8")
