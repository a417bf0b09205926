"""Launches: each config as it stands, and those that accelerate would quietly make something else of."""

import re
import subprocess
from argparse import Namespace

import pytest
import yaml
from conftest import (
    REPOSITORY,
    SIDE_BY_SIDE,
    launch,
    launch_environment,
    read_log,
    refused,
    write_data,
)

from runtime.launch import UserError, check_shared

CONFIGS = sorted((REPOSITORY / "accelerate_config").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("launch") / "data")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_says_when_and_how(path):
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert f"accelerate launch --config_file accelerate_config/{path.name} " in comment
    assert path.stem in ("cpu", "cpu_2_processes", "single_gpu") or (
        "Memory of" in comment and "Traffic of" in comment
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (None, {}, "several processes were asked for and one was started"),
        (
            "fsdp2",
            {},
            "the launch asks for FSDP, and accelerate made MULTI_CPU of it; it runs FSDP on GPUs only",
        ),
        (
            "zero1",
            {"ACCELERATE_USE_CPU": "true"},
            "the launch asks for DEEPSPEED, and accelerate made MULTI_CPU of it",
        ),
    ],
)
def test_no_silent_fall_back(config, environment, message, tmp_path):
    options = {"config": config, "processes": 2, "mixed_precision": "no"}
    assert message in refused(
        "train.py", "--output_dir", tmp_path / "output", **options, **environment
    )
    assert not (tmp_path / "output").exists()


def test_machines_that_do_not_share_a_disk(tmp_path):
    main, other = (
        Namespace(is_main_process=main, wait_for_everyone=lambda: None) for main in (True, False)
    )
    check_shared(main, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="name a shared disk"):
        check_shared(other, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_fp16_needs_a_gpu(tmp_path):
    assert "fp16 needs a GPU" in refused(
        "train.py", "--output_dir", tmp_path / "output", mixed_precision="fp16", config=None
    )


@pytest.mark.slow
@pytest.mark.long
def test_deepspeed_is_told_one_thing_only(tmp_path):
    config = (REPOSITORY / "accelerate_config" / "zero1.yaml").read_text(encoding="utf-8")
    (tmp_path / "zero1.yaml").write_text(
        config.replace("zero_stage: 1", "zero_stage: 1\n  gradient_clipping: 0.5")
    )
    assert (
        yaml.safe_load((tmp_path / "zero1.yaml").read_text())["deepspeed_config"][
            "gradient_clipping"
        ]
        == 0.5
    )
    message = refused(
        "train.py",
        "--output_dir",
        tmp_path / "output",
        config=tmp_path / "zero1.yaml",
        mixed_precision="no",
    )
    assert "the DeepSpeed config has gradient_clipping 0.5, the command 1.0" in message


@pytest.mark.slow
@pytest.mark.long
def test_evaluate_is_not_for_deepspeed(tmp_path):
    (tmp_path / "training_config.json").write_text(
        '{"mixed_precision": "no", "per_device_eval_batch_size": 1}'
    )
    message = refused("evaluate.py", "--model_dir", tmp_path, config="zero2", mixed_precision="no")
    assert "to evaluate launch with cpu, single_gpu or multi_gpu.yaml" in message


@pytest.mark.slow
def test_bf16(data, tmp_path, tiny_model):
    """Under FSDP2, which would else hand out scores and losses in bfloat16. Under one process tests/test_train.py has it."""
    launch(
        *("tests/loop/recorded_run.py", "--data_dir", data, "--output_dir", tmp_path / "output"),
        *("--max_steps", 2, "--per_device_batch_size", 8, "--model_name_or_path", tiny_model),
        config="fsdp2",
        mixed_precision="bf16",
        RECORD=str(tmp_path),
        FSDP2_ON_CPU="1",
    )
    first, lines = read_log(tmp_path / "output")
    assert first["mixed_precision"] == "bf16" and lines[-1]["step"] == 2
    scores = re.findall(
        r'"\[([^"]*)\]"',
        (tmp_path / "output" / "metric.csv").read_text(encoding="utf-8").replace('""', "'"),
    )
    digits = [
        value
        for cell in scores
        for value in cell.split(", ")
        if re.fullmatch(r"-?0\.\d{7,}", value)
    ]
    assert len(digits) > 100  # bfloat16 has three


@pytest.mark.slow
def test_the_slurm_script(data, tmp_path, tiny_model):
    """As Slurm would run it on two machines of one GPU each: srun starts the command on both, with its number."""
    for name, text in {
        "scontrol": "echo localhost; echo other",
        "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = launch_environment() | SIDE_BY_SIDE
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    environment |= {
        "SLURM_JOB_NODELIST": "two",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "4321",
    }
    options = [
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "output",
        "--max_steps",
        2,
        "--per_device_batch_size",
        8,
    ]
    options += ["--model_name_or_path", tiny_model]
    done = subprocess.run(
        ["bash", "accelerate_config/slurm.sbatch", *map(str, options)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, lines = read_log(tmp_path / "output")
    assert (first["processes"], first["strategy"], lines[-1]["step"]) == (2, "MULTI_CPU", 2)
