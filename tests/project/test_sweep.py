"""sweep.yaml: what wandb's agent makes of it reaches the config."""

import os

import pytest
import yaml
from conftest import REPOSITORY
from wandb.wandb_agent import Agent

from config import read_config
from evaluate import check_metric_prefix

SWEEP = yaml.safe_load((REPOSITORY / "sweep.yaml").read_text(encoding="utf-8"))


def sampled(seed):
    """As the server would deal: one value of each parameter."""
    return {
        name: {"value": how["values"][seed] if "values" in how else how["min"] * (1 + seed)}
        for name, how in SWEEP["parameters"].items()
    }


@pytest.mark.slow
def test_a_sweep_reaches_the_config(tmp_path, monkeypatch):
    """wandb's own agent runs the command; `accelerate` writes down what it is given."""
    script = '#!/bin/bash\nprintf "%s\\n" "$@" > "$WANDB_DIR/$WANDB_RUN_ID"\n'
    (tmp_path / "accelerate").write_text(script)
    (tmp_path / "accelerate").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, str(tmp_path))  # the agent sets them, and they must not stay
    agent = Agent(api=None, queue=None)
    agent._sweep_command = SWEEP["command"]
    output_dirs = set()
    for seed, run_id in enumerate(["first", "second"]):
        agent._command_run({"run_id": run_id, "program": SWEEP["program"], "args": sampled(seed)})
        assert agent._run_processes[run_id].wait() == 0
        given = (tmp_path / run_id).read_text().splitlines()
        assert given[:4] == ["launch", "--config_file", "accelerate_config/cpu.yaml", "train.py"]
        config = read_config(given[4:])
        for name, how in sampled(seed).items():
            assert getattr(config, name) == how["value"]
        output_dirs.add(config.output_dir)
    # Of its own each: a second run would be refused in the folder of the first.
    assert output_dirs == {"output/sweep/first", "output/sweep/second"}
    check_metric_prefix(SWEEP["metric"]["name"])
