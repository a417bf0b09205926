"""What goes to the trackers. A real run with wandb is in test_resume.py."""

import math
import subprocess
import sys
from argparse import Namespace

import pytest
import yaml
from conftest import REPOSITORY, read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Config
from runtime.launch import UserError, make_accelerator
from runtime.tracking import make_trackers, show, start_trackers


def log_a_run(folder, step, lines):
    """As train.py does from update `step` on; lines: {step: values}."""
    config = Config(output_dir=str(folder), report_to="tensorboard")
    state = Namespace(step=step, done=step > 0, versions={"torch": "1"}, depends_on={"seed": 0})
    accelerator = make_accelerator(
        log_with=make_trackers("tensorboard", config.output_dir), project_dir=config.output_dir
    )
    start_trackers(accelerator, config, state, [Namespace(path="train.csv", counts={"used": 1})])
    for line_step, values in lines.items():
        accelerator.log(values, step=line_step)
    accelerator.end_training()


def test_tensorboard_holds_what_log_jsonl_holds(tmp_path):
    """A NaN is a point without a value in both. After an interruption log.jsonl has no step twice.

    For TensorBoard the resumed run is another one, with points of its own.
    """
    before = {0: {"eval/loss": 3.0}, 2: {"eval/loss": 2.0, "train/grad_norm": math.nan}}
    log_a_run(tmp_path, 0, before | {4: {"eval/loss": 9.0}})
    log_a_run(tmp_path, 2, {4: {"eval/loss": 1.0}})
    first, lines = read_log(tmp_path)
    assert first["config"]["report_to"] == "tensorboard"
    assert [line["step"] for line in lines] == [0, 2, 4] and lines[2]["eval/loss"] == 1.0
    folder = tmp_path / Config.project
    events = EventAccumulator(str(folder)).Reload()
    losses = {(event.step, event.value) for event in events.Scalars("eval/loss")}
    assert {(0, 3.0), (2, 2.0), (4, 1.0)} <= losses
    ((step, value),) = [(event.step, event.value) for event in events.Scalars("train/grad_norm")]
    assert step == 2 and math.isnan(value) and lines[1]["train/grad_norm"] is None
    files = list(folder.glob("*/hparams.yml"))
    rates = {yaml.safe_load(path.read_text())["config.learning_rate"] for path in files}
    assert rates == {Config.learning_rate}


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
        make_trackers(report_to, "output")


@pytest.mark.slow
def test_trackers_are_those_that_were_asked_for(tmp_path):
    """With none wandb is not even imported."""
    for report_to, names in (("none", []), ("wandb, tensorboard", ["wandb", "tensorboard"])):
        assert make_trackers(report_to, tmp_path)[1:] == names
    program = (
        "import sys, train; train.make_trackers('wandb', '.'); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_the_bar_has_the_latest_of_all():
    shown = []
    progress = Namespace(set_postfix_str=shown.append, disable=False, write=shown.append)
    state = Namespace(
        step=0,
        progress=progress,
        evaluations={0: {"eval/loss": 2.0}},
        training_config={"metric_for_best_model": "eval/loss"},
    )
    for main in (True, False):
        accelerator = Namespace(is_main_process=main)
        show(accelerator, state, {"eval/loss": 2.0, "eval/a": 1, "eval/b": 2, "eval/c": 3})
        show(accelerator, state, {"train/loss": 1.5, "train/samples_per_second": 99.6})
    evaluation = "eval/loss 2.0000  eval/a 1.0000  eval/b 2.0000  eval/c 3.0000"
    assert shown == [f"update      0  {evaluation}", "loss 1.5000, 100 rows/s, eval/loss 2.0000"]
