"""For the first hour on a GPU: python -m pytest tests/gpu --all

With no GPU the cases that can run on CPUs do. The others have never run yet.
"""

import math
import re

import pytest
import torch
from conftest import column, launch, read_log
from page_data import make_backbone

pytestmark = [pytest.mark.slow, pytest.mark.long]
GPUS = torch.cuda.device_count()
ONE, SEVERAL = ("single_gpu", "multi_gpu") if GPUS else ("cpu", "cpu_2_processes")
NEVER_RUN = pytest.mark.skipif(GPUS < 1, reason="never run yet: it needs a GPU")
NEVER_RUN_ON_TWO = pytest.mark.skipif(GPUS < 2, reason="never run yet: it needs two GPUs")
FLAGS = ["--max_steps", 8, "--save_steps", 4, "--eval_steps", 0, "--logging_steps", 1]
FLAGS += ["--save_total_limit", 0, "--learning_rate", 3e-5, "--report_to", "none"]


@pytest.fixture(scope="module")
def train(tiny, tmp_path_factory):
    """Runs train.py on a tiny DINOv2. Returns (its folder, what it said, the lines of its log)."""
    folder = tmp_path_factory.mktemp("gpu")
    make_backbone(folder / "dinov2", "dinov2", hidden_dropout_prob=0.1)

    def run(name, *flags, script="train.py", config=ONE, processes=1, precision="no", **options):
        batch = ["--per_device_train_batch_size", 12 // processes]
        model = ["--model_name_or_path", folder / "dinov2"]
        arguments = tiny.flags(folder / name, *FLAGS, *batch, *model, *flags)
        options |= {"config": config, "processes": processes, "mixed_precision": precision}
        done = launch(script, *arguments, **options)
        return folder / name, done.stdout, read_log(folder / name)[1]

    return run


def losses(lines):
    return list(column(lines, "train/loss").values())


@pytest.mark.parametrize("processes", [2] if GPUS < 2 else [2, GPUS])
def test_1_dinov2_under_ddp(train, processes):
    _, said, lines = train(f"ddp {processes}", config=SEVERAL, processes=min(processes, 12))
    assert "frozen" in said and len(losses(lines)) == 8
    if GPUS:
        assert lines[-1]["train/peak_memory_GB"] > 0


@NEVER_RUN
def test_2_an_update_never_waits(train):
    train(
        "waits",
        "--max_steps",
        21,
        "--logging_steps",
        0,
        script="tests/gpu/on_gpu.py",
        DO="no waits",
    )


def test_3_the_same_bits_twice(train):
    """With --full_determinism. How far two runs are from each other without it is printed."""
    found = {}
    for flags in ([], ["--full_determinism"]):
        runs = [losses(train(f"{flags} {number}", *flags)[2]) for number in (1, 2)]
        found[len(flags)] = max(abs(one - two) for one, two in zip(*runs, strict=True))
    print(f"without --full_determinism losses differ by {found[0]:.1e}")
    assert found[1] == 0


def test_4_resumed(train):
    folder, _, lines = train("whole", "--full_determinism")
    from_ = ["--resume_from_checkpoint", folder / "checkpoints" / "step_00000004"]
    _, _, again = train("resumed", "--full_determinism", *from_)
    assert losses(again) == losses(lines)[4:]


def test_5_one_metric_csv(train, tmp_path):
    best = train("for evaluate.py")[0] / "best"
    written = []
    for processes in range(1, max(GPUS, 2) + 1) if GPUS != 1 else (1,):
        to = ["--model_dir", best, "--output_dir", tmp_path / str(processes)]
        launch("evaluate.py", *to, config=SEVERAL if processes > 1 else ONE, processes=processes)
        written.append((tmp_path / str(processes) / "metric.csv").read_bytes())
    assert len(set(written)) == 1


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=NEVER_RUN)])
def test_6_half_precision(train, precision):
    _, _, lines = train(precision, precision=precision)
    assert all(math.isfinite(loss) for loss in losses(lines))
    if precision == "fp16":  # the first scale is too large, so an update is skipped
        assert None in column(lines, "train/grad_norm").values()


def test_7_compiled(train):
    _, _, plain = train("plain")
    flags = ["--dynamo_backend", "inductor"]
    _, _, lines = train("compiled", launch_flags=flags, timeout=1800)
    # Of the untrained model: inductor draws another dropout.
    ours, theirs = (column(each, "eval/loss")[0] for each in (lines, plain))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(losses(lines)) == 8


@pytest.mark.parametrize("config", ["zero3", pytest.param("fsdp2", marks=NEVER_RUN_ON_TWO)])
def test_8_asked_to_end_and_the_same_command(train, config):
    options = {"script": "tests/loop/interrupted_run.py", "config": config, "processes": 2}
    options |= {"precision": "bf16" if GPUS else "no", "check": False}
    whole = train(f"{config} whole", "--full_determinism", **options)[2]
    for when in ("after update 5", "never"):
        name, what = f"{config} asked", {"WHEN": when, "WHAT": "TERM"}
        _, said, lines = train(name, "--full_determinism", **options, **what)
        assert ("stopped after update 5" in said) == (when != "never")
    assert losses(lines) == losses(whole)


@NEVER_RUN_ON_TWO
def test_9_a_process_that_is_slow_for_longer_than_nccl_waited(train):
    options = {"config": SEVERAL, "processes": 2, "DO": "slow", "SECONDS_SLOW": "660"}
    _, _, lines = train("slow", script="tests/gpu/on_gpu.py", timeout=1200, **options)
    assert len(losses(lines)) == 8


@NEVER_RUN
def test_10_the_time_of_an_update_outside_kernels(train):
    """For a figure of a model of size: --model_name_or_path, and larger batches, by hand."""
    flags = ["--max_steps", 31, "--logging_steps", 0]
    said = train("busy", *flags, script="tests/gpu/on_gpu.py", precision="bf16", DO="busy")[1]
    print(re.search(r"20 updates: .* in kernels", said)[0])
