"""What goes to the trackers. Real runs with wandb and log.jsonl are in tests/test_train.py."""

import math
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import yaml
from conftest import REPOSITORY, read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.wandb_agent import Agent

import train
from runtime.launch import UserError
from runtime.tracking import HEADLINES, make_trackers, show, start_trackers

SWEEP = yaml.safe_load((REPOSITORY / "sweep.yaml").read_text(encoding="utf-8"))


def log_a_run(folder, step, lines):
    """As train.py does from update `step` on; lines: {step: values}."""
    config = train.read_config(["--output_dir", str(folder), "--report_to", "tensorboard"])
    state = Namespace(step=step, done=step > 0, versions={"torch": "1"}, depends_on={"seed": 0})
    accelerator = train.make_accelerator(
        log_with=make_trackers(config), project_dir=config.output_dir
    )
    dataset = Namespace(rows=Namespace(path="train.csv", counts={"used": 1}))
    start_trackers(accelerator, config, state, [dataset])
    for step, values in lines.items():
        accelerator.log(values, step=step)
    accelerator.end_training()


def test_tensorboard_holds_what_log_jsonl_holds(tmp_path):
    """Of a run that was interrupted after its checkpoint of update 2 too; a NaN is a point without a value in both."""
    log_a_run(
        tmp_path,
        0,
        {
            0: {"eval/loss": 3.0},
            2: {"eval/loss": 2.0, "train/grad_norm": math.nan},
            4: {"eval/loss": 9.0},
        },
    )
    log_a_run(tmp_path, 2, {4: {"eval/loss": 1.0}})
    first, lines = read_log(tmp_path)
    assert first["config"]["report_to"] == "tensorboard" and [line["step"] for line in lines] == [
        0,
        2,
        4,
    ]
    events = EventAccumulator(str(tmp_path / "match-element")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [
        (0, 3.0),
        (2, 2.0),
        (4, 1.0),
    ]
    ((step, value),) = [(event.step, event.value) for event in events.Scalars("train/grad_norm")]
    assert step == 2 and math.isnan(value) and lines[1]["train/grad_norm"] is None
    hyperparameters = [
        yaml.safe_load(path.read_text()) for path in tmp_path.glob("match-element/*/hparams.yml")
    ]
    assert [values["config.learning_rate"] for values in hyperparameters] == [4e-3, 4e-3]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("wandb,tensorbord", "there is no 'tensorbord'; name some of .*wandb.*, or none"),
        ("none,wandb", "there is no 'none'"),
        ("", "there is no ''"),
        ("tensorboard,aim", r"aim is not installed \(there is .*wandb.*\): pip install aim"),
    ],
)
def test_a_tracker_that_is_not_there(report_to, message):
    with pytest.raises(UserError, match=message):
        make_trackers(Namespace(report_to=report_to, output_dir="output"))


@pytest.mark.slow
def test_trackers_are_those_that_were_asked_for(tmp_path):
    """With none, wandb is not even imported."""
    for report_to, names in (("none", []), ("wandb, tensorboard", ["wandb", "tensorboard"])):
        assert make_trackers(Namespace(report_to=report_to, output_dir=tmp_path))[1:] == names
    program = (
        "import sys, train; train.make_trackers(train.Config()); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_the_bar_has_the_latest_of_all(capsys):
    shown = []
    progress = Namespace(set_postfix_str=shown.append, disable=False, write=shown.append)
    state = Namespace(
        step=0,
        evaluations={0: {"eval/loss": 2.0}},
        training_config={"best_metric": "min:eval/loss"},
    )
    main = Namespace(is_main_process=True)
    show(main, progress, state, {"eval/loss": 2.0})
    state.step = 5
    show(main, progress, state, {"train/loss": 1.5, "train/samples_per_second": 99.6})
    assert shown == ["update      0  eval/loss 2.0000", "loss 1.5000, 100 rows/s, eval/loss 2.0000"]


# ---- wandb sweep


def sampled(seed):
    """As the server would deal: one value of each parameter."""
    return {
        name: {"value": how["values"][seed] if "values" in how else how["min"] * (1 + seed)}
        for name, how in SWEEP["parameters"].items()
    }


def test_a_sweep_reaches_the_config(tmp_path, monkeypatch):
    """wandb's own agent runs the command of sweep.yaml; `accelerate` writes down what it is given."""
    (tmp_path / "accelerate").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" > "$WANDB_DIR/$WANDB_RUN_ID"\n'
    )
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
        config = train.read_config(given[4:])
        for name, how in sampled(seed).items():
            assert getattr(config, name) == how["value"]
        output_dirs.add(config.output_dir)
    assert output_dirs == {
        "output/sweep/first",
        "output/sweep/second",
    }  # one folder would be refused to the second run
    assert SWEEP["metric"]["name"] in HEADLINES
