"""One owner of a folder, what is optional, what must be written, and what is read back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import REPOSITORY
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from runtime import checkpoint as saving
from runtime import lock, tracking
from runtime.batches import make_dataloader
from runtime.checkpoint import checkpoints_in, read_training_config, remove, writing
from runtime.launch import UserError, errors_in_one_line
from runtime.resume import SAVED, find_checkpoint, make_output_dir, resume

READER = Namespace(process_index=0, num_processes=1, is_main_process=True, print=print)
READER.wait_for_everyone = lambda: None
REPORT = Namespace(dataset=None, report=lambda folder, *_: (folder / "metric.csv").touch())


# ---- one owner


@pytest.fixture
def path(tmp_path):
    yield tmp_path / ".owner"
    lock.give_back()


def another(path, then="time.sleep(60)"):
    """A process that takes `path`, says what came of it, and then does something."""
    program = f"import time; from pathlib import Path; from runtime import lock; p = Path({str(path)!r}); print(lock.take(p), flush=True); {then}"
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def test_a_second_owner_is_refused_until_the_first_is_dead(path):
    first = another(path)
    assert first.stdout.readline() == "None\n"
    assert f"process {first.pid} on " in lock.take(path)
    first.send_signal(signal.SIGSTOP)  # it stands still: nobody takes its folder
    assert f"process {first.pid} on " in lock.take(path)
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
    assert lock.take(path) is None
    first.wait()
    lock.give_back()
    assert not path.exists()


@pytest.mark.parametrize(
    ("owner", "age", "is_free"),
    [
        (["another boot", 1, "2"], 50, False),
        (["another boot", 1, "2"], 70, True),
        (None, 50, False),  # there is no /proc
        ([*lock.identify(os.getpid())[:2], "1"], 0, True),  # the number is another's by now
        ("{", 50, False),  # it is being written
        ("{", 70, True),
        ("5", 50, False),
        ('{"process": 5}', 50, False),
        ({"process": lock.identify(os.getpid())}, 0, True),  # it has no number
        ("[" * 100_000, 70, True),
    ],
)
def test_an_owner_elsewhere_is_dead_when_it_does_not_touch(owner, age, is_free, path):
    if not isinstance(owner, (str, dict)):
        owner = {"host": "there", "pid": os.getpid(), "process": owner}
    owner = owner if isinstance(owner, str) else json.dumps(owner)
    path.write_text(owner)
    os.utime(path, (time.time() - age,) * 2)
    assert (lock.take(path) is None) == is_free


def test_the_owner_touches_its_file_and_finds_another(path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCHED", 0.05)
    assert lock.take(path) is None and not lock.is_lost()
    os.utime(path, (0, 0))
    time.sleep(1)
    assert path.stat().st_mtime > 0
    path.unlink()  # somebody cleared the folder
    assert not lock.is_lost() and path.exists()
    path.write_bytes(b"another's \xff")
    with pytest.raises(UserError, match="log.jsonl is not written: .* another one owns"):
        tracking.JsonlTracker(path.with_name("log.jsonl")).log({})
    tracking.write_report(Namespace(trackers=[]), "rerank", REPORT, None, path.parent, 3)
    lock.give_back()
    assert path.read_bytes() == b"another's \xff"
    assert not {"log.jsonl", "metric.csv"} & {each.name for each in path.parent.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_is_the_owner(dead, path):
    if dead:
        path.write_text("{}")
        os.utime(path, (0, 0))
    then = "time.sleep(1); print(lock.is_lost(), flush=True); time.sleep(60)"
    many = [another(path, then) for _ in range(6)]
    owners = [each for each in many if each.stdout.readline() == "None\n"]
    assert [each.stdout.readline() for each in owners].count("False\n") == 1
    for each in many:
        each.kill()
        each.wait()


# ---- what is optional, and what must be written


class Broken(GeneralTracker):
    name, requires_logging_directory, tracker, calls = "broken", False, None, 0

    def log(self, values, step=None):
        Broken.calls += 1
        raise ConnectionResetError("its service is gone\nand more")


def test_a_tracker_that_breaks_is_called_no_more(capsys):
    tracker = tracking.OptionalTracker(Broken())
    for step in range(3):
        tracker.log({}, step=step)
    tracker.finish()
    assert Broken.calls == 1 and tracker.name == "broken"
    assert capsys.readouterr().out.count("broken, from here on, is left out: its service") == 1


def test_a_report_that_breaks_ends_evaluate_py_alone(tmp_path, capsys):
    (tmp_path / "metric.csv" / "in the way").mkdir(parents=True)
    accelerator = Namespace(trackers=[])
    for step in (0, 7):  # what the first left is no hindrance
        tracking.write_report(accelerator, "rerank", REPORT, None, tmp_path, step)
    assert capsys.readouterr().out.count("the report of rerank is left out: ") == 2
    with pytest.raises(UserError, match="the report of rerank: .*metric.csv"):
        tracking.write_report(accelerator, "rerank", REPORT, None, tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "environment", "said"),
    [
        ("a/b", {}, "Invalid project name 'a/b'"),
        pytest.param(
            *("ours", {"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"), marks=pytest.mark.long
        ),
        pytest.param(
            *("ours", {"WANDB_MODE": "online"}, "WANDB_MODE is online, and there is no key"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_wandb_is_asked_first(project, environment, said, tmp_path):
    program = f"""from runtime.tracking import make_trackers, UserError
try: make_trackers('wandb', '.', {project!r})
except UserError as error: print('refused:', error)"""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]} | environment
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert f"refused: --report_to wandb: {said}" in done.stdout.decode(), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="log.jsonl could .*No space left.* Safe: step_00000004"):
        tracking.JsonlTracker(tmp_path / "log.jsonl").log({})
    with pytest.raises(UserError, match="is the disk full"), writing("it", tmp_path):
        torch.save(torch.zeros(100_000), "/dev/full")
    with pytest.raises(UserError, match="another error"), writing("it", tmp_path):
        raise UserError("another error")


def test_what_cannot_be_printed_is_dropped(monkeypatch):
    """The reader of a pipe is gone, or an encoding does not have the letter."""
    reads, writes = os.pipe()
    os.close(reads)
    stream = open(writes, "w", encoding="ascii", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with errors_in_one_line():
        print("한글")
        print("again", flush=True)
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("name", ["checkpoints", "best"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_in_the_way_is_refused_first(link, name, path):
    path.with_name("log.jsonl").touch()
    path.with_name(name).symlink_to("/nowhere/x") if link else path.with_name(name).touch()
    with pytest.raises(UserError, match=f"{name}: cannot be written: File exists"):
        make_output_dir(READER, str(path.parent), "auto")


def test_a_log_that_cannot_be_written_is_refused_first(path):
    os.mkfifo(path.with_name("log.jsonl"))  # to open it would wait for ever
    for folder, reason in ((path.parent, "no regular file"), ("a" * 300, "File name too long")):
        with pytest.raises(UserError, match=reason):
            make_output_dir(READER, str(folder), "auto")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_no_regular_file_in_the_place_of_the_owner(make, path):
    make(path)
    with pytest.raises(UserError, match="--output_dir .*.owner is no regular file: remove it"):
        make_output_dir(READER, str(path.parent), "auto")


@pytest.mark.parametrize("name", ["best", "metric.csv", "run.yaml"])
def test_what_no_run_made_is_not_overwritten(name, path):
    path.with_name(name).touch()
    with pytest.raises(UserError, match=f"a {name} is there, and no run that made it"):
        make_output_dir(READER, str(path.parent), "auto")


def test_never_does_not_begin_over_checkpoints(path):
    """Its log was moved away. A later run would resume from what the first has left."""
    (path.parent / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"):
        make_output_dir(READER, str(path.parent), "never")


def test_a_link_among_the_checkpoints_goes_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step_00000002").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step_00000003").touch()  # no folder: not ours
    assert checkpoints_in(tmp_path) == [tmp_path / "step_00000002"]
    remove(tmp_path / "step_00000002")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["elsewhere", "step_00000003"]


@pytest.mark.parametrize("program", ["printf '\\377'", "exit 1"])
def test_git_ends_no_run(program, tmp_path, monkeypatch):
    (tmp_path / "git").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tracking.git_commit() in ("\ufffd", None)


def test_a_tied_weight_is_saved_once(tmp_path, monkeypatch):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 16, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    copies = {name: value.clone() for name, value in model.state_dict().items()}  # as ZeRO gives
    given = Namespace(get_state_dict=lambda model: copies, unwrap_model=lambda model, **_: model)
    monkeypatch.setattr(saving, "write_card", lambda *_: None)
    given.is_main_process, state = True, Namespace(training_config={})
    saving.write_model(given, model, tmp_path, state)
    saved = load_file(tmp_path / "model.safetensors")
    assert "transformer.wte.weight" in saved and "lm_head.weight" not in saved


# ---- what is read back

FIRST = {"step": 0, "depends_on": {"seed": 0}, "run_id": "1"}
LINES = [{"step": 0, "eval/loss": 2.0}, {"step": 3, "train/loss": 1.0}, {"step": 6}]
DAMAGED = [
    b"",
    b"\0\0\0",
    b"5",
    b"[1]",
    b'{"a": 1}',
    b'{"step": null}',
    b'{"step": 3, "x": "\xff"}',
]
DAMAGED += [b'{"step": 3, "tr', b"[" * 100_000, b'{"step": Infinity}']


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda line: repr(line[:12]))
def test_a_damaged_line_of_the_log_is_left_out(damaged, tmp_path, capsys):
    log, state = tmp_path / "log.jsonl", Namespace(step=6, done=False)
    lines, copies = [json.dumps(line).encode() for line in (FIRST, *LINES)], b""
    for place in range(len(lines)):
        before = b"\n".join([*lines[:place], damaged, *lines[place + 1 :], b""])
        log.write_bytes(before)
        facts = tracking.keep_lines(log, state, FIRST | {"run_id": "2"})
        kept = [json.loads(line) for line in log.read_text().splitlines()]
        expected = [line for number, line in enumerate(LINES[:2], 1) if number != place]
        assert kept == [facts, *expected] and facts["run_id"] == ("2" if place == 0 else "1")
        assert f"lines [{place + 1}] are damaged" in capsys.readouterr().out
        copies += before  # one damage does not cost what an earlier one had left
        assert (tmp_path / "damaged_log.jsonl").read_bytes() == copies


@pytest.mark.parametrize("text", [b"5\n", b'{"a": 1}\n', b"hello", b"\0" * 100, b"\xff\n"])
def test_another_programs_log_is_refused(text, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(text)
    for checkpoint in (None, tmp_path):
        with pytest.raises(UserError, match="another program's"):
            resume(READER, Namespace(depends_on={}), checkpoint, str(tmp_path))
    assert (tmp_path / "log.jsonl").read_bytes() == text


def write_checkpoint(folder, step, without=(), **others):
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    run = dict.fromkeys(SAVED, 0) | {"step": step, "evaluations": {}} | others
    manifest = {"files": {}, "depends_on": {}, "versions": {}}
    for name, content in (("run.json", run), ("manifest.json", manifest)):
        content = {key: content[key] for key in content if key not in without}
        (checkpoint / name).write_text(json.dumps(content))
    return checkpoint


def test_a_checkpoint_without_a_key_is_passed_over(tmp_path, capsys):
    """As after an edit of TrainState. If there is no other, the run does not begin over it."""
    for name in ("items", "depends_on", "versions", "files"):
        folder = tmp_path / name
        write_checkpoint(folder, 8, without=[name])
        with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
            find_checkpoint(READER, str(folder), "auto")
        older = write_checkpoint(folder, 4)
        assert find_checkpoint(READER, str(folder), "auto") == older
        assert f"it was saved without {name}" in capsys.readouterr().out


def test_going_back_is_refused(tmp_path):
    older, newest = (write_checkpoint(tmp_path, step) for step in (4, 8))
    copy = older.with_name("step_00000004_keep")
    for named in (older, older.rename(copy)):
        (tmp_path / "log.jsonl").touch()
        if named == older:
            write_checkpoint(tmp_path, 4)
        with pytest.raises(UserError, match="newer ones, up to step_00000008"):
            find_checkpoint(READER, str(tmp_path), str(named))
    for folder, named in ((tmp_path, newest), (tmp_path / "another", copy)):
        assert find_checkpoint(READER, str(folder), str(named)) == named


@pytest.mark.parametrize("text", ["", "5", "[]", "{", '{"seed": 0}', "\udcff"])
def test_a_training_config_that_is_damaged(text, tmp_path):
    path = tmp_path / "training_config.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="training_config.json"):
        read_training_config(str(tmp_path), ["seed"])


# ---- workers


class Tensors(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitems__(self, keys):
        return {"values": torch.tensor(keys, dtype=torch.bfloat16), "name": ["a", "b"]}


def test_batches_of_workers_need_no_shared_memory():
    accelerator = Namespace(device=torch.device("cpu"))
    for workers in (0, 1):
        config = Namespace(dataloader_num_workers=workers)
        batches = list(make_dataloader(accelerator, Tensors(), config, batch_size=2))
        assert [batch["values"].tolist() for batch in batches] == [[0, 1], [2, 3]]
        for batch in batches:
            assert batch["name"] == ["a", "b"] and not batch["values"].is_shared()
            batch["values"] += 1


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed():
    """Each is about to send a batch that is larger than a pipe."""
    program = """import time, torch, multiprocessing
from types import SimpleNamespace
from runtime.batches import make_dataloader
class Rows:
    def __len__(self): return 64
    def __getitems__(self, keys): return {"values": torch.zeros(1_000_000)}
config = SimpleNamespace(dataloader_num_workers=2)
accelerator = SimpleNamespace(device=torch.device("cpu"))
batches = iter(make_dataloader(accelerator, Rows(), config, batch_size=4))
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        workers = [Path(f"/proc/{pid}/cmdline") for pid in process.stdout.readline().split()]
        process.kill()
        began = time.time()
        while any(path.exists() and path.read_bytes() for path in workers):  # a zombie has none
            assert time.time() - began < 20
            time.sleep(0.2)
    assert len(workers) == 2
