"""train.py, interrupted from inside at a named point.

WHEN: "in update 6" (before its last micro-batch), "after update 19", "in the save of update 16",
"in the save of best", "in the second evaluation". ON: the process, 0 where it is not said.
WHAT: KILL ends every process and the launcher at once, DIE this process only, ORPHAN the launcher
only, WORKER the newest DataLoader worker of this process. TERM and INT ask the launcher to end, or
this process where there is none. FULL is a disk that is full just then.
ROWS: a file that each micro-batch adds a line to: the update, and the items.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from fsdp2_on_cpu import fsdp2_on_cpu

import evaluate
import train
from runtime import checkpoint, launch

state = None  # the TrainState, once training has begun
doing = []  # the points that the run is at, the innermost last
interrupted = False


def interrupt():
    what = os.environ["WHAT"]
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    launcher = psutil.Process(os.getppid() if launched else os.getpid())
    print(f"interrupted at {time.time()}", flush=True)
    if what == "KILL":
        for process in (launcher, *launcher.children(recursive=True)):
            if process.pid != os.getpid():
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "DIE":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "ORPHAN":
        launcher.kill()
        while os.getppid() == launcher.pid:  # not wait(): nobody may have read its status yet
            time.sleep(0.01)
    elif what == "WORKER":
        worker = psutil.Process().children()[-1]
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it stays, for torch to find it
    elif what == "FULL":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        launcher.send_signal(getattr(signal, f"SIG{what}"))
        time.sleep(1)  # until it has come to every process


def reached(point):
    global interrupted
    here = point == os.environ.get("WHEN") and os.environ.get("RANK", "0") == os.environ["ON"]
    if here and not interrupted:
        interrupted = True
        interrupt()


def around(place, name, point):
    """While the function `name` of `place` runs, the run is at `point()`."""
    original = getattr(place, name)

    def surrounded(*arguments, **options):
        doing.append(point())
        try:
            return original(*arguments, **options)
        finally:
            doing.pop()

    setattr(place, name, surrounded)


def before(place, name):
    """Before each call of the function `name` of `place` the run has reached where it is."""
    original = getattr(place, name)

    def preceded(*arguments, **options):
        if doing:
            reached(doing[-1])
        return original(*arguments, **options)

    setattr(place, name, preceded)


train_, train_step, maybe_log = train.train, train.train_step, train.maybe_log_save_evaluate


def watched_train(*arguments):
    global state
    state = arguments[3]
    return train_(*arguments)


def watched_train_step(accelerator, model, batch):
    if accelerator.sync_gradients:
        reached(f"in update {state.step + 1}")
    if "ROWS" in os.environ:
        with open(os.environ["ROWS"], "a") as file:  # one write: processes do not mix their lines
            file.write(f"{state.step + 1} {json.dumps(batch['index'].tolist())}\n")
    return train_step(accelerator, model, batch)


def watched_maybe_log_save_evaluate(*arguments):
    maybe_log(*arguments)
    reached(f"after update {state.step}")


def main():
    os.environ.setdefault("ON", "0")
    train.train, train.train_step = watched_train, watched_train_step
    train.maybe_log_save_evaluate = watched_maybe_log_save_evaluate
    for place in (train, evaluate):
        around(place, "save_checkpoint", lambda: f"in the save of update {state.step}")
    around(evaluate, "save_model", lambda: "in the save of best")
    ordinals = ("first", "second", "third", "fourth")
    around(
        evaluate,
        "run_evaluation",
        lambda: f"in the {ordinals[len(state.evaluations)]} evaluation",
    )
    before(checkpoint, "flush")
    before(launch, "stop_if_asked")
    train.main()


if __name__ == "__main__":
    fsdp2_on_cpu()
    with launch.errors_in_one_line():
        main()
