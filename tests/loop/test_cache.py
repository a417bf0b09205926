"""Arrays that are made once and kept on disk: whole or absent, whatever happens while they are made."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from runtime import cache
from runtime.launch import UserError

PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
from runtime import cache

def make(number):
    time.sleep(float(sys.argv[2]))
    with open(Path(sys.argv[1], "made"), "a") as file:
        file.write(f"{number} ")
    return np.full(3, number)

Path(sys.argv[3]).touch()
while len(list(Path(sys.argv[3]).parent.glob("ready*"))) < int(sys.argv[4]):
    time.sleep(0.01)
array = cache.items(Path(sys.argv[1]), "squares", "key", (200, 3), np.int32, make, str)
assert (array == np.arange(200)[:, None]).all()
"""


def square(number):
    return np.full((2, 3), number**2)


def make(folder, num_items=200, key="key", function=square):
    shape = (num_items, 2, 3)
    return cache.items(folder, "squares", key, shape, np.int32, function, "row {}".format)


def names(folder):
    paths = folder.glob(".data-cache-*/*")
    return [path.name for path in paths if path.suffix != ".lock"]


def start(folder, seconds=0.0, ready="ready", several=1):
    arguments = [folder, seconds, folder / ready, several]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )


@pytest.mark.parametrize("cores", [1, 3])
def test_it_is_made_once_and_found_again(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for num_items in (1, 63, 64, 65, 4001):
        array = make(tmp_path, num_items)
        expected = np.arange(num_items)[:, None, None] ** 2
        assert array.shape == (num_items, 2, 3) and array.dtype == np.int32
        assert (array == expected).all() and not array.flags.writeable
        assert (make(tmp_path, num_items, function=None) == expected).all()
    assert len(names(tmp_path)) == 3  # those that were made last, and nothing half made
    with pytest.raises(TypeError):  # another key: it is made, and here it cannot be
        make(tmp_path, key="other", function=None)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 150)])
def test_what_was_damaged_is_made_again(damage, tmp_path):
    """Some systems empty their temporary folder, file by file."""
    make(tmp_path)
    (path,) = tmp_path.glob(".data-cache-*/*/items.npy")
    damage(path)
    assert (make(tmp_path) == np.arange(200)[:, None, None] ** 2).all()


def test_an_item_that_cannot_be_made(tmp_path):
    def function(number):
        if number in (70, 150):
            raise UserError("it is broken")
        return square(number)

    with pytest.raises(UserError, match=r"^it is broken \(named by row 70\)$"):
        make(tmp_path, function=function)
    assert not names(tmp_path)


@pytest.mark.slow
def test_a_spawned_worker_is_sent_no_content(tmp_path):
    array = make(tmp_path, 1000)
    assert len(pickle.dumps(array)) < 1000 and type(array[3:5]) is np.ndarray
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(np.sum, (array,)) == array.sum()
    assert (pickle.loads(pickle.dumps(array + 1)) == np.asarray(array) + 1).all()


def test_texts(tmp_path):
    texts = ["", "a", "요소", "\ud800", "a\0b\n", "", "z" * 1000]
    made = cache.kept(tmp_path, "t", "", lambda folder: cache.Texts.save(folder, "x", texts))
    kept = cache.Texts(made["x"], made["x.starts"])
    assert list(kept) == texts and len(kept) == 7 and kept.take(np.array([6, 2])) == texts[6:1:-4]


def test_where_it_is_kept(tmp_path, monkeypatch, capfd):
    """A folder that cannot be written or is full: a line, and another folder."""
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").touch()
    make(tmp_path / "file")
    assert "file/.data-cache-" in capfd.readouterr().out and len(names(tmp_path / "temporary")) == 1

    fallocate = os.posix_fallocate

    def full(descriptor, start, length):
        if "data" in os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path))[:6]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert (make(tmp_path / "data", 300)[:, 0, 0] == np.arange(300) ** 2).all()
    assert "cannot keep squares: No space left on device" in capfd.readouterr().out
    assert not names(tmp_path / "data")
    monkeypatch.setenv("DATA_CACHE", str(tmp_path / "named"))
    make(tmp_path / "data", 300)
    assert len(names(tmp_path / "named")) == 1 and not capfd.readouterr().out

    monkeypatch.delattr(os, "posix_fallocate")  # found while it is written
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(UserError, match="no room for squares: .* by DATA_CACHE=FOLDER"):
            make(tmp_path / "data", 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(name.startswith(".squares") for name in names(tmp_path / "named"))


def test_another_users_folder_is_not_trusted(tmp_path, monkeypatch, capfd):
    place = tmp_path / f".data-cache-{os.getuid()}"
    place.mkdir()
    os.chown(place, 12345, -1) if os.getuid() == 0 else pytest.skip("only root can give it away")
    make(tmp_path)
    assert "it belongs to another user" in capfd.readouterr().out and not names(tmp_path)


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_is_used(tmp_path):
    program = start(tmp_path, 0.02)
    while not any(path.stat().st_size for path in tmp_path.glob(".data-cache-*/.*/items.npy")):
        time.sleep(0.05)
    time.sleep(1.5)  # some blocks are written
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    (left,) = names(tmp_path)
    assert left.startswith(".squares-")
    assert start(tmp_path).wait(60) == 0  # and what is left goes
    assert len(names(tmp_path)) == 1 and names(tmp_path) != [left]


@pytest.mark.slow
def test_two_launches_at_once(tmp_path):
    programs = [start(tmp_path, 0.002, f"ready{number}", 2) for number in (1, 2)]
    assert [program.wait(100) for program in programs] == [0, 0]
    assert len(names(tmp_path)) == 1 and not names(tmp_path)[0].startswith(".")
    assert len((tmp_path / "made").read_text().split()) == 200  # by one of them
