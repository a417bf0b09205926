"""train.py, interrupted from inside at an exact moment.

AT: which function, its how-manieth call, and on which process: "flush 3 0". WHAT: KILL ends every process and the launcher at
once, DIE this process only, ORPHAN the launcher only; TERM and INT ask the launcher to end; FULL is a disk that is full just
then.
"""

import errno
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
from runtime import checkpoint
from runtime.launch import errors_in_one_line

PLACES = {"train_step": train, "flush": checkpoint, "stop_if_asked": evaluate}
calls = 0


def interrupt():
    what = os.environ["WHAT"]
    launcher = psutil.Process(os.getppid())
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
        while (
            os.getppid() == launcher.pid
        ):  # not wait(): it is gone only once whoever launched it, and reads to the end, looks
            time.sleep(0.01)
    elif what == "FULL":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        launcher.send_signal(getattr(signal, f"SIG{what}"))
        time.sleep(1)  # until it has come to every process


if os.environ.get("AT"):
    place, number, rank = os.environ["AT"].split()
    original = getattr(PLACES[place], place)

    def interrupted(*arguments):
        global calls
        calls += 1
        if calls == int(number) and os.environ.get("RANK", "0") == rank:
            interrupt()
        return original(*arguments)

    setattr(PLACES[place], place, interrupted)

if __name__ == "__main__":
    fsdp2_on_cpu()
    with errors_in_one_line():
        train.main()
