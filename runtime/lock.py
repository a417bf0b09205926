"""A folder has one owner at a time.

Not flock, which not every shared disk has. The owner makes a file that only one can make, and
touches it while it lives, so that a dead one shows on other machines too.
"""

import json
import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

TOUCHED, DEAD = 10, 60  # seconds

_owned = SimpleNamespace(path=None, text="", ended=None)


def take(path: Path) -> str | None:
    """Own what the file `path` stands for, until `give_back`. Returns what speaks against it."""
    give_back()
    me = {"host": socket.gethostname(), "pid": os.getpid(), "process": identify(os.getpid())}
    text = json.dumps(me | {"token": os.urandom(8).hex()})
    while not make(path, text):
        with suppress(FileNotFoundError):  # it was given back just now
            owner = living_owner(path)
            if owner is not None:
                return (
                    "process {pid} on {host} is at work there: wait for its end, or name another "
                    "folder (after a crash it is free in {dead} s)"
                ).format_map({"pid": "?", "host": "?", "dead": DEAD} | owner)
            # Two that come here at once may both become owners. One of them will find the other's
            # token before it writes.
            path.unlink()
    _owned.path, _owned.text, _owned.ended = path, text, threading.Event()
    threading.Thread(target=keep_touching, args=(path, _owned.ended), daemon=True).start()
    return None


def is_lost() -> bool:
    """Whether another one owns it by now: this process stood still for too long."""
    path = _owned.path  # a file that somebody removed is made again
    if path is None or make(path, _owned.text):
        return False
    return path.read_bytes() != _owned.text.encode()


def give_back():
    if _owned.path is not None:
        _owned.ended.set()
        with suppress(OSError):
            if _owned.path.read_bytes() == _owned.text.encode():
                _owned.path.unlink()
        _owned.path = None


def make(path: Path, text: str) -> bool:
    """Make the file. False if it is there already."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:  # a full disk: an empty file would look like an owner
        path.unlink(missing_ok=True)
        raise
    return True


def living_owner(path: Path) -> dict | None:
    if path.is_symlink() or not path.is_file() and path.exists():  # a FIFO would wait for ever
        raise OSError(0, f"{path.name} is no regular file: remove it")
    with open(path, "rb") as file, tempfile.TemporaryFile(dir=path.parent) as now:
        owner, mine = {}, identify(os.getpid())
        with suppress(ValueError, TypeError, RecursionError):  # else it is being written
            owner = dict(json.loads(file.read()))
        process = owner.get("process")
        if mine and isinstance(process, list) and process[:2] == mine[:2]:
            alive = process == identify(owner.get("pid", -1))
        else:  # by the clock of the disk's server
            alive = os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime < DEAD
    return owner if alive else None


def identify(pid: int) -> list | None:
    """Boot, container and start of a process, whose number is used again later.

    None: it is dead, or there is no /proc.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else [boot, os.readlink("/proc/self/ns/pid"), others[18]]


def keep_touching(path: Path, ended: threading.Event):
    while not ended.wait(TOUCHED):
        with suppress(OSError):
            os.utime(path)  # without a time, so the server's
