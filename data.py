"""The CSV and image contract: read, validate, filter, count; the data sets of the two evaluations, and their batches.

    csv/train.csv   csv/eval.csv   csv/test_vocabulary.csv
    images/{x_image_path}.png      the page, with the element removed
    elements/{resourceKey}.png     the elements, composited over white where they are transparent

N rows, C candidates, B batch, E distinct images. Whatever can be wrong in a user's files is a UserError.

EDIT HERE for another task, what a row is: `COPIED` and `PARSED` name its columns, and the class of `inputs`, in
`read_datasets`, says what the model is given of it, and what people see.
"""

import ast
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.launch import UserError

COPIED = (
    "search_word",
    "template_idx",
    "page_num",
    "x_image_path",
    "resourceKey",
)  # columns that metric.csv repeats
PARSED = ("candidate_resourceKey", "x_info", "y_info")  # columns of literals
CELL_LIMIT = 1_000_000  # characters
PIXEL_LIMIT = 50_000_000  # of one image: a small file can unpack to more than the memory holds
CACHE_LIMIT = 2_000_000_000  # bytes of decoded pages, and as many of elements, that a process keeps
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # by content, whatever the name says; some others run programs


class Key(NamedTuple):
    """What a sampler asks of a data set. A weight of 0 marks filling: it makes a batch full and counts for nothing."""

    index: int
    epoch: int = 0
    weight: float = 1.0


def read_datasets(config, model, splits):
    """The data sets of some CSVs, in the order of `splits`: a RerankDataset of test_vocabulary, a SharedDataset of the others.

    config: needs data_dir, max_candidates, num_negatives, seed. model: says what its inputs must be. Raises UserError.
    """
    read = [read_rows(config.data_dir, split, config.max_candidates) for split in splits]
    inputs = PagesAndElements(Path(config.data_dir), read, model)
    return [
        RerankDataset(rows, inputs)
        if split == "test_vocabulary"
        else SharedDataset(rows, inputs, config.num_negatives, config.seed)
        for split, rows in zip(splits, read, strict=True)
    ]


def fingerprint(datasets) -> str:
    """A hash of what the numbers depend on in the files: the CSVs, and what they name."""
    found = hashlib.blake2b(digest_size=16)
    for dataset in datasets:
        found.update(dataset.rows.path.read_bytes())
    for part in datasets[0].inputs.contents():  # of all of them
        found.update(part)
    return found.hexdigest()


@dataclass
class Rows:
    """The rows of one CSV that are used; N of them. What there is one of in each row is in arrays, of numbers where that can be:
    DataLoader workers copy, by touching them, the Python objects that they share, and arrays they do not."""

    path: Path
    numbers: (
        np.ndarray
    )  # int (N,) of the row in the file, as a spreadsheet shows it: the header is row 1
    columns: dict  # {name: list of N str}, those that metric.csv repeats
    keys: dict  # {key, relevant or candidate: the first of the N rows that asks for it}, K of them, in this order
    relevant: np.ndarray  # int32 (N,), as places in `keys`
    labels: np.ndarray  # int32 (N,), the column of the relevant candidate, -1 where it is missing
    candidates: "Candidates"
    counts: dict  # {"used": N, "no_candidates": ..., "too_many_candidates": ...}

    def name(self, index):
        return f"{self.path}, row {self.numbers[index]}"


class Candidates(Sequence):
    """N lists of keys, end to end in one array, and equal ones once, since lists come back with their search word."""

    def __init__(self, keys, which, lengths, places):
        """which: int32 (N,), one of the L distinct lists. lengths: (L,), of these. places: int32 (their sum,), of the keys of
        each list in `keys`, a list of str."""
        self.keys, self.which, self.places = keys, which, places
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])  # (L + 1,)

    def __len__(self):
        return len(self.which)

    def __getitem__(self, row):
        """The keys of a row: a tuple of str."""
        return tuple(self.keys[place] for place in self.places_of(row))

    def places_of(self, row):
        return self.places[self.bounds[self.which[row]] : self.bounds[self.which[row] + 1]]

    def padded(self):
        """The places of every row, int32 (N, C), padded with -1."""
        lengths = np.diff(self.bounds)  # (L,)
        lists = np.full((len(lengths), lengths.max()), -1, dtype=np.int32)  # (L, C)
        lists[np.arange(lists.shape[1]) < lengths[:, None]] = self.places
        return lists[self.which]


def read_rows(data_dir: str | Path, split: str, max_candidates: int) -> Rows:
    """Read csv/{split}.csv and leave out, counted, the rows that have no candidates or `max_candidates` and more.

    Cells are parsed as literals, never evaluated. Raises UserError.
    """
    path = Path(data_dir) / "csv" / f"{split}.csv"
    columns = {name: [] for name in COPIED}
    keys, lists, counts = {}, {}, {"used": 0, "no_candidates": 0, "too_many_candidates": 0}
    place_of = {}  # key -> place in `keys`
    numbers, relevant, labels, which, lengths, places = (array(kind) for kind in "qiiiii")
    for number, row in read_csv(path, COPIED + PARSED):
        parsed = {}
        for name in PARSED:
            try:
                parsed[name] = parse_cell(name, row[name])
            except (ValueError, RecursionError, MemoryError) as error:
                raise UserError(
                    f"{path}, row {number}, column {name}: {error} in {shorten(row[name])}"
                ) from None
        found, listed = parsed["candidate_resourceKey"]
        kind = (
            "no_candidates"
            if found == 0
            else "too_many_candidates"
            if found >= max_candidates
            else "used"
        )
        counts[kind] += 1
        if kind != "used":
            continue
        index = len(numbers)
        numbers.append(number)
        for name, values in columns.items():
            values.append(sys.intern(row[name]))
        for key in (row["resourceKey"], *listed):
            if key not in place_of:
                place_of[key] = len(place_of)
                keys[key] = index
        relevant.append(place_of[row["resourceKey"]])
        labels.append(listed.index(row["resourceKey"]) if row["resourceKey"] in listed else -1)
        listed = array("i", [place_of[key] for key in listed])
        new = len(lists)
        which.append(lists.setdefault(listed.tobytes(), new))
        if which[-1] == new:
            lengths.append(len(listed))
            places.extend(listed)
    if not numbers:
        raise UserError(
            f"{path}: no row is left to use: {counts}, where too many is {max_candidates} or more"
        )
    numbers, relevant, labels, which, lengths, places = map(
        np.asarray, (numbers, relevant, labels, which, lengths, places)
    )
    return Rows(
        path,
        numbers,
        columns,
        keys,
        relevant,
        labels,
        Candidates(list(keys), which, lengths, places),
        counts,
    )


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number, {column: text}) of a UTF-8 CSV that has these columns. Raises UserError."""
    csv.field_size_limit(CELL_LIMIT)
    number = 1
    try:
        with open(
            path, newline="", encoding="utf-8-sig"
        ) as file:  # -sig: with or without a byte-order mark
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(f"{path}: the columns {missing} are missing; it has {header}")
            for number, cells in enumerate(reader, start=2):
                if len(cells) != len(header):
                    if not cells:  # an empty line
                        continue
                    raise UserError(
                        f"{path}, row {number}: {len(cells)} cells under {len(header)} columns"
                    )
                yield number, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, after row {number}: not UTF-8 ({error.reason}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}, after row {number}: not a CSV ({error})") from None


@functools.lru_cache(
    4096
)  # lists come back with their search word, and parsing them is the slow part
def parse_cell(name: str, text: str) -> Any:
    """The value of a cell of one of the columns PARSED. Raises ValueError."""
    value = parse_literal(text)
    return as_keys(value) if name == "candidate_resourceKey" else value


def parse_literal(text: str) -> object:
    """The value of a cell, JSON or a Python literal; None for an empty one. Raises ValueError, also for code: none is run."""
    if not text.strip():
        return None
    # JSON first, which takes a thirtieth of the time. Where there are neither double quotes nor backslashes, single quotes mean
    # to Python what double ones mean to JSON.
    quoted = text if '"' in text or "\\" in text else text.replace("'", '"')
    try:
        return json.loads(quoted)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError):
        raise ValueError("expected JSON or a Python literal") from None


def as_keys(value: object) -> tuple[int, tuple[str, ...]]:
    """A parsed list of keys to (how many it lists, the tuple of them without repetition). Raises ValueError."""
    if value is None:
        return 0, ()
    if not isinstance(value, (list, tuple)):
        raise ValueError("expected a list of keys")
    if not all(isinstance(key, (str, int)) for key in value):
        raise ValueError("expected keys that are text or whole numbers")
    return len(value), tuple(dict.fromkeys(map(str, value)))


def shorten(text):
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


class PagesAndElements:
    """What the model is given: images of pages, each the query of a row, and of elements, each a candidate.

    data_dir: Path; read: list of Rows; model: needs config.page_size and config.element_size. Raises UserError.
    """

    def __init__(self, data_dir, read, model):
        pages, elements = {}, {}  # key -> where it is asked for first
        for rows in read:
            for row, page in enumerate(rows.columns["x_image_path"]):
                pages.setdefault(page, (rows, row))
            for key, row in rows.keys.items():
                elements.setdefault(key, (rows, row))
        self.pages = Images(data_dir / "images", pages, model.config.page_size)
        self.elements = Images(data_dir / "elements", elements, model.config.element_size)

    def contents(self):
        """Yield, as bytes, what tells these files from others: names and sizes, since to read all the images takes long."""
        for images in (self.pages, self.elements):
            for key, path in zip(images.index, images.paths, strict=True):
                yield f"{key} {os.stat(path).st_size}\n".encode()

    def number(self, rows):
        """The query of each row, int64 (N,), and the candidate of each of rows.keys, int64 (K,), as numbers."""
        queries = np.array([self.pages.index[name] for name in rows.columns["x_image_path"]])
        return queries, np.array([self.elements.index[key] for key in rows.keys])

    def take_rows(self, queries, candidates):
        """What `forward` takes of queries (B,) with candidates (B, C): pages uint8 (B, 3, H, W), candidates (B, C, 3, h, w)."""
        elements = self.elements.take(candidates.ravel())  # (B x C, 3, h, w)
        return {
            "pages": self.pages.take(queries),
            "candidates": elements.unflatten(0, candidates.shape),
        }

    def as_inputs(self, queries, candidates):
        """The distinct inputs of the rerank evaluation are elements and pages: their numbers for queries (N,) and candidates
        (N, C), the elements' from 0 on, and then the pages'."""
        return len(self.elements.index) + queries, candidates

    def groups(self, inputs):
        """Which of these sorted inputs may share a batch, since pages and elements differ in size: ranges of positions, each with
        how many of them there are in a batch of one page."""
        first_page = np.searchsorted(inputs, len(self.elements.index))
        elements = max(
            1, self.pages.size**2 // self.elements.size**2
        )  # as many pixels, so as much memory; one by one is slow
        return [(range(first_page), elements), (range(first_page, len(inputs)), 1)]

    def take(self, inputs):
        """What `forward` takes of inputs (B,) of one group: images uint8 (B, 3, H, W)."""
        first_page = len(self.elements.index)
        of_pages = inputs[0] >= first_page
        return {
            "images": self.pages.take(inputs - first_page)
            if of_pages
            else self.elements.take(inputs)
        }

    def show_query(self, rows, row):
        """What people see of the query of a row: (search word, Path of the page)."""
        return rows.columns["search_word"][row], Path(
            self.pages.paths[self.pages.index[rows.columns["x_image_path"][row]]]
        )

    def show_candidate(self, key):
        """What people see of a candidate: the Path of the element."""
        return Path(self.elements.paths[self.elements.index[key]])


class Images:
    """The distinct images of one folder, fitted into squares of `size` pixels.

    asked: {key: (rows, index)}, the key being the file's name without .png, the rest where it is asked for, for messages.

    What fits is decoded here, once, and kept: no epoch and no evaluation decodes it again. Otherwise (above CACHE_LIMIT) files
    are only checked here, and decoded when asked for: give the DataLoader workers. Either way every image is looked at before
    training begins. Raises UserError naming file and row.
    """

    def __init__(self, folder, asked, size):
        self.size = size
        self.index = {key: index for index, key in enumerate(asked)}
        self.paths, self.pixels = [], None
        if len(asked) * 3 * size * size <= CACHE_LIMIT:
            self.pixels = np.empty(
                (len(asked), 3, size, size), dtype=np.uint8
            )  # (E, 3, size, size)
        # Most of the time before the first update, so on all cores, shared with the other processes of this machine.
        workers = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(
            workers, 8, len(asked) // 1000
        )  # a few images are read before workers have started
        batches = DataLoader(
            list(asked),  # pyrefly: ignore[bad-argument-type]
            batch_size=64,
            collate_fn=functools.partial(
                look_at, os.path.realpath(folder), None if self.pixels is None else size
            ),
            num_workers=workers if workers > 1 else 0,
            generator=torch.Generator(),  # else iterating draws from the global random state
        )
        for paths, pixels, error in batches:
            start = len(self.paths)
            self.paths += paths
            if error is not None:
                rows, row = list(asked.values())[len(self.paths)]
                raise UserError(f"{error} (asked for by {rows.name(row)})")
            if self.pixels is not None:
                self.pixels[start : len(self.paths)] = pixels

    def take(self, indices):
        """uint8 (len(indices), 3, size, size)"""
        if self.pixels is not None:
            # Indexed by NumPy: on a CPU torch wakes all threads to copy 400 kB, and takes up to 70 times as long.
            return torch.from_numpy(self.pixels[indices])
        return torch.stack([decode_image(self.paths[index], self.size) for index in indices])


def look_at(root, size, keys):
    """The images of these keys, up to the first that cannot be used: (paths, pixels, why that one cannot, or None).

    pixels: uint8 (len(paths), 3, size, size), or, for size None, nothing: the files are only checked.
    """
    paths, pixels = [], []
    try:
        for key in keys:
            path = find_image(root, key)
            if size is None:
                check_image(path)
            else:
                pixels.append(decode_image(path, size).numpy())
            paths.append(path)
    except (
        UserError
    ) as error:  # not raised, since DataLoader would put the traceback of its worker before it
        return paths, None, str(error)
    # An array, since tensors would come through shared memory, of which containers have little.
    return paths, np.array(pixels), None


def find_image(root: str, key: str) -> str:
    """The file of a key, certain to lie inside `root`, a folder's real path; symbolic links are followed. Raises UserError."""
    name = f"{key}.png"
    try:
        path = os.path.realpath(os.path.join(root, name), strict=True)
    except (OSError, ValueError):  # absent, a null byte, a loop of links
        raise UserError(f"{root}: there is no such file: {shorten(name)}") from None
    if not path.startswith(os.path.join(root, "")):
        raise UserError(f"{shorten(key)} points outside {root}")
    return path


def decode_image(path, size: int) -> torch.Tensor:
    """An image of any mode and size to uint8 (3, size, size), centred on white, its proportions kept. Raises UserError."""
    with open_image(path) as image:
        image.load()
        if image.mode.startswith(
            "I;16"
        ):  # grey of 16 bits, which convert() would clip to white; one of them may be transparent
            grey = np.asarray(image)
            image = Image.fromarray(
                np.where(grey == image.info.get("transparency"), 255, grey // 257).astype(np.uint8)
            )
        if image.has_transparency_data:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            )
        image = image.convert("RGB")
        if image.size != (size, size):
            longer = max(image.size)
            fitted = [
                max(1, round(side * size / longer)) for side in image.size
            ]  # pad alone leaves nothing of a thin line
            image = ImageOps.pad(
                image.resize(fitted, Image.Resampling.BICUBIC), (size, size), color="white"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_image(path):
    """See that it is an image, as far as can be done without decoding it. Raises UserError."""
    with open_image(path) as image:
        image.verify()


@contextmanager
def open_image(path):
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels; the limit is {PIXEL_LIMIT:,}"
                )
            if image.mode in ("I", "F"):  # of no fixed range, so nothing says what is white
                raise UserError(
                    f"{path}: pixels of 32 bits, or signed ones; save it with 8 bits a channel, or 16 unsigned"
                )
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds, all of which mean the same to the user
        raise UserError(f"{path}: cannot be read as an image: {error}") from None


class SharedDataset(Dataset):
    """Training and the shared evaluation: a query, its relevant candidate, and k of its others.

    The k are drawn from (seed, epoch, row), so the draw is the same in any process, worker or resumed run.
    """

    def __init__(self, rows, inputs, num_negatives, seed):
        self.rows, self.inputs, self.num_negatives, self.seed = rows, inputs, num_negatives, seed
        self.queries, self.candidates = inputs.number(rows)  # (N,), (K,)
        self.num_others = np.diff(rows.candidates.bounds)[rows.candidates.which] - (
            rows.labels >= 0
        )  # (N,)
        self.labels = torch.zeros(
            len(self), dtype=torch.int64
        )  # (N,): the relevant candidate is put first
        self.groups = [(range(len(self)), 1)]
        self.epoch, self.drawn = (
            None,
            np.empty(0),
        )  # of the latest batch: its epoch, what `draw` gave

    def __len__(self):
        return len(self.queries)

    def __getitems__(self, keys):
        """A batch of one epoch, made whole, since a call for each row would cost more than the rows: index int64 (B,), -1 for
        filling; weight float32 (B,); the rest is what the model's `forward` takes."""
        rows, epochs, weights = zip(*keys, strict=True)
        assert len(set(epochs)) == 1, "the keys of a batch must be of one epoch"
        if epochs[0] != self.epoch:
            self.epoch, self.drawn = epochs[0], self.draw(epochs[0])
        rows, weights = np.array(rows), np.array(weights, dtype=np.float32)  # (B,), (B,)
        places = self.drawn[rows]  # (B, 1 + k)
        candidate_mask = np.arange(places.shape[1]) <= self.num_others[rows, None]  # (B, 1 + k)
        return {
            "index": torch.from_numpy(np.where(weights > 0, rows, -1)),  # (B,)
            "weight": torch.from_numpy(weights),  # (B,)
            **self.inputs.take_rows(self.queries[rows], self.candidates[places]),
            "candidate_mask": torch.from_numpy(candidate_mask),  # (B, 1 + k)
            "labels": self.labels[rows],  # (B,)
        }

    def draw(self, epoch):
        """Of every row its relevant candidate and k others, int32 (N, 1 + k), as places in rows.keys; a row that has fewer is
        padded with the relevant one, and k is at most what the longest list has. All rows at once, since a generator for each
        costs more than the rest of a small batch.

        By Floyd's algorithm, which takes k chances and k x k comparisons, however long the list (Bentley and Floyd, "Programming
        pearls: a sample of brilliance", Communications of the ACM 30(9), 1987).
        """
        listed, labels = self.rows.candidates, self.rows.labels
        generator = np.random.default_rng(
            (self.seed, epoch, 1)
        )  # 1: not the chances that TrainSampler orders the rows by
        k = min(self.num_negatives, self.num_others.max())
        chances = generator.random(
            (len(self), k)
        )  # those of a row do not depend on the rows after it
        columns = np.full(chances.shape, -1, dtype=np.int32)  # (N, k) among the others of a row
        for i in range(k):
            highest = (
                self.num_others - k + i
            )  # (N,), below 0 where there are too few: then nothing is drawn
            column = (chances[:, i] * (highest + 1)).astype(np.int32)  # from 0 to the highest
            column = np.where((columns == column[:, None]).any(1), highest, column)
            columns[:, -1 - i] = np.where(
                highest < 0, -1, column
            )  # filled from the end, so that padding comes last
        columns += (labels >= 0)[:, None] & (
            columns >= labels[:, None]
        )  # the relevant one is stepped over
        starts = listed.bounds[listed.which]  # (N,)
        drawn = np.where(
            columns < 0, self.rows.relevant[:, None], listed.places[starts[:, None] + columns]
        )
        return np.column_stack([self.rows.relevant, drawn])


class RerankDataset(Dataset):
    """The rerank evaluation: an item is a distinct input of the whole evaluation, so each goes through the model once.

    groups: which inputs may share a batch, and how many, in multiples of the batch size.
    queries: int64 (N,), candidates: int64 (N, C) padded with -1, both as inputs; labels: int64 (N,), the column of the
    relevant candidate, -1 where it is missing.
    """

    def __init__(self, rows, inputs):
        self.rows, self.inputs = rows, inputs
        queries, numbers = inputs.number(rows)  # (N,), (K,)
        places = rows.candidates.padded()  # (N, C)
        queries, candidates = inputs.as_inputs(queries, numbers[places])  # (N,), (N, C)
        self.numbers = np.unique(np.concatenate([queries, candidates[places >= 0]]))  # (M,)
        self.groups = inputs.groups(self.numbers)
        self.queries = torch.from_numpy(np.searchsorted(self.numbers, queries))
        self.candidates = torch.from_numpy(
            np.where(places >= 0, np.searchsorted(self.numbers, candidates), -1)
        )
        self.labels = torch.from_numpy(rows.labels.astype(np.int64))

    def __len__(self):
        return len(self.numbers)

    def __getitems__(self, keys):
        """A batch, of one group: index int64 (B,), -1 for filling; the rest is what the model's `forward` takes."""
        index = torch.tensor([key.index if key.weight else -1 for key in keys])  # (B,)
        return {"index": index, **self.inputs.take(self.numbers[[key.index for key in keys]])}

    def show_query(self, row):
        """(search word, picture) for gallery.py: the picture is the Path of an image, or a str where the task has no images."""
        return self.inputs.show_query(self.rows, row)

    def show_candidate(self, row, column):
        """(key, picture), as in `show_query`; the column -1, as in `labels`, is the relevant candidate that is missing."""
        listed = self.rows.candidates
        place = self.rows.relevant[row] if column < 0 else listed.places_of(row)[column]
        key = listed.keys[
            place
        ]  # not listed[row][column], which makes the keys of the whole row for one of them
        return key, self.inputs.show_candidate(key)


def whole(batch):
    """The collate_fn of a DataLoader over these data sets, whose `__getitems__` makes a whole batch."""
    return batch


class TrainSampler(Sampler):
    """The keys of training, a function of (seed, update) alone: not of processes, micro-batches, workers or interruptions.

    An epoch is one permutation, cut into global batches. The last one of an epoch is filled with keys of weight 0, and its
    rows weigh more, so that the mean over a full batch is the mean over the rows that are there.
    """

    def __init__(self, num_rows, global_batch_size, num_updates, seed, first_update=0):
        self.num_rows, self.global_batch_size, self.num_updates, self.seed = (
            num_rows,
            global_batch_size,
            num_updates,
            seed,
        )
        self.first_update = first_update

    def __len__(self):
        return (self.num_updates - self.first_update) * self.global_batch_size

    def __iter__(self):
        first_epoch, skipped = divmod(
            self.first_update, updates_per_epoch(self.num_rows, self.global_batch_size)
        )
        start = skipped * self.global_batch_size
        return itertools.islice(self.endless(first_epoch), start, start + len(self))

    def endless(self, first_epoch):
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows).tolist()
            for start in range(0, self.num_rows, self.global_batch_size):
                rows = order[start : start + self.global_batch_size]
                yield from (Key(row, epoch, self.global_batch_size / len(rows)) for row in rows)
                yield from (
                    Key(rows[0], epoch, 0.0) for _ in range(self.global_batch_size - len(rows))
                )


def updates_per_epoch(num_rows: int, global_batch_size: int) -> int:
    return math.ceil(num_rows / global_batch_size)


def batches_in_groups(
    groups: list[tuple[range, int]], batch_size: int, num_processes: int
) -> list[list[Key]]:
    """The batches of an evaluation, as many for each process. groups: positions, and how many batch sizes of them make a batch.

    They are cut before they are dealt out, and filled to whole batch sizes, since the last bits of an output may depend on the
    shape of the batch it is computed in, and in an odd one on the number of threads: so the same weights give the same bits on
    any number of processes.
    """
    batches = []
    for positions, multiple in groups:
        keys = [Key(index) for index in positions]
        keys += [Key(positions[0], weight=0.0)] * (-len(keys) % batch_size)
        batches += [
            keys[start : start + multiple * batch_size]
            for start in range(0, len(keys), multiple * batch_size)
        ]
    return batches + [[Key(0, weight=0.0)]] * (-len(batches) % num_processes)
