"""The CSV and image contract: read, validate, filter, count; the data sets of the two evaluations, and their batches.

    csv/train.csv   csv/eval.csv   csv/test_vocabulary.csv
    images/{x_image_path}.png      the page, with the element removed
    elements/{resourceKey}.png     the elements, composited over white where they are transparent

N rows, C candidates, B batch, E distinct images. Whatever can be wrong in a user's files is a UserError.

EDIT HERE for another task: `read_rows` says what a row is, the two data sets what the model is given of it.
"""

import ast
import csv
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

COLUMNS = ("search_word", "template_idx", "page_num", "x_image_path", "resourceKey", "candidate_resourceKey", "x_info", "y_info")
CELL_LIMIT = 1_000_000  # characters
PIXEL_LIMIT = 50_000_000  # of one image: a small file can unpack to more than the memory holds
CACHE_LIMIT = 2_000_000_000  # bytes of decoded images that a process keeps
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # by content, whatever the name says; some others run programs


class UserError(ValueError):
    """Something that the user can mend, told in one line: what, where (file, row, value), and what to do."""


class Key(NamedTuple):
    """What a sampler asks of a data set. A weight of 0 marks filling: it makes a batch full and counts for nothing."""

    index: int
    epoch: int = 0
    weight: float = 1.0


def read_datasets(config, image_sizes, splits):
    """The data sets of some CSVs, in the order of `splits`: a RerankDataset of test_vocabulary, a SharedDataset of the others.

    config: needs data_dir, max_candidates, num_negatives, seed. image_sizes: needs page_size, element_size. Raises UserError.
    """
    read = [read_rows(config.data_dir, split, config.max_candidates) for split in splits]
    pages, elements = {}, {}  # key -> where it is asked for first
    for rows in read:
        for row, keys in enumerate(rows.candidates):
            pages.setdefault(rows.columns["x_image_path"][row], (rows, row))
            for key in (rows.columns["resourceKey"][row], *keys):
                elements.setdefault(key, (rows, row))
    pages = Images(Path(config.data_dir) / "images", pages, image_sizes.page_size)
    elements = Images(Path(config.data_dir) / "elements", elements, image_sizes.element_size)
    return [
        RerankDataset(rows, pages, elements)
        if split == "test_vocabulary"
        else SharedDataset(rows, pages, elements, config.num_negatives, config.seed)
        for split, rows in zip(splits, read, strict=True)
    ]


def fingerprint(datasets) -> str:
    """A hash of what the numbers depend on in the files: the CSVs, and the names and sizes of their images."""
    found = hashlib.blake2b(digest_size=16)
    for dataset in datasets:
        found.update(dataset.rows.path.read_bytes())
    for images in (datasets[0].pages, datasets[0].elements):  # of all of them
        for key, path in zip(images.index, images.paths, strict=True):
            found.update(f"{key} {path.stat().st_size}\n".encode())
    return found.hexdigest()


@dataclass
class Rows:
    """The rows of one CSV that are used. Lists that are equal are one array, however many rows have them."""

    path: Path
    numbers: list  # of the row in the file, as a spreadsheet shows it: the header is row 1
    columns: dict  # {name: list of N str}, those that metric.csv repeats
    candidates: list  # N tuples of keys, without repetition
    counts: dict  # {"used": N, "no_candidates": ..., "too_many_candidates": ...}

    def name(self, index):
        return f"{self.path}, row {self.numbers[index]}"


def read_rows(data_dir: str | Path, split: str, max_candidates: int) -> Rows:
    """Read csv/{split}.csv and leave out, counted, the rows that have no candidates or `max_candidates` and more.

    Cells are parsed as literals, never evaluated. Raises UserError.
    """
    path = Path(data_dir) / "csv" / f"{split}.csv"
    rows = Rows(path, [], {name: [] for name in COLUMNS[:5]}, [], {"used": 0, "no_candidates": 0, "too_many_candidates": 0})
    parsed: dict[
        tuple[str, str], Any
    ] = {}  # (column, text) -> value: lists come back with their search word, and parsing them is the slow part
    for number, row in read_csv(path):
        for name in ("candidate_resourceKey", "x_info", "y_info"):
            if (name, row[name]) not in parsed:
                try:
                    value = parse_literal(row[name])
                    parsed[name, row[name]] = as_keys(value) if name == "candidate_resourceKey" else value
                except (ValueError, RecursionError, MemoryError) as error:
                    raise UserError(f"{path}, row {number}, column {name}: {error} in {shorten(row[name])}") from None
        found, keys = parsed["candidate_resourceKey", row["candidate_resourceKey"]]
        kind = "no_candidates" if found == 0 else "too_many_candidates" if found >= max_candidates else "used"
        rows.counts[kind] += 1
        if kind == "used":
            rows.numbers.append(number)
            rows.candidates.append(keys)
            for name, values in rows.columns.items():
                values.append(row[name])
    if not rows.candidates:
        raise UserError(f"{path}: no row is left to use: {rows.counts}, where too many is {max_candidates} or more")
    return rows


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number, {column: text}) of a UTF-8 CSV. Raises UserError."""
    csv.field_size_limit(CELL_LIMIT)
    number = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: with or without a byte-order mark
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise UserError(f"{path}: the columns {missing} are missing; it has {header}")
            for number, cells in enumerate(reader, start=2):
                if len(cells) != len(header):
                    if not cells:  # an empty line
                        continue
                    raise UserError(f"{path}, row {number}: {len(cells)} cells under {len(header)} columns")
                yield number, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, after row {number}: not a CSV ({error})") from None


def parse_literal(text: str) -> object:
    """The value of a cell, JSON or a Python literal; None for an empty one. Raises ValueError, also for code: none is run."""
    if not text.strip():
        return None
    try:
        return json.loads(text)  # thirty times as fast, and what other languages write
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
            self.pixels = torch.empty(len(asked), 3, size, size, dtype=torch.uint8)  # (E, 3, size, size)
        for index, (key, (rows, row)) in enumerate(asked.items()):
            try:
                self.paths.append(find_image(folder, key))
                image = decode_image(self.paths[index], None if self.pixels is None else size)
                if self.pixels is not None:
                    self.pixels[index] = image
            except UserError as error:
                raise UserError(f"{error} (asked for by {rows.name(row)})") from None

    def take(self, indices):
        """uint8 (len(indices), 3, size, size)"""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        return torch.stack([decode_image(self.paths[index], self.size) for index in indices])  # pyrefly: ignore[bad-argument-type]


def find_image(folder: Path, key: str) -> Path:
    """The file of a key, certain to lie inside the folder, symbolic links followed. Raises UserError."""
    path = folder / f"{key}.png"
    try:
        resolved = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # absent, a null byte, a loop of links
        raise UserError(f"{folder}: there is no such file: {shorten(path.name)}") from None
    if not resolved.is_relative_to(folder.resolve()):
        raise UserError(f"{shorten(key)} points outside {folder}")
    return resolved


def decode_image(path, size):
    """An image of any mode and size to uint8 (3, size, size), centred on white, its proportions kept.

    With size None it is checked, as far as can be done without decoding it, and nothing is returned. Raises UserError.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UserError(f"{path}: {image.width} x {image.height} pixels; the limit is {PIXEL_LIMIT:,}")
            if size is None:
                return image.verify()
            image.load()
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            elif image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds, all of which mean the same to the user
        raise UserError(f"{path}: cannot be read as an image: {error}") from None


class SharedDataset(Dataset):
    """Training and the shared evaluation: a page, its relevant element, and k of its other candidates.

    The k are drawn from (seed, epoch, row), so the draw is the same in any process, worker or resumed run.
    """

    def __init__(self, rows, pages, elements, num_negatives, seed):
        self.rows, self.pages, self.elements, self.num_negatives, self.seed = rows, pages, elements, num_negatives, seed
        self.page = np.array([pages.index[name] for name in rows.columns["x_image_path"]])  # (N,)
        self.relevant = np.array([elements.index[key] for key in rows.columns["resourceKey"]])  # (N,)
        self.candidates = index_candidates(rows, elements)
        self.labels = torch.zeros(len(self), dtype=torch.int64)  # (N,): the relevant element is put first
        self.groups = [range(len(self))]

    def __len__(self):
        return len(self.page)

    def __getitem__(self, key):
        row, epoch, weight = key
        others = self.candidates[row][self.candidates[row] != self.relevant[row]]
        drawn = np.random.default_rng((self.seed, epoch, row)).permutation(others)[: self.num_negatives]
        candidates = np.full(1 + self.num_negatives, self.relevant[row])  # a short list is padded, and the padding masked
        candidates[1 : 1 + len(drawn)] = drawn
        return {
            "index": row if weight else -1,
            "weight": weight,
            "pages": self.pages.take([self.page[row]])[0],
            "candidates": self.elements.take(candidates),
            "candidate_mask": torch.arange(len(candidates)) <= len(drawn),
            "labels": self.labels[row],
        }

    @staticmethod
    def collate(items):
        """A batch: index int64 (B,), -1 for filling; weight float32 (B,); the rest is what the model's `forward` takes."""
        return {
            "index": torch.tensor([item["index"] for item in items]),  # (B,)
            "weight": torch.tensor([item["weight"] for item in items], dtype=torch.float32),  # (B,)
            "pages": torch.stack([item["pages"] for item in items]),  # (B, 3, H, W) uint8
            "candidates": torch.stack([item["candidates"] for item in items]),  # (B, 1 + k, 3, h, w) uint8
            "candidate_mask": torch.stack([item["candidate_mask"] for item in items]),  # (B, 1 + k)
            "labels": torch.stack([item["labels"] for item in items]),  # (B,)
        }


class RerankDataset(Dataset):
    """The rerank evaluation: an item is a distinct input of the whole evaluation, here an image, so each is encoded once.

    groups: which inputs may share a batch; pages and elements differ in size.
    queries: int64 (N,), candidates: int64 (N, C) padded with -1, both as inputs; labels: int64 (N,), the column of the
    relevant candidate, -1 where it is missing.
    """

    def __init__(self, rows, pages, elements):
        self.rows, self.pages, self.elements = rows, pages, elements
        lists = index_candidates(rows, elements)
        page = np.array([pages.index[name] for name in rows.columns["x_image_path"]])  # (N,)
        self.page_inputs = np.unique(page)
        self.element_inputs = np.unique(np.concatenate(lists))
        first_element = len(self.page_inputs)
        self.groups = [range(first_element), range(first_element, len(self))]

        self.queries = torch.from_numpy(np.searchsorted(self.page_inputs, page))
        self.candidates = torch.full((len(rows.candidates), max(map(len, lists))), -1)
        self.labels = torch.full((len(rows.candidates),), -1)
        for row, keys in enumerate(rows.candidates):
            inputs = first_element + np.searchsorted(self.element_inputs, lists[row])
            self.candidates[row, : len(inputs)] = torch.from_numpy(inputs)
            if rows.columns["resourceKey"][row] in keys:
                self.labels[row] = keys.index(rows.columns["resourceKey"][row])

    def __len__(self):
        return len(self.page_inputs) + len(self.element_inputs)

    def __getitem__(self, key):
        index, _, weight = key
        first_element = len(self.page_inputs)
        if index < first_element:
            image = self.pages.take([self.page_inputs[index]])[0]
        else:
            image = self.elements.take([self.element_inputs[index - first_element]])[0]
        return {"index": index if weight else -1, "images": image}

    @staticmethod
    def collate(items):
        """A batch: index int64 (B,), -1 for filling; images uint8 (B, 3, H, W)."""
        return {
            "index": torch.tensor([item["index"] for item in items]),
            "images": torch.stack([item["images"] for item in items]),
        }


def index_candidates(rows, elements):
    """The candidates as indices of `elements`: a list of N int64 arrays, equal lists being one array."""
    arrays = {}
    for keys in rows.candidates:
        if keys not in arrays:
            arrays[keys] = np.array([elements.index[key] for key in keys])
    return [arrays[keys] for keys in rows.candidates]


class TrainSampler(Sampler):
    """The keys of training, a function of (seed, update) alone: not of processes, micro-batches, workers or interruptions.

    An epoch is one permutation, cut into global batches. The last one of an epoch is filled with keys of weight 0, and its
    rows weigh more, so that the mean over a full batch is the mean over the rows that are there.
    """

    def __init__(self, num_rows, global_batch_size, num_updates, seed, first_update=0):
        self.num_rows, self.global_batch_size, self.num_updates, self.seed = num_rows, global_batch_size, num_updates, seed
        self.first_update = first_update

    def __len__(self):
        return (self.num_updates - self.first_update) * self.global_batch_size

    def __iter__(self):
        first_epoch, skipped = divmod(self.first_update, updates_per_epoch(self.num_rows, self.global_batch_size))
        start = skipped * self.global_batch_size
        return itertools.islice(self.endless(first_epoch), start, start + len(self))

    def endless(self, first_epoch):
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows).tolist()
            for start in range(0, self.num_rows, self.global_batch_size):
                rows = order[start : start + self.global_batch_size]
                yield from (Key(row, epoch, self.global_batch_size / len(rows)) for row in rows)
                yield from (Key(rows[0], epoch, 0.0) for _ in range(self.global_batch_size - len(rows)))


def updates_per_epoch(num_rows: int, global_batch_size: int) -> int:
    return math.ceil(num_rows / global_batch_size)


def full_batches(groups: list[range], batch_size: int, num_processes: int) -> list[Key]:
    """The keys of an evaluation, cut into full batches, as many for each process.

    The batches are cut from the whole list before they are dealt out, and each is full, since the last bits of an output may
    depend on the shape of the batch it is computed in: so the same weights give the same bits on any number of processes.
    """
    keys = []
    for group in groups:
        keys += [Key(index) for index in group]
        keys += [Key(group[0], weight=0.0)] * (-len(group) % batch_size)
    return keys + [Key(groups[-1][0], weight=0.0)] * (-len(keys) % (batch_size * num_processes))
