"""Arrays that are made of the data once. All processes of a machine map them from its disk.

They are in the data's folder, or in the one that DATA_CACHE in the environment names. Where that
cannot be written or is full they go to the system's temporary folder. They are there whole or not
at all. Of two launches at once one makes them. Of each kind the three that were made last stay.

A text task keeps its tokens by `items`: int32 (N, the longest).
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from runtime.checkpoint import flush
from runtime.launch import UserError, leave_signals_to_the_main_process

BLOCK = 64  # items that a worker makes before it writes them
SIZES = "sizes.json"
MANY = 2**15  # files that it looks at before it tells their hash


def items(folder, kind, key, shape, dtype, make, named_by) -> np.ndarray:
    """An array of `shape` (N, ...), whose item i is make(i): an array, or a UserError. See `kept`.

    named_by(i): the first row that names item i, for messages.
    """

    def write(unfinished):
        file, starts = unfinished / "items.npy", range(0, shape[0], BLOCK)
        np.lib.format.open_memmap(file, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk says so before the work; macOS has none
            with open(file, "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        write = partial(write_block, file, make)
        for number, error in in_workers(write, starts, 1000 // BLOCK, f"making {kind}"):
            if error is not None:
                known = isinstance(error, UserError)
                raise UserError(f"{error} (named by {named_by(number)})") if known else error

    return kept(folder, kind, f"{key} {shape} {dtype}", write)["items"]


def write_block(file, make, start):
    """Make and write some items, up to one that is an error: (its number, the error or None)."""
    array: Any = np.load(file, mmap_mode="r")
    made, number = [], start
    try:
        for number in range(start, min(start + BLOCK, len(array))):
            made.append(make(number))
        with open(file, "r+b") as opened:  # not by mmap: a full disk would end the process
            opened.seek(array.offset + start * array[0].nbytes)
            opened.write(np.array(made, array.dtype).tobytes())
        return number, None
    except (UserError, OSError) as error:  # raised, it would come with the traceback of a worker
        return number, error


def kept(folder: Path, kind: str, key: str, make) -> dict[str, np.ndarray]:
    """{stem: array} of the .npy files that make(folder) wrote, at this launch or an earlier one.

    key: all that they depend on. Every process must call this. Raises UserError.
    """
    path = once_a_machine(find_or_make, folder, kind, key, make)
    try:
        return {file.stem: Mapped(file) for file in path.glob("*.npy")}
    except OSError as error:  # each keeps a file open
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def find_or_make(folder, kind, key, make):
    name = f"{kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
    for parent in (os.environ.get("DATA_CACHE") or folder, tempfile.gettempdir()):
        path = Path(parent, f".data-cache-{os.getuid()}", name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent.stat().st_uid != os.getuid():  # the temporary folder is open to all
                raise PermissionError(0, "it belongs to another user")
            if not is_whole(path):
                with open(path.with_name(f".{kind}.lock"), "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with its process, killed or not
                    if not is_whole(path):  # else another launch has made it meanwhile
                        make_whole(path, kind, make)
            return path
        except OSError as error:
            print(f"{path.parent} cannot keep {kind}: {error.strerror}", flush=True)
    raise UserError(f"there is no room for {kind}: name a folder that has it by DATA_CACHE=FOLDER")


def is_whole(path):
    """Whether its files are there, at their sizes. Some programs empty the temporary folder."""
    with suppress(OSError, ValueError):
        sizes = json.loads((path / SIZES).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    return False


def make_whole(path, kind, make):
    whole = sorted(path.parent.glob(f"{kind}-*"), key=lambda old: old.stat().st_mtime)
    for old in [*path.parent.glob(f".{kind}-*"), *whole[:-2]]:  # of launches that were killed too
        shutil.rmtree(old, ignore_errors=True)
    # Not one name for all: a network's disk may not tell other machines of the lock.
    unfinished = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        unfinished.mkdir()
        make(unfinished)
        sizes = {}
        for file in unfinished.iterdir():
            Mapped(file)  # not every file system can
            sizes[file.name] = file.stat().st_size
        (unfinished / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        for written in (*unfinished.iterdir(), unfinished):
            flush(written)
        shutil.rmtree(path, ignore_errors=True)  # what is left of a damaged one
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Mapped(np.memmap):
    """A .npy file, read only. A spawned worker is sent its path. Parts are plain arrays."""

    def __new__(cls, file):
        array: Any = np.load(file, mmap_mode="r")
        return super().__new__(cls, file, array.dtype, "r", array.offset, array.shape)

    def __getitem__(self, index):
        return self.view(np.ndarray)[index]

    def __reduce__(self):
        whole = type(self.base) is mmap.mmap
        return (Mapped, (self.filename,)) if whole else super().__reduce__()


class Texts:
    """N texts in two arrays, uint8 (all bytes,) and int64 (N + 1,): where each begins."""

    def __init__(self, encoded, starts):
        self.encoded, self.starts = encoded, starts

    @staticmethod
    def save(folder, name, texts):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        np.save(folder / f"{name}.npy", np.frombuffer(b"".join(encoded), np.uint8))
        np.save(folder / f"{name}.starts.npy", np.cumsum([0, *map(len, encoded)]))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, number):
        return self.take(np.array([number]))[0]

    def take(self, numbers):
        """Those of some numbers, int (K,): a list of str."""
        encoded = memoryview(self.encoded)
        pairs = zip(self.starts[numbers].tolist(), self.starts[numbers + 1].tolist(), strict=True)
        return [str(encoded[start:end], "utf-8", "surrogatepass") for start, end in pairs]


def hash_files(keys, stat):
    """Hashes of the names and sizes of files, and of their times: (str, str).

    keys: Texts. stat(key): the os.stat of its file. Every process must call this.
    """
    hashes = partial(hash_some, keys, stat)
    parts = once_a_machine(list, in_workers(hashes, range(0, len(keys), MANY), 4, "checking files"))
    return ["".join(part) for part in zip(*parts, strict=True)]


def hash_some(keys, stat, start):
    sizes, times = hashlib.blake2b(), hashlib.blake2b()
    for key in keys.take(np.arange(start, min(start + MANY, len(keys)))):
        with suppress(OSError, ValueError):  # who reads it says what is wrong with it
            state = stat(key)
            sizes.update(f"{key} {state.st_size}\n".encode())
            times.update(f"{state.st_mtime_ns} ".encode())
    return sizes.hexdigest(), times.hexdigest()


def in_workers(function, starts, least, title):
    """Yield function(start) of each start, worked out on all cores of the machine.

    least: how many starts are worth a worker. title: of a progress bar.
    """
    loader = DataLoader(
        starts,
        batch_size=None,
        collate_fn=function,
        num_workers=min(os.cpu_count() or 1, len(starts) // least),
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else iterating draws from the global random state
    )
    return tqdm(loader, title, leave=False, delay=1, disable=None)  # None: only on a terminal


def once_a_machine(function, *arguments):
    """What the function returns. One process of each machine calls it, and the others wait."""
    state, result, error = PartialState(), None, None
    if state.is_local_main_process:
        try:
            result = function(*arguments)
        except (UserError, OSError) as raised:
            error = raised
    told = gather_object([(result, error)])
    for _, error in told:
        if error is not None:  # on all of them
            raise error
    return told[state.process_index - state.local_process_index][0]
