"""Runs that are killed, asked to end, or cannot save: the same command brings each to its end.

All with dropout, accumulation and a DataLoader worker, on two processes.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import wandb_file
from conftest import (
    REPOSITORY,
    SIDE_BY_SIDE,
    column,
    launch,
    launch_command,
    launch_environment,
    not_under_nohup,
    read_log,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import train
from runtime.checkpoint import (
    MANIFEST,
    describe_file,
    load_training_state,
    newest_checkpoint,
    read_checkpoint,
)
from runtime.launch import UserError, errors_in_one_line

OPTIONS = ["--max_steps", 20, "--save_steps", 4, "--eval_steps", 7, "--logging_steps", 3]
OPTIONS += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
OPTIONS += ["--learning_rate", 1e-3, "--save_total_limit", 3, "--per_device_eval_batch_size", 4]
OPTIONS += ["--dataloader_num_workers", 1]
# On one process, at the same global batch.
ALONE = ["--gradient_accumulation_steps", 4, "--dataloader_num_workers", 0]
# All of an Accelerator that checking a checkpoint takes.
READER = Namespace(process_index=0, num_processes=1, print=print)


@pytest.fixture(scope="module")
def start(tiny):
    def start(output_dir, *arguments, when=None, what=None, on=0, **options):
        arguments = tiny.flags(output_dir, *OPTIONS, *arguments, dropout=True)
        environment = {"WHEN": when, "WHAT": what, "ON": str(on)} if when else {}
        options = {"config": "cpu_2_processes", "check": False} | options
        return launch("tests/loop/interrupted_run.py", *arguments, **options, **environment)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The output of a run that was not interrupted. wandb logs it offline."""
    folder = tmp_path_factory.mktemp("whole") / "output"
    done = start(folder, wandb=True, ROWS=str(folder.with_name("rows")))
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stdout
    return folder


@pytest.fixture
def run_alone(tiny, run_here):
    """train.py's main in this process, with flags over those of `start`."""

    def run_alone(output_dir, *flags):
        flags = [*OPTIONS, *ALONE, "--report_to", "none", *flags]
        run_here(train, tiny.flags(output_dir, *flags, dropout=True))

    return run_alone


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


def assert_same_weights(folder, other):
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, other))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)


def rows_of(path):
    """{update: its items, in order}, on however many processes."""
    found = defaultdict(list)
    for line in path.read_text().splitlines():
        update, _, items = line.partition(" ")
        found[int(update)] += json.loads(items)
    return {update: sorted(items) for update, items in sorted(found.items())}


def reports(folder):
    """{name: content} of what evaluations left, if anything."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "log.jsonl"]
    return {path.name: path.read_bytes() for path in files if path.suffix != ".yaml"}


def assert_the_same_run(folder, whole, last=20):
    ours, theirs = read_log(folder)[1], read_log(whole)[1]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]  # each step once
    for line in (*ours, *theirs):
        line.pop("train/samples_per_second", None)
    assert ours == theirs
    for path in ("best", f"checkpoints/step_{last:08d}"):
        assert_same_weights(folder / path, whole / path)
    assert reports(folder) == reports(whole)


# ---- what a run leaves


@pytest.mark.slow
def test_what_a_run_leaves(whole):
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"step_00000012", "step_00000016", "step_00000020"}
    model = {"config.json", "model.safetensors", "training_config.json", "README.md"}
    assert {path.name for path in (whole / "best").iterdir()} >= model
    checkpoint = {path.name for path in (whole / "checkpoints" / "step_00000020").iterdir()}
    assert checkpoint >= model | {"training_state", "run.json", "manifest.json"}
    assert not list(whole.glob("**/.*"))  # nothing unfinished
    first, lines = read_log(whole)
    assert first["processes"] == 2 and first["versions"]["torch"] == torch.__version__
    assert first["git_commit"] is None or re.fullmatch(
        r"[0-9a-f]{40}(-dirty)?", first["git_commit"]
    )
    evaluated = list(column(lines, first["config"]["metric_for_best_model"]))
    assert evaluated == [0, 7, 14, 20]
    logged = [3, 6, 7, 9, 12, 14, 15, 18, 20]
    assert [line["step"] for line in lines] == [0, *logged]
    for name in ("loss", "grad_norm", "learning_rate", "samples_per_second"):
        assert list(column(lines, f"train/{name}")) == logged


@pytest.mark.slow
def test_best_says_how_it_is_loaded(whole, tmp_path):
    """Its card, by the library of the hub. Its code, in a process that knows nothing of ours."""
    card = ModelCard.load(whole / "best" / "README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert any(metrics.items() <= line.items() for line in read_log(whole)[1] if metrics)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = code.replace("FOLDER", str(whole / "best"))
    code += "model.save_pretrained('again')"
    environment = launch_environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert_same_weights(tmp_path / "again", whole / "best")


@pytest.mark.slow
def test_wandb_offline_holds_what_log_jsonl_holds(whole):
    (path,) = (whole / "wandb").glob("offline-run-*/run-*.wandb")  # one run, of process 0
    history, config = wandb_file.read(path)
    first, lines = read_log(whole)
    assert list(history) == [line["step"] for line in lines]
    for line in lines:  # the pictures of an evaluation belong to the same point
        logged = {name: value for name, value in line.items() if name != "step"}
        assert logged.items() <= history[line["step"]].items()
    for name in ("config", "versions", "git_commit", "processes"):
        assert config[name] == first[name]


# ---- interrupted


STOPPED = "stopped after update {}"
INTERRUPTIONS = [  # when, what, on which process, the checkpoints that are there then, what is said
    # One process that dies ends the others.
    ("in update 3", "DIE", 1, [], "another process ended"),
    ("in the second evaluation", "WORKER", 1, [4, 7], STOPPED),  # it will be done again
    ("in the save of update 16", "KILL", 1, [7, 8, 12], "interrupted at"),
    ("after update 19", "TERM", 0, [12, 16, 19], STOPPED),
]


def interrupt(start, folder, when, what, on, left, said, **options):
    done = start(folder, "--report_to", "none", when=when, what=what, on=on, **options)
    at = float(re.search(r"interrupted at (\S+)", done.stdout)[1])
    assert done.returncode != 0 and time.time() - at < 60
    names = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    assert names == [f"step_{step:08d}" for step in left], when
    said = said.format(*left[-1:])
    assert done.stdout.count(said) == 1, done.stdout  # once, on however many processes
    assert what == "INT" or "Traceback" not in done.stdout.split(said)[0]
    return done.stdout


@pytest.mark.slow
def test_interrupted_again_and_again(start, whole, tmp_path):
    """The run ends with the bits of the one that was not interrupted."""
    folder = tmp_path / "output"
    for interruption in INTERRUPTIONS:
        interrupt(start, folder, *interruption)
    done = start(folder, "--report_to", "none")
    assert done.returncode == 0 and "resuming after update 19" in done.stdout, done.stdout
    assert_the_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_in_other_saves(start, whole, tmp_path):
    folder = tmp_path / "output"
    interrupt(start, folder, "in the save of best", "KILL", 0, [], "interrupted at")
    # As after SIGUSR1 or SIGKILL to `accelerate launch`: they save, and end by themselves.
    interrupt(start, folder, "in update 6", "ORPHAN", 0, [4, 6], STOPPED)
    said = "error: the checkpoint of update 8 could"
    text = interrupt(start, folder, "in the save of update 8", "FULL", 0, [4, 6], said)
    assert "No space left on device" in text and "Safe: step_00000006" in text
    # The save that was begun is finished first.
    interrupt(start, folder, "in the save of update 8", "TERM", 1, [4, 6, 8], STOPPED)
    # It is found when the next batch is fetched.
    interrupt(start, folder, "in update 9", "WORKER", 0, [6, 8, 10], STOPPED)
    interrupt(start, folder, "in the third evaluation", "INT", 1, [10, 12, 14], STOPPED)
    assert start(folder, "--report_to", "none").returncode == 0
    assert_the_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_every_strategy_resumes(config, start, tmp_path):
    """Their processes each hold a part of weights and optimizer."""
    options = {"config": config, "mixed_precision": "no"}
    options |= {"FSDP2_ON_CPU": "1"} if config == "fsdp2" else {}
    assert start(tmp_path / "one", **options).returncode == 0
    done = start(tmp_path / "two", when="in update 11", what="TERM", **options)
    assert "stopped after update 11" in done.stdout, done.stdout
    assert start(tmp_path / "two", **options).returncode == 0
    assert_the_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.long
def test_a_shell_that_ends_leaves_the_run_alone(tiny, tmp_path):
    """As after `nohup python train.py &` and a log-out."""
    arguments = tiny.flags(tmp_path / "output", *OPTIONS, "--report_to", "none", "--max_steps", 60)
    program = shlex.join([sys.executable, str(REPOSITORY / "train.py"), *arguments])
    # The shell is there until training has begun, and gone long before it is at its end.
    wait = "while kill -0 $! && ! grep -q '^update  *0 ' log; do sleep 0.1; done"
    environment = launch_environment() | SIDE_BY_SIDE
    shell = f"{program} > log 2>&1 & {wait}"
    subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, check=True)
    for _ in range(600):
        log = (tmp_path / "log").read_text()
        if "to evaluate:" in log or "stopped after" in log or "Error" in log:
            break
        time.sleep(0.2)
    assert "60 updates of 4 rows" in log and "to evaluate:" in log, log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "status", "to"),
    [
        pytest.param("INT", 130, "pipe", marks=pytest.mark.long),
        pytest.param("TERM", 143, "pipe", marks=pytest.mark.long),
        ("HUP", 129, "pipe"),  # the terminal is closed
        ("INT", 130, "closed pipe"),  # `| tee log`: Ctrl+C ends tee too
    ],
)
def test_the_exit_status_says_which_signal(what, status, to, tiny, tmp_path):
    arguments = tiny.flags(tmp_path / "output", *OPTIONS, "--report_to", "none")
    environment = launch_environment() | SIDE_BY_SIDE | {"WHEN": "in update 2", "WHAT": what}
    program = REPOSITORY / "tests" / "loop" / "interrupted_run.py"
    run = subprocess.Popen(
        [sys.executable, program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=not_under_nohup,
    )
    if to == "closed pipe":
        assert "processes: 1" in run.stdout.readline()
        run.stdout.close()
        run.wait()
    else:
        assert "stopped after update 2" in run.communicate()[0]
    assert run.returncode == status
    assert newest_checkpoint(READER, tmp_path / "output" / "checkpoints").name == "step_00000002"


@pytest.mark.slow
@pytest.mark.long
def test_nohup_and_several_processes(start, tmp_path, tiny):
    """Their launcher ends at SIGHUP in spite of nohup, so they must save then."""
    arguments = tiny.flags(tmp_path / "output", *OPTIONS, "--report_to", "none", "--max_steps", 900)
    command = ["nohup", *launch_command("train.py", *arguments, config="cpu_2_processes")]
    run = subprocess.Popen(
        command,
        env=launch_environment() | SIDE_BY_SIDE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in run.stdout:
        if line.startswith("update      3  loss"):
            run.send_signal(signal.SIGHUP)
            began = time.time()
    assert run.wait() != 0 and time.time() - began < 25  # before the launcher kills them
    assert newest_checkpoint(READER, tmp_path / "output" / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "status"), [(["--nonsense", "1"], 2), (["--per_device_train_batch_size", "9999"], 1)]
)
def test_the_exit_status_says_what_was_wrong(flags, status, run_alone, tmp_path, monkeypatch):
    def ended(status):
        raise SystemExit(f"status {status}")

    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit, match=f"status {status}"), errors_in_one_line():
        run_alone(tmp_path / "output", *flags)


# ---- which checkpoint, and whether the run may resume from it


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(whole, run_alone, capsys):
    before = contents(whole)
    run_alone(whole)
    assert "holds a finished run" in capsys.readouterr().out and before == contents(whole)


def as_if_stopped_in_the_evaluation(checkpoint, **changes):
    manifest, run = read_checkpoint(checkpoint)
    (checkpoint / "run.json").write_text(json.dumps(run | {"done": False} | changes))
    manifest["files"]["run.json"] = describe_file(checkpoint / "run.json")
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.slow
def test_run_yaml_is_the_run_again(run_alone, run_here, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone(one, "--max_steps", 8, "--warmup_steps", 0.3)
    run_here(train, ["--config", one / "run.yaml", "--output_dir", two])
    assert_the_same_run(two, one, last=8)


@pytest.mark.slow
def test_what_is_not_ours_stays_among_the_checkpoints(run_alone, tmp_path):
    """Rotation looks at our names alone. What our own kills have left goes."""
    folder = tmp_path / "output" / "checkpoints"
    theirs = ["step_00000002_keep", ".mine", "step_00000002.tar.gz", "step_notes.txt", "step_2"]
    for name in [*theirs, ".step_00000003-unfinished"]:
        (folder / name).mkdir(parents=True)
    run_alone(tmp_path / "output", "--max_steps", 8, "--save_total_limit", 1)
    assert {path.name for path in folder.iterdir()} == {*theirs, "step_00000008"}


@pytest.mark.slow
def test_a_run_that_does_not_improve_stops_early(run_alone, tmp_path, capsys):
    flags = [tmp_path / "output", "--learning_rate", 0, "--early_stopping_patience", 2]
    run_alone(*flags)
    lines = read_log(tmp_path / "output")[1]
    assert lines[-1]["step"] == 14 and "train/loss" in lines[-1]  # evaluated at 0, 7 and 14
    run_alone(*flags)
    assert "holds a finished run" in capsys.readouterr().out
    checkpoint = tmp_path / "output" / "checkpoints" / "step_00000014"
    as_if_stopped_in_the_evaluation(checkpoint, num_updates=20)
    run_alone(*flags)
    assert "resuming after update 14" in capsys.readouterr().out
    assert read_log(tmp_path / "output")[1][-1]["step"] == 14


@pytest.mark.slow
def test_a_run_stopped_in_its_last_evaluation_does_it_again(whole, run_alone, tmp_path, capsys):
    folder = tmp_path / "output"
    shutil.copytree(whole, folder)
    as_if_stopped_in_the_evaluation(folder / "checkpoints" / "step_00000020")
    run_alone(folder)
    assert "resuming after update 20" in capsys.readouterr().out
    ours, theirs = (read_log(each)[1][-1] for each in (folder, whole))
    evaluation = {name: ours[name] for name in theirs if not name.startswith("train/")}
    assert evaluation.items() <= theirs.items()
    # curves.png is drawn from the log, and the last training line is not there: its losses were.
    ours, theirs = (reports(each) | {"curves.png": b""} for each in (folder, whole))
    assert ours == theirs
    run_alone(folder)
    assert "holds a finished run" in capsys.readouterr().out


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "one byte of the weights": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "one byte of the optimizer": lambda folder: flip_a_byte(
        folder / "training_state" / "optimizer.bin"
    ),
    "a file is missing": lambda folder: (
        folder / "training_state" / "random_states_1.pkl"
    ).unlink(),
    "an empty file": lambda folder: (folder / "run.json").write_bytes(b""),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest of another kind": lambda folder: (folder / MANIFEST).write_text(
        '{"files": {}, "versions": {}, "depends_on": null}'
    ),
    "a FIFO": lambda folder: (folder / MANIFEST).unlink() or os.mkfifo(folder / MANIFEST),
}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    for damage, apply in DAMAGES.items():
        folder = tmp_path / damage
        shutil.copytree(whole / "checkpoints", folder)
        (folder / ".step_00000024-unfinished").mkdir()
        apply(folder / "step_00000020")
        assert newest_checkpoint(READER, folder).name == "step_00000016", damage
        assert "step_00000020 is damaged, so it is passed over" in capsys.readouterr().out


@pytest.mark.slow
def test_resuming_on_one_process_without_the_base_model(start, whole, tmp_path):
    """The same rows in each update. A damaged checkpoint is replaced."""
    folder = tmp_path / "output"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "step_00000020" / "run.json").write_text("{}")
    flags = [*ALONE, "--report_to", "none", "--model_name_or_path", tmp_path / "deleted"]
    done = start(folder, *flags, config="cpu", ROWS=str(tmp_path / "rows"))
    assert done.returncode == 0 and "resuming after update 16" in done.stdout, done.stdout
    assert newest_checkpoint(READER, folder / "checkpoints").name == "step_00000020"
    ours, theirs = (rows_of(each) for each in (tmp_path / "rows", whole.with_name("rows")))
    assert list(ours) == [17, 18, 19, 20]
    assert ours == {update: theirs[update] for update in ours}
    ours, theirs = (read_log(each)[1] for each in (folder, whole))
    rates = [column(lines, "train/learning_rate") for lines in (ours, theirs)]
    assert rates[0] == rates[1]


@pytest.mark.slow
@pytest.mark.long
def test_resuming_in_another_folder(start, whole, tmp_path):
    folder = tmp_path / "output"
    done = start(folder, "--resume_from_checkpoint", whole / "checkpoints" / "step_00000016")
    assert done.returncode == 0 and "resuming after update 16" in done.stdout, done.stdout
    lines = read_log(folder)[1]
    assert [line["step"] for line in lines] == [18, 20] and (folder / "best").is_dir()
    for line in (lines[-1], theirs := read_log(whole)[1][-1]):
        line.pop("train/samples_per_second")
    assert lines[-1] == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--per_device_train_batch_size", "8"], "global_batch_size was 8, is 32"),
        (
            ["--seed", "1", "--weight_decay", "0.5"],
            r"weight_decay was .*, is 0.5; seed was 0, is 1",
        ),
        (["--resume_from_checkpoint", "never"], "holds a run already"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere: no checkpoint is there"),
    ],
)
def test_a_folder_of_another_run_is_refused(flags, message, whole, run_alone):
    before = contents(whole)
    with pytest.raises(UserError, match=message):
        run_alone(whole, *flags)
    assert before == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--per_device_train_batch_size", 9999], "a global batch of 39996 rows is more than the"),
        (["--output_dir", "/dev/null/output"], "/dev/null/output: cannot be written: Not a dir"),
        (["--metric_for_best_model", "nothing/loss"], "nothing/loss: it begins with none of"),
        (["--metric_for_best_model", "{}/nothing"], "no such metric; there are {}/"),
    ],
)
def test_what_is_refused_before_the_first_update(flags, message, run_alone, tmp_path):
    prefix = train.Config.metric_for_best_model.partition("/")[0]
    flags = [str(flag).format(prefix) for flag in flags]
    with pytest.raises(UserError) as refusal:
        run_alone(tmp_path / "output", *flags)
    assert message.format(prefix) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("output/checkpoints/*"))


@pytest.mark.slow
def test_another_base_model_is_refused(whole, run_alone, tiny, tmp_path, capsys):
    """It counts by what is in it, not by where it lies."""
    before = contents(whole)
    moved = tmp_path / "moved"
    shutil.copytree(tiny.dropout, moved)
    run_alone(whole, "--model_name_or_path", moved)
    assert "holds a finished run" in capsys.readouterr().out
    weights = load_file(moved / "model.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model was .*, is "):
        run_alone(whole, "--model_name_or_path", moved)
    shutil.rmtree(moved)
    run_alone(whole, "--model_name_or_path", moved)  # gone: the checkpoint has all of it
    assert "holds a finished run" in capsys.readouterr().out and before == contents(whole)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    accelerator = train.launch.make_accelerator()
    model = torch.nn.Linear(2, 2)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(tmp_path / "training_state")
    load_training_state(accelerator, tmp_path)
    torch.save(Code(), tmp_path / "training_state" / "random_states_0.pkl")
    load_training_state(accelerator, tmp_path)  # accelerate leaves the random states as they are
    torch.save(Code(), tmp_path / "training_state" / "optimizer.bin")
    with pytest.raises(UserError, match="holds something else than numbers"):
        load_training_state(accelerator, tmp_path)
    accelerator.free_memory()
    assert not (tmp_path / "it ran").exists()
