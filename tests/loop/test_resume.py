"""Runs that are killed, asked to end, or cannot save, and that the same command brings to the end they would have had."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import (
    REPOSITORY,
    SIDE_BY_SIDE,
    column,
    launch,
    launch_environment,
    read_log,
    write_data,
)
from safetensors.torch import load_file

import train
from runtime.checkpoint import (
    MANIFEST,
    describe_file,
    load_training_state,
    newest_checkpoint,
    read_checkpoint,
)
from runtime.launch import UserError

OPTIONS = [
    "--max_steps",
    20,
    "--save_every",
    4,
    "--eval_every",
    7,
    "--log_every",
    3,
    "--num_negatives",
    3,
    "--num_workers",
    1,
]
OPTIONS += [
    "--per_device_batch_size",
    2,
    "--gradient_accumulation_steps",
    2,
    "--learning_rate",
    1e-2,
    "--save_total_limit",
    3,
]
OPTIONS += ["--per_device_eval_batch_size", 4]


ALONE = Namespace(
    process_index=0, num_processes=1, print=print
)  # all of an Accelerator that checking a checkpoint takes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module")
def start(data, tiny_model):
    """Launches the run, with dropout, accumulation and a DataLoader worker, on two processes."""

    def start(output_dir, *arguments, at=None, what=None, **options):
        arguments = flags(data, tiny_model, output_dir, *arguments)
        environment = {"AT": at, "WHAT": what} if at else {}
        options = {"config": "cpu_2_processes", "check": False} | options
        return launch("tests/loop/interrupted_run.py", *arguments, **options, **environment)

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "output"
    done = start(folder)
    assert done.returncode == 0, done.stdout
    return folder


def flags(data, model, output_dir, *others):
    return [
        str(word)
        for word in (
            "--data_dir",
            data,
            "--model_name_or_path",
            model,
            "--output_dir",
            output_dir,
            *OPTIONS,
            *others,
        )
    ]


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


def assert_the_same_run(folder, uninterrupted, last=20):
    ours, theirs = read_log(folder)[1], read_log(uninterrupted)[1]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]  # each step once
    for line, expected in zip(ours, theirs, strict=True):
        for name in expected:
            assert name == "train/samples_per_second" or line[name] == expected[name], (
                line["step"],
                name,
            )
    for path in ("best", f"checkpoints/step_{last:08d}"):
        weights, expected = (
            load_file(each / path / "model.safetensors") for each in (folder, uninterrupted)
        )
        assert weights.keys() == expected.keys() and all(
            weights[name].equal(expected[name]) for name in expected
        )
    assert (folder / "metric.csv").read_bytes() == (uninterrupted / "metric.csv").read_bytes()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        path.name for path in (uninterrupted / "checkpoints").iterdir()
    }


@pytest.mark.slow
def test_interrupted_again_and_again(start, uninterrupted, tmp_path):
    """Killed in saves; asked to end in the middle of an accumulation window, in an evaluation and in a save: the run ends with
    the bits of the one that was not interrupted."""
    folder = tmp_path / "output"
    interruptions = [
        ("flush 3 0", "KILL", None),  # while best/ is saved, before the first checkpoint
        ("train_step 11 0", "TERM", [4, 6]),  # in the middle of update 6
        (
            "stop_if_asked 3 1",
            "INT",
            [4, 6, 7],
        ),  # in the evaluation after update 7, which is to be done again
        ("flush 2 1", "KILL", None),  # in the save of update 8
        ("flush 2 1", "TERM", [6, 7, 8]),  # in the same save, which is finished first
    ]
    for at, what, left in interruptions:
        done = start(folder, at=at, what=what)
        assert done.returncode != 0 and "interrupted at" in done.stdout, done.stdout
        if left:
            assert f"stopped, as asked, after update {left[-1]}" in done.stdout, done.stdout
            assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
                f"step_{step:08d}" for step in left
            ]
    done = start(folder)
    assert done.returncode == 0 and "going on from update 8 of 20" in done.stdout, done.stdout
    assert_the_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(uninterrupted, data, tiny_model, monkeypatch, capsys):
    before = contents(uninterrupted)
    # On one process, at the same global batch.
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", *flags(data, tiny_model, uninterrupted, "--gradient_accumulation_steps", 4)],
    )
    train.main()
    assert "holds a run that is finished (20 updates)" in capsys.readouterr().out
    assert before == contents(uninterrupted)


@pytest.mark.slow
def test_a_run_stopped_in_its_last_evaluation_does_it_again(
    uninterrupted, data, tiny_model, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "output"
    shutil.copytree(uninterrupted, folder)
    checkpoint = folder / "checkpoints" / "step_00000020"
    manifest, run = read_checkpoint(checkpoint)
    (checkpoint / "run.json").write_text(json.dumps(run | {"done": False}))
    manifest["files"]["run.json"] = describe_file(checkpoint / "run.json")
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", *flags(data, tiny_model, folder, "--gradient_accumulation_steps", 4)],
    )
    train.main()
    assert "going on from update 20 of 20" in capsys.readouterr().out
    ours, theirs = (read_log(each)[1][-1] for each in (folder, uninterrupted))
    assert {
        name: ours[name] for name in theirs if not name.startswith("train/")
    }.items() <= theirs.items()
    assert (folder / "metric.csv").read_bytes() == (uninterrupted / "metric.csv").read_bytes()
    train.main()
    assert "holds a run that is finished (20 updates)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_every_strategy_goes_on(config, start, tmp_path):
    """Whose processes each hold a part of weights and optimizer."""
    options = {
        "config": config,
        "mixed_precision": "no",
        "FSDP2_ON_CPU": "1" if config == "fsdp2" else "",
    }
    assert start(tmp_path / "one", **options).returncode == 0
    done = start(
        tmp_path / "two", at="train_step 21 0", what="TERM", **options
    )  # in the middle of update 11
    assert "stopped, as asked, after update 11" in done.stdout, done.stdout
    assert start(tmp_path / "two", **options).returncode == 0
    assert_the_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_one_process_that_dies_ends_the_others(start, tmp_path):
    done = start(tmp_path / "output", at="train_step 9 1", what="DIE")
    died = float(re.search(r"interrupted at (\S+)", done.stdout)[1])
    assert done.returncode != 0 and time.time() - died < 60
    assert (
        done.stdout.count("another process ended") == 1
        and "Traceback" not in done.stdout.split("another process")[0]
    )


@pytest.mark.slow
def test_processes_without_a_launcher_end(start, tmp_path):
    """As after SIGUSR1 or SIGKILL to `accelerate launch`: they save, and end by themselves."""
    done = start(
        tmp_path / "output", at="train_step 11 0", what="ORPHAN"
    )  # returns once the last of them is gone
    assert "stopped, as asked, after update 6" in done.stdout, done.stdout
    assert newest_checkpoint(ALONE, tmp_path / "output" / "checkpoints").name == "step_00000006"


@pytest.mark.slow
def test_a_shell_that_ends_leaves_the_run_alone(data, tiny_model, tmp_path):
    """As after `nohup python train.py &` and a log-out."""
    arguments = flags(
        data, tiny_model, tmp_path / "output", "--report_to", "none", "--max_steps", 60
    )
    program = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *arguments])
    # The shell is there until training has begun, and gone long before it is at its end.
    shell = f"{program} > log 2>&1 & while kill -0 $! && ! grep -q '^update  *0 ' log; do sleep 0.1; done"
    subprocess.run(
        shell, shell=True, cwd=tmp_path, env=launch_environment() | SIDE_BY_SIDE, check=True
    )
    for _ in range(600):
        log = (tmp_path / "log").read_text()
        if "to evaluate it again" in log or "stopped, as asked" in log or "Error" in log:
            break
        time.sleep(0.2)
    assert "60 updates of 4 rows" in log, log


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    accelerator = train.make_accelerator()
    model = torch.nn.Linear(2, 2)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(tmp_path / "training_state")
    load_training_state(accelerator, tmp_path)
    torch.save(Code(), tmp_path / "training_state" / "random_states_0.pkl")
    load_training_state(
        accelerator, tmp_path
    )  # accelerate leaves the random states as they are then
    torch.save(Code(), tmp_path / "training_state" / "optimizer.bin")
    with pytest.raises(UserError, match="holds something else than numbers"):
        load_training_state(accelerator, tmp_path)
    accelerator.free_memory()
    assert not (tmp_path / "it ran").exists()


@pytest.mark.slow
def test_a_disk_that_is_full(start, tmp_path):
    folder = tmp_path / "output"
    done = start(folder, at="flush 20 0", what="FULL")  # in the save of update 8
    (message,) = re.findall("^error: (.*)$", done.stdout, re.MULTILINE)
    assert (
        "checkpoint of update 8 could not be written" in message
        and "No space left on device" in message
    )
    assert "Safe: step_00000004" in message and "Traceback" not in done.stdout.split("error: ")[0]
    assert newest_checkpoint(ALONE, folder / "checkpoints").name == "step_00000004"


DAMAGES = {
    "one byte of the weights": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "one byte of the optimizer": lambda folder: flip_a_byte(
        folder / "training_state" / "optimizer.bin"
    ),
    "a file is missing": lambda folder: (
        folder / "training_state" / "random_states_1.pkl"
    ).unlink(),
    "an empty file": lambda folder: (folder / "run.json").write_bytes(b""),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, capsys):
    for number, (damage, apply) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        shutil.copytree(uninterrupted / "checkpoints", folder)
        (folder / ".step_00000024-unfinished").mkdir()
        apply(folder / "step_00000020")
        assert newest_checkpoint(ALONE, folder).name == "step_00000016", damage
        assert "step_00000020 is damaged, so it is passed over" in capsys.readouterr().out


@pytest.mark.slow
def test_going_on_with_another_number_of_processes(start, uninterrupted, tmp_path):
    """At the same global batch: the same rows in the same order. The damaged checkpoint is replaced."""
    folder = tmp_path / "output"
    shutil.copytree(uninterrupted, folder)
    (folder / "checkpoints" / "step_00000020" / "run.json").write_text("{}")
    done = start(folder, "--gradient_accumulation_steps", 4, config="cpu")
    assert done.returncode == 0 and "going on from update 16 of 20" in done.stdout, done.stdout
    assert newest_checkpoint(ALONE, folder / "checkpoints").name == "step_00000020"
    ours, theirs = (column(read_log(each)[1], "train/loss") for each in (folder, uninterrupted))
    assert ours == pytest.approx(theirs, rel=0.05)  # but for the dropout, which is another one
    assert column(read_log(folder)[1], "train/learning_rate") == column(
        read_log(uninterrupted)[1], "train/learning_rate"
    )


@pytest.mark.slow
@pytest.mark.long
def test_going_on_in_another_folder(start, uninterrupted, tmp_path):
    folder = tmp_path / "output"
    done = start(folder, "--resume", uninterrupted / "checkpoints" / "step_00000016")
    assert done.returncode == 0 and "going on from update 16 of 20" in done.stdout, done.stdout
    assert [line["step"] for line in read_log(folder)[1]] == [18, 20] and (folder / "best").is_dir()
    assert read_log(folder)[1][-1]["eval/loss"] == read_log(uninterrupted)[1][-1]["eval/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per_device_batch_size", "8"], "global_batch_size was 8, is 32"),
        (
            ["--seed", "1", "--warmup_ratio", "0.5"],
            "warmup_ratio was 0.1, is 0.5; seed was 0, is 1",
        ),
        (["--resume", "never"], "holds a run already"),
        (["--resume", "nowhere"], "--resume nowhere: no checkpoint is there"),
    ],
)
def test_a_folder_of_another_run_is_refused(arguments, message, uninterrupted, data, tiny_model):
    before = contents(uninterrupted)
    config = train.read_config(
        flags(data, tiny_model, uninterrupted, "--gradient_accumulation_steps", 4, *arguments)
    )
    accelerator = train.make_accelerator()
    model = train.load_model(tiny_model)
    datasets = train.read_datasets(config, model, ("train", "eval", "test_vocabulary"))
    with pytest.raises(UserError, match=message):
        train.make_output_dir(accelerator, config)
        train.find_checkpoint(accelerator, config, train.make_state(accelerator, config, datasets))
    assert before == contents(uninterrupted)
