"""What all tests share: launches of real processes, and the records of a run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Tests run side by side, here and in launches. Threads that wait for a busy core, and spin while
# they wait, slow all of them down tenfold. And with other numbers of threads the last bits of
# attention can differ.
SIDE_BY_SIDE = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
os.environ.update(SIDE_BY_SIDE)


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="also the tests marked long: every way of running"
    )
    parser.addoption(
        "--write-table", action="store_true", help="write the table of docs/PARITY.md anew"
    )


def pytest_collection_modifyitems(config, items):
    if not (config.getoption("--all") or config.getoption("--write-table")):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_runtest_setup(item):
    launch.is_for = item


class Tiny:
    """What tests/tiny_task.py makes: the data, and a model without and with dropout."""

    def __init__(self, folder):
        from tiny_task import OPTIONS, make_data, make_model  # here: not every test needs the task

        self.data, self.model, self.dropout = (folder / n for n in ("data", "model", "dropout"))
        make_data(self.data)
        make_model(self.model, 0.0)
        make_model(self.dropout, 0.1)
        self.options = [str(word) for word in OPTIONS]

    def flags(self, output_dir, *others, dropout=False):
        """Arguments of train.py. A later flag goes over an earlier one."""
        model = self.dropout if dropout else self.model
        flags = ["--data_dir", self.data, "--model_name_or_path", model, "--output_dir", output_dir]
        return [str(word) for word in (*flags, *self.options, *others)]


@pytest.fixture
def run_here(monkeypatch):
    """main() of train.py or evaluate.py in this process, as a command with these arguments."""
    from runtime import launch, lock  # here: they take seconds

    handlers = {number: signal.getsignal(number) for number in launch.STOP}

    def run_here(program, arguments):
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
        try:
            program.main()
        except SystemExit as ended:
            assert not ended.code
        finally:
            lock.give_back()  # as the end of the program does

    yield run_here
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


def launch(
    script,
    *arguments,
    config="cpu",
    processes=None,
    mixed_precision=None,
    launch_flags=(),
    check=True,
    cwd=None,
    wandb=False,
    timeout=600,
    **environment,
):
    """`accelerate launch` of a script of the repository, as a user would.

    config: the name of one in accelerate_config, or a path. check: fail, with the output, unless it
    ends well. Without `wandb`, whose service takes seconds to start, nothing is sent to it.
    Returns the CompletedProcess, stdout and stderr in one text.
    """
    assert launch.is_for.get_closest_marker("slow"), "mark this test slow: it launches processes"
    command = launch_command(
        script,
        *arguments,
        config=config,
        processes=processes,
        mixed_precision=mixed_precision,
        launch_flags=launch_flags,
    )
    quiet = {} if wandb else {"WANDB_MODE": "disabled"}
    done = subprocess.run(
        command,
        env=launch_environment() | SIDE_BY_SIDE | quiet | environment,
        cwd=cwd or REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def refused(script, *arguments, **options):
    """A launch that must fail with one line: the line, with no traceback before it."""
    done = launch(script, *arguments, check=False, **options)
    assert done.returncode != 0
    # Once, on however many processes.
    (message,) = re.findall(r"^error: (.*)$", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout.split("error: ")[0]
    return message


def launch_command(
    script, *arguments, config="cpu", processes=None, mixed_precision=None, launch_flags=()
):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = f"{config}.yaml" if isinstance(config, str) else config
    command += ["--config_file", REPOSITORY / "accelerate_config" / config] if config else []
    command += ["--num_processes", processes] if processes else []
    command += ["--mixed_precision", mixed_precision] if mixed_precision else []
    command += [*launch_flags, REPOSITORY / script, *arguments]
    return [str(word) for word in command]


def launch_environment():
    """This one without what would change a launch, and with the programs of this Python."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "ACCELERATE", "OMP_NUM"))
    }
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def not_under_nohup():
    """For a process that SIGHUP must reach, though these tests may run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def read_log(output_dir):
    """The lines of log.jsonl: (what the first says of the run, the others)."""
    text = (output_dir / "log.jsonl").read_text(encoding="utf-8")
    first, *lines = [json.loads(line) for line in text.splitlines()]
    return first, lines


def column(lines, name):
    """{step: value} of one name in the log."""
    return {line["step"]: line[name] for line in lines if name in line}
