"""Launches: each config as it stands, and those that accelerate would quietly change."""

import os
import re
import signal
import subprocess
from argparse import Namespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import REPOSITORY, SIDE_BY_SIDE, column, launch, launch_environment, read_log, refused
from torch.distributed.fsdp import MixedPrecisionPolicy

import runtime.launch
from runtime.launch import UserError, check_shared

CONFIGS = sorted((REPOSITORY / "accelerate_config").glob("*.yaml"))
FEW = ["--max_steps", 2, "--per_device_train_batch_size", 8, "--report_to", "none"]
FEW += ["--per_device_eval_batch_size", 4, "--logging_steps", 1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_says_when_and_how(path):
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert f"accelerate launch --config_file accelerate_config/{path.name} " in comment
    if path.stem not in ("cpu", "cpu_2_processes", "single_gpu"):
        assert "Memory of" in comment and "Traffic of" in comment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (None, {}, "several processes were asked for and one was started"),
        pytest.param(
            *("fsdp2", {}, "accelerate made MULTI_CPU of it; it runs FSDP on GPUs only"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("zero1", {"ACCELERATE_USE_CPU": "true"}),
            "the launch asks for DEEPSPEED, and accelerate made MULTI_CPU of it",
            marks=pytest.mark.long,
        ),
        (
            *("cpu", {"processes": None, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
            "asks for accumulation 4, the command for 1",
        ),
        pytest.param(
            *("cpu", {"processes": None, "WORLD_SIZE": "2"}),
            "the launch: Tried to launch on distributed with multinode",
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_silent_fall_back(config, environment, message, tiny, tmp_path):
    options = {"config": config, "processes": 2, "mixed_precision": "no"} | environment
    assert message in refused("train.py", *tiny.flags(tmp_path / "output", *FEW), **options)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("made", "environment", "message"),
    [
        ({"gradient_accumulation_steps": 4}, {}, "asks for accumulation 4, the command for 1"),
        ({"num_processes": 2}, {}, "1 processes were launched, .* sees 2"),
        ({}, {"MASTER_ADDR": "x", "ACCELERATE_USE_CPU": "true"}, "several processes were asked"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, .* FSDP on GPUs only"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED, and accelerate made NO"),
        ({"distributed_type": DistributedType.DEEPSPEED}, {}, "does not ask for DEEPSPEED"),
        (
            {"distributed_type": DistributedType.FSDP, "is_fsdp2": False},
            *({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not"),
        ),
        ({"mixed_precision": "fp16"}, {}, "fp16 needs a GPU"),
        ({"mixed_precision": "bf61"}, {}, "bf61; name one of"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for(made, environment, message, monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plain = {"num_processes": 1, "gradient_accumulation_steps": 1, "mixed_precision": "no"}
    plain |= {"distributed_type": DistributedType.NO, "device": torch.device("cpu")}
    with pytest.raises(UserError, match=message):
        runtime.launch.check_launch(Namespace(**plain | made), 1)


def test_gradients_are_summed_in_float32(monkeypatch):
    config = {}
    plugin = Namespace(deepspeed_config=config)
    runtime.launch.set_up_deepspeed(Namespace(deepspeed_plugin=plugin), 1.0, 2)
    assert config["communication_data_type"] == "fp32"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    plugin = Namespace(mixed_precision_policy=policy)
    made = {"distributed_type": DistributedType.FSDP, "mixed_precision": "bf16", "print": print}
    made |= {"num_processes": 2, "device": torch.device("cpu")}
    fsdp = Namespace(state=Namespace(fsdp_plugin=plugin), **made)
    monkeypatch.setattr(runtime.launch, "Accelerator", lambda **options: fsdp)
    monkeypatch.setattr(runtime.launch, "check_launch", lambda *_: None)
    runtime.launch.make_accelerator()
    policy = plugin.mixed_precision_policy
    assert policy.reduce_dtype == torch.float32 and policy.output_dtype is None


def test_a_stop_is_agreed_on_between_the_hosts(monkeypatch):
    """On gloo: on NCCL it would wait for the device."""
    asked, nothing = {}, Namespace(signal=0, group=None, launcher=None)
    monkeypatch.setattr(runtime.launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(runtime.launch, "_stop", nothing)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, **_: f"of {backend}")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _, **given: asked.update(given))
    runtime.launch.watch_for_stop(Namespace(num_processes=2))
    nothing.launcher = None
    runtime.launch.stop_if_asked()
    assert asked["group"] == "of gloo"


@pytest.mark.parametrize("number", runtime.launch.STOP)
def test_a_signal_waits_for_the_end_of_the_update(number, monkeypatch):
    monkeypatch.setattr(runtime.launch, "_stop", Namespace(signal=0, group=None, launcher=None))
    before = {number: signal.getsignal(number) for number in runtime.launch.STOP}
    runtime.launch.watch_for_stop(Namespace(num_processes=1))
    os.kill(os.getpid(), number)
    with pytest.raises(runtime.launch.Stopped) as stopped:
        runtime.launch.stop_if_asked()
    for each, handler in before.items():
        signal.signal(each, handler)
    assert stopped.value.status == 128 + number


@pytest.mark.parametrize("asked", [False, True])
def test_determinism_is_asked_for_and_tf32_is_off(asked, monkeypatch):
    found = []
    monkeypatch.setattr(runtime.launch, "enable_full_determinism", found.append)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    runtime.launch.make_accelerator(full_determinism=asked)
    assert found == [0] * asked
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_machines_that_do_not_share_a_disk(tmp_path, monkeypatch):
    reader = Namespace(wait_for_everyone=lambda: None)
    check_shared(reader, tmp_path)
    assert not list(tmp_path.iterdir())

    def tell(name):
        name[0] = "what the first wrote on its own disk"

    monkeypatch.setattr(runtime.launch, "broadcast_object_list", tell)
    with pytest.raises(UserError, match="name a shared disk"):
        check_shared(reader, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_fp16_needs_a_gpu(tiny, tmp_path):
    options = {"mixed_precision": "fp16", "config": None}
    flags = tiny.flags(tmp_path / "output", *FEW)
    assert "fp16 needs a GPU" in refused("train.py", *flags, **options)


@pytest.mark.slow
@pytest.mark.long
def test_deepspeed_is_told_one_thing_only(tiny, tmp_path):
    config = (REPOSITORY / "accelerate_config" / "zero1.yaml").read_text(encoding="utf-8")
    stage = "zero_stage: 1"
    assert stage in config
    config = config.replace(stage, f"{stage}\n  gradient_clipping: 0.5")
    (tmp_path / "zero1.yaml").write_text(config)
    message = refused(
        *("train.py", *tiny.flags(tmp_path / "output", *FEW, "--max_grad_norm", 1.0)),
        config=tmp_path / "zero1.yaml",
        mixed_precision="no",
    )
    assert "the DeepSpeed config has gradient_clipping 0.5, the command 1.0" in message


@pytest.mark.slow
@pytest.mark.long
def test_bf16_under_fsdp2(tiny, tmp_path):
    """It would hand out losses in bfloat16, which has three digits."""
    launch(
        *("tests/loop/interrupted_run.py", *tiny.flags(tmp_path / "output", *FEW)),
        config="fsdp2",
        mixed_precision="bf16",
        FSDP2_ON_CPU="1",
    )
    first, lines = read_log(tmp_path / "output")
    assert first["mixed_precision"] == "bf16" and first["strategy"] == "FSDP"
    losses = column(lines, "train/loss").values()
    # Of 16 values in bfloat16 the mean would be a multiple of 2**-11 here.
    assert len(losses) == 2 and not all(loss * 2**11 % 1 == 0 for loss in losses)


@pytest.mark.slow
def test_bf16_and_no_config_file(tiny, tmp_path):
    """evaluate.py alone: with the precision and data of the training, the number that was logged."""
    options = {"config": None, "mixed_precision": "bf16"}
    launch("train.py", *tiny.flags(tmp_path / "output", *FEW), **options)
    first, lines = read_log(tmp_path / "output")
    assert first["mixed_precision"] == "bf16" and list(column(lines, "train/loss")) == [1, 2]
    best = tmp_path / "output" / "best"
    done = launch("evaluate.py", "--model_dir", best, "--output_dir", tmp_path / "evaluation")
    name = first["config"]["metric_for_best_model"]
    printed = re.search(rf"^{re.escape(name)} +(\S+)$", done.stdout, re.MULTILINE)[1]
    assert printed in [f"{value:.6f}" for value in column(lines, name).values()]


@pytest.mark.slow
@pytest.mark.long
def test_evaluate_is_not_for_deepspeed(tiny, tmp_path):
    launch("train.py", *tiny.flags(tmp_path / "output", *FEW))
    options = {"config": "zero2", "mixed_precision": "no", "cwd": tmp_path}
    message = refused("evaluate.py", "--model_dir", tmp_path / "output" / "best", **options)
    assert "to evaluate launch with cpu, single_gpu or multi_gpu.yaml" in message


@pytest.mark.slow
@pytest.mark.long
def test_the_slurm_script(tiny, tmp_path):
    """As Slurm would run it on two machines of one GPU each: srun starts it on both."""
    for name, text in {
        "scontrol": "echo localhost; sleep 0.2; echo other",
        "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = launch_environment() | SIDE_BY_SIDE
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    environment |= {"SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    done = subprocess.run(
        ["bash", "accelerate_config/slurm.sbatch", *tiny.flags(tmp_path / "output", *FEW)],
        env=environment | {"SLURM_JOB_ID": "4321"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, lines = read_log(tmp_path / "output")
    assert (first["processes"], first["strategy"]) == (2, "MULTI_CPU") and lines[-1]["step"] == 2


# ---- what is refused before any training


@pytest.mark.slow
@pytest.mark.long
def test_what_is_refused_is_one_line(tiny, tmp_path):
    flags = tiny.flags(tmp_path / "output", "--model_name_or_path", "/nowhere")
    assert "--model_name_or_path /nowhere: " in refused("train.py", *flags)
