"""What a row is: the CSVs and images of a match-element search, read, checked and counted.

    csv/train.csv   csv/eval.csv   csv/test_vocabulary.csv
    images/{x_image_path}.png      the page without the element
    elements/{resourceKey}.png     the elements; transparent ones are put on white

N rows, C candidates, B batch. Whatever is wrong in a user's files is a UserError.

EDIT HERE for another task: the columns, what `read_rows` yields and what the two data sets make of
it. They keep the contract in runtime/batches.py.
"""

import ast
import csv
import functools
import hashlib
import json
import os
import stat
import unicodedata
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from model import rerank_scores
from runtime.batches import index_and_weight
from runtime.cache import Texts, hash_files, items, kept
from runtime.checkpoint import describe_file
from runtime.launch import UserError

COLUMNS = ("search_word", "template_idx", "page_num", "x_image_path", "resourceKey")
COLUMNS += ("candidate_resourceKey", "x_info", "y_info")
CELL_LIMIT = 1_000_000  # characters
PIXEL_LIMIT = 50_000_000  # of one image: a small file can unpack to more than the memory holds
# By content, whatever the name says. Pillow knows other formats. Some of them run programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
CODE = PIL.__version__ + Path(__file__).read_text(encoding="utf-8")  # what is kept depends on it


def read_datasets(config, model, splits):
    """The data sets of some CSVs, in the order of `splits`. Raises UserError.

    test_vocabulary gives a RerankDataset. Any other one gives a SharedDataset.
    model: its config has the sizes that images are fitted into.
    """
    folder = Path(config.data_dir)
    tables, page_keys, element_keys = read_tables(folder, splits, config.max_candidates)

    def first_row(names, number):
        """What messages call the first row for which names(table, number), bool (N,), is true."""
        rows = (
            (table, row) for table in tables for row in np.flatnonzero(names(table, number))[:1]
        )
        return next(table.name_row(row) for table, row in rows)

    pages, elements = (
        Images(folder / name, keys, size, functools.partial(first_row, names))
        for name, keys, size, names in (
            ("images", page_keys, model.config.page_size, Table.rows_of_page),
            ("elements", element_keys, model.config.element_size, Table.rows_of_element),
        )
    )
    return [
        RerankDataset(table, pages, elements, folder)
        if split == "test_vocabulary"
        else SharedDataset(table, pages, elements, config.num_negatives, config.seed)
        for split, table in zip(splits, tables, strict=True)
    ]


def fingerprint(datasets) -> str:
    """A hash of the CSVs and of the images' names and sizes: reading them all takes long."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (*(dataset.table for dataset in datasets), datasets[0].pages, datasets[0].elements):
        digest.update(part.digest.encode())  # pages and elements are the same for all
    return digest.hexdigest()


class Row(NamedTuple):
    """One record of a CSV, as reading yields it."""

    position: int  # in pandas.read_csv of the file: blank lines do not count
    number: int  # as a spreadsheet shows it: the header is row 1, and blank lines count
    query: str  # the key of a page
    relevant: str
    listed: int  # how many candidates the cell lists, repeated ones too
    candidates: tuple[str, ...]  # each once


@dataclass
class Table:
    """The N rows of one CSV that are used. Pages and elements are numbers, the same in all CSVs.

    Arrays and no object for each row: forked workers copy the objects that they touch.
    """

    path: Path
    counts: dict  # {"used": N, what else became of rows: how many, what is odd: how many of the N}
    digest: str  # a hash of the file
    positions: np.ndarray  # int64 (N,), as in Row, and so are the numbers
    numbers: np.ndarray  # int64 (N,)
    queries: np.ndarray  # int64 (N,), pages
    relevant: np.ndarray  # int64 (N,), elements
    labels: np.ndarray  # int64 (N,), the relevant element's column among the candidates, or -1
    lists: np.ndarray  # int64 (N,), which list of candidates. Rows of one search share one.
    num_others: np.ndarray  # int64 (N,), how many candidates are not the relevant one
    starts: np.ndarray  # int64 (L + 1,), where each of the L lists starts in `listed`
    listed: np.ndarray  # int32 (all candidates of all lists,), elements

    def candidates(self, row):
        """The elements of one row: int32 (its candidates,)."""
        return self.listed[self.starts[self.lists[row]] : self.starts[self.lists[row] + 1]]

    def padded_candidates(self):
        """The elements of all rows: int32 (N, C), padded with -1."""
        lengths = np.diff(self.starts)  # (L,)
        padded = np.full((len(lengths), lengths.max()), -1, dtype=np.int32)  # (L, C)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = self.listed
        return padded[self.lists]

    def rows_of_page(self, page):
        """Whether each row names it: bool (N,)."""
        return self.queries == page

    def rows_of_element(self, element):
        lists = np.searchsorted(self.starts, np.flatnonzero(self.listed == element), "right") - 1
        return (self.relevant == element) | np.isin(self.lists, lists)

    def name_row(self, row):
        return f"{self.path}, row {self.numbers[row]}"


def read_tables(folder, splits, max_candidates):
    """The Tables of some CSVs, and the keys of pages and of elements, by their numbers: Texts.

    They are parsed once, until a CSV or what stands here changes. Raises UserError.
    """
    paths = [folder / "csv" / f"{split}.csv" for split in splits]
    try:
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    write = functools.partial(write_tables, paths, max_candidates)
    made = kept(folder, "tables", f"{states} {max_candidates} {CODE}", write)
    tables = []
    for path in paths:
        names = Table.__annotations__
        values: dict[str, Any] = {name: made[f"{path.stem}.{name}"] for name in names}
        plain = {name: json.loads(values[name].item()) for name in ("counts", "digest")}
        tables.append(check_relevant(Table(**values | plain | {"path": path})))
    return tables, *(Texts(made[kind], made[f"{kind}.starts"]) for kind in ("pages", "elements"))


def write_tables(paths, max_candidates, folder):
    ids = {"pages": {}, "elements": {}}  # {key: its number}, over all of the CSVs
    for path in paths:
        for name, value in vars(read_table(path, max_candidates, *ids.values())).items():
            array = value if isinstance(value, np.ndarray) else json.dumps(value, default=str)
            np.save(folder / f"{path.stem}.{name}.npy", array)
    for kind, keys in ids.items():
        Texts.save(folder, kind, keys)


def read_table(path: Path, max_candidates: int, query_ids: dict, element_ids: dict) -> Table:
    """Read a CSV. Rows without candidates and rows with `max_candidates` or more are left out.

    New keys get the next numbers of query_ids and element_ids. Raises UserError.
    """
    counts = {"used": 0, "no_candidates": 0, "too_many_candidates": 0}
    rows = array("q")
    lists = {}  # {the elements of a list, int32, as bytes: its number}
    for row in read_rows(path):
        if row.listed == 0:
            counts["no_candidates"] += 1
        elif row.listed >= max_candidates:
            counts["too_many_candidates"] += 1
        else:
            counts["used"] += 1
            query = query_ids.setdefault(row.query, len(query_ids))
            relevant, *elements = [
                element_ids.setdefault(key, len(element_ids))
                for key in (row.relevant, *row.candidates)
            ]
            label = elements.index(relevant) if relevant in elements else -1
            of_row = lists.setdefault(array("i", elements).tobytes(), len(lists))
            num_others = len(elements) - (label >= 0)
            rows.extend((row.position, row.number, query, relevant, label, of_row, num_others))
    if not rows:
        raise UserError(f"{path}: no row is left to use: {counts}; {max_candidates} is too many")
    columns = np.ascontiguousarray(np.asarray(rows).reshape(-1, 7).T)  # (7, N)
    starts = np.cumsum([0, *map(len, lists)]) // 4
    listed = np.frombuffer(b"".join(lists), np.int32)
    return Table(path, counts, describe_file(path)[1], *columns, starts=starts, listed=listed)


def check_relevant(table: Table) -> Table:
    """Count the rows that rank nothing. Warns of many. Raises UserError if all are such rows."""
    for name, odd, what in (
        ("missing", table.labels < 0, "is not among the candidates, letter by letter"),
        ("alone", table.num_others == 0, "is the only candidate, so nothing is ranked"),
    ):
        table.counts[f"relevant_{name}"] = int(odd.sum())
        if odd.mean() > 0.1:
            first = f"the first is row {table.numbers[odd][0]}"
            message = f"{table.path}: in {odd.sum()} of {len(odd)} rows resourceKey {what}; {first}"
            if odd.all():
                raise UserError(message)
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {message}", flush=True)
    return table


def read_rows(path: Path) -> Iterator[Row]:
    """The records of a CSV, checked. Cells are parsed as literals, never run. Raises UserError."""
    parsers: dict[str, Any] = {"x_info": parse_literal, "y_info": parse_literal}
    parsers |= {"candidate_resourceKey": parse_keys}
    for position, (number, cells) in enumerate(read_csv(path, COLUMNS)):
        values: dict[str, Any] = {}
        for name, parse in parsers.items():
            try:
                values[name] = parse(cells[name])
            except (ValueError, RecursionError, MemoryError) as error:
                cell = shorten(cells[name])
                raise UserError(f"{path}, row {number}, column {name}: {error} in {cell}") from None
        listed, candidates = values["candidate_resourceKey"]
        yield Row(position, number, cells["x_image_path"], cells["resourceKey"], listed, candidates)


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield (number, {column: text}) of each record of a UTF-8 CSV. Raises UserError.

    Not pandas: it pads or shifts short rows in silence. And it does not know the row of an error.
    """
    csv.field_size_limit(CELL_LIMIT)
    number = 1
    try:
        require_file(path)
        with open(path, newline="", encoding="utf-8-sig") as file:  # with or without a BOM
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(f"{path}: the columns {missing} are missing; it has {header}")
            if len(set(header)) < len(header):
                raise UserError(f"{path}: a column is there twice: {header}")
            for number, cells in enumerate(reader, start=2):
                if len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                elif cells:  # else a blank line
                    raise UserError(
                        f"{path}, row {number}: {len(cells)} cells under {len(header)} columns"
                    )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: save it as UTF-8: {error.reason}") from None
    except csv.Error as error:
        raise UserError(f"{path}, after row {number}: not a CSV ({error})") from None


def require_file(path):
    """Raise an OSError unless it is a regular file: a FIFO would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "not a regular file")


@functools.lru_cache(4096)  # rows of one search have the same list, and parsing is the slow part
def parse_keys(text: str) -> tuple[int, tuple[str, ...]]:
    """(how many keys a cell lists, each key once). Raises ValueError."""
    value = parse_literal(text)
    if value is None:
        return 0, ()
    if not isinstance(value, (list, tuple)):
        raise ValueError("expected a list of keys")
    if not all(isinstance(key, (str, int)) for key in value):
        raise ValueError("expected keys that are text or whole numbers")
    return len(value), tuple(dict.fromkeys(map(str, value)))


@functools.lru_cache(4096)
def parse_literal(text: str) -> object:
    """The value of a cell: JSON or a Python literal, never code. None for an empty cell.

    Raises ValueError.
    """
    if not text.strip():
        return None
    # JSON first: it takes a thirtieth of the time. In a cell without double quotes and backslashes
    # Python's single quotes mean what JSON's double quotes mean.
    quoted = text if '"' in text or "\\" in text else text.replace("'", '"')
    try:
        return json.loads(quoted)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError):
        raise ValueError("expected JSON or a Python literal") from None


def shorten(text):
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


class Images:
    """The distinct images of one folder, fitted into squares of `size` pixels and decoded once.

    keys: Texts, the names of the files without .png. An image's number is its place among them.
    named_by(number): the first row that names an image, for errors. Raises UserError.
    """

    def __init__(self, folder, keys, size, named_by):
        self.root, self.keys, self.size = os.path.realpath(folder), keys, size
        self.digest, times = hash_files(keys, self.stat)
        key, shape = f"{self.digest} {times} {CODE}", (len(keys), 3, size, size)
        kind = f"{folder.name}-{size}"
        self.pixels = items(folder.parent, kind, key, shape, np.uint8, self.decode, named_by)

    def stat(self, key):
        with suppress(OSError, ValueError):  # the fast way
            return os.stat(f"{self.root}/{key}.png")
        return os.stat(next(filter(os.path.lexists, spellings(self.root, key)), ""))

    def decode(self, number):
        return decode_image(find_image(self.root, self.keys[number]), self.size).numpy()

    def take(self, numbers):
        """Images by their numbers, int (K,): uint8 (K, 3, size, size)."""
        # By NumPy: on a CPU torch wakes all threads for 400 kB and takes up to 70 times as long.
        return torch.from_numpy(self.pixels[numbers])


def find_image(root: str, key: str) -> str:
    """The file of a key, inside `root`, a real path. Links are followed. Raises UserError."""
    paths = spellings(root, key)
    try:
        key.encode()  # half a character could not be written to metric.csv
        path = os.path.realpath(next(filter(os.path.lexists, paths), paths[0]), strict=True)
        require_file(path)
    except (OSError, ValueError) as error:  # also a null byte, or what the locale cannot spell
        reason = error.strerror if isinstance(error, OSError) else error
        with suppress(OSError, ValueError):  # a folder that is not there, a null byte
            there = (unicodedata.normalize("NFC", name) for name in os.listdir(root))
            whole = unicodedata.normalize("NFC", f"{key}.png")
            if not any(map(os.path.lexists, paths)) and whole in there:
                reason = "a file there has these letters in pieces in part (NFD): rename it"
        raise UserError(f"{root}: {shorten(f'{key}.png')}: {reason}") from None
    if not path.startswith(os.path.join(root, "")):
        raise UserError(f"{shorten(key)} points outside {root}")
    return path


def spellings(root: str, key: str) -> list[str]:
    """The paths that may be its file's: as it stands, in NFC, in NFD."""
    # Macs spell a Korean letter in pieces (NFD), others mostly whole: either form finds the other.
    forms = (key, unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key))
    return [os.path.join(root, f"{form}.png") for form in forms]


def decode_image(path, size: int) -> torch.Tensor:
    """An image of any mode and size to uint8 (3, size, size). Raises UserError.

    It keeps its proportions and is centred on white.
    """
    with open_image(path) as image:
        if image.mode == "L" and "transparency" in image.info:
            # Pillow scales grey of 2 and 4 bits to 8, but not the one that is transparent.
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]), 1)
        image.load()
        with suppress(Exception):  # damaged EXIF turns nothing: the picture itself can be whole
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # grey of 16 bits: convert() would clip it to white
            grey = np.asarray(image)
            transparent = grey == image.info.get("transparency")
            image = Image.fromarray(np.where(transparent, 255, grey // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        # Resized here, at least 1 pixel wide: ImageOps.pad alone leaves nothing of a thin line.
        fitted = [max(1, round(side * size / max(image.size))) for side in image.size]
        image = image.resize(fitted, Image.Resampling.BICUBIC)
        image = ImageOps.pad(image, (size, size), color="white")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def open_image(path):
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.filename = ""  # else it is mapped into memory, and a TIFF is then turned wrongly
            if image.width * image.height > PIXEL_LIMIT:
                raise UserError(f"{path}: {image.size} pixels; the limit is {PIXEL_LIMIT:,}")
            # In the first two nothing says what is white. The others are not what Pillow gives.
            stored = str(image.tile)  # how the pixels stand in the file
            keyed = "RGB;16B" in stored and "transparency" in image.info
            inverted = image.mode == "I;16" and getattr(image, "tag_v2", {}).get(262) == 0
            if image.mode in ("I", "F") or "I;12" in stored or keyed or inverted:
                raise UserError(
                    f"{path}: pixels of 32 bits, signed ones, grey of 12 bits or of 16 with 0 for "
                    "white, or RGB of 16 with a transparent colour; save it with 8 bits a channel"
                )
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds, and all mean the same to the user
        raise UserError(f"{path}: cannot be read as an image: {error}") from None


class SharedDataset(Dataset):
    """Training and the shared evaluation: an item is a row.

    The model is given the page, the relevant element and k of the row's other candidates. The draw
    depends on (seed, epoch, row) alone. So every process, worker and resumed run draws the same.
    """

    def __init__(self, table, pages, elements, num_negatives, seed):
        self.table, self.pages, self.elements, self.seed = table, pages, elements, seed
        self.path, self.counts, self.positions = table.path, table.counts, table.positions
        self.name_item = self.name_row = table.name_row
        self.num_negatives = min(num_negatives, int(table.num_others.max()))  # k
        self.labels = np.zeros(len(self), dtype=np.int64)  # (N,): the relevant one comes first
        self.item_weights = np.broadcast_to(1.0, len(self))  # one number, and not N of them
        self.groups = [(range(len(self)), 1)]

    def __len__(self):
        return len(self.positions)

    def __getitems__(self, keys):
        """A whole batch: a call for each row would cost more than the rows. See the contract."""
        rows = np.array([key.index for key in keys])  # (B,)
        elements = self.draw(rows, keys[0].epoch)  # (B, 1 + k), of one epoch, as batches are
        candidates = self.elements.take(elements.ravel())  # (B x (1 + k), 3, h, w)
        candidate_mask = np.arange(elements.shape[1]) <= self.table.num_others[rows, None]
        return index_and_weight(keys) | {
            "pages": self.pages.take(self.table.queries[rows]),  # (B, 3, H, W)
            "candidates": candidates.unflatten(0, elements.shape),  # (B, 1 + k, 3, h, w)
            "candidate_mask": torch.from_numpy(candidate_mask),  # (B, 1 + k)
            "labels": torch.from_numpy(self.labels[rows]),  # (B,)
        }

    def draw(self, rows, epoch):
        """The relevant element of each row and k negatives drawn after it: elements, (B, 1 + k).

        A row with fewer candidates is padded with its relevant element. By Floyd's algorithm: k
        random numbers and k x k comparisons, however long the list (Bentley and Floyd, "A sample of
        brilliance", Communications of the ACM 30(9), 1987).
        """
        table, k = self.table, self.num_negatives
        chances = np.empty((len(rows), k))
        generator: Any = np.random.default_rng((self.seed, epoch, 1))  # 1: not the order of rows
        after = 0
        for i, row in enumerate(rows.tolist()):  # a row's chances are row x k to row x k + k
            generator.bit_generator.advance(row * k - after)
            chances[i], after = generator.random(k), row * k + k
        labels, num_others = table.labels[rows], table.num_others[rows]
        columns = np.full(chances.shape, -1)  # (B, k), among the others of a row
        for i in range(k):
            highest = num_others - k + i  # below 0 where there are too few: nothing is drawn
            column = (chances[:, i] * (highest + 1)).astype(np.int64)  # from 0 to the highest
            column = np.where((columns == column[:, None]).any(1), highest, column)
            columns[:, -1 - i] = np.where(highest < 0, -1, column)  # from the end: padding is last
        columns += (labels >= 0)[:, None] & (columns >= labels[:, None])  # step over the relevant
        relevant = table.relevant[rows, None]  # (B, 1)
        starts = table.starts[table.lists[rows], None]  # (B, 1)
        drawn = np.where(columns < 0, relevant, table.listed[starts + columns])
        return np.concatenate([relevant, drawn], axis=1)


class RerankDataset(Dataset):
    """The rerank evaluation: an item is a distinct image. Each goes through the model once.

    Elements come first, then pages. They differ in size and never share a batch.
    """

    def __init__(self, table, pages, elements, data_dir):
        self.table, self.pages, self.elements, self.data_dir = table, pages, elements, data_dir
        self.path, self.counts, self.positions = table.path, table.counts, table.positions
        self.labels, self.name_row = table.labels, table.name_row
        candidates = table.padded_candidates()  # (N, C)
        self.element_ids = np.unique(table.listed)
        self.page_ids = np.unique(table.queries)
        self.image_ids = np.concatenate([self.element_ids, self.page_ids])  # (M,), of each item
        self.item_weights = np.broadcast_to(1.0, len(self))
        first_page = len(self.element_ids)
        # As many pixels as in a batch of pages take as much memory. Fewer would be slow.
        elements_for_a_page = max(1, pages.size**2 // elements.size**2)
        self.groups = [
            (range(first_page), elements_for_a_page),
            (range(first_page, len(self)), 1),
        ]
        # What `score` takes: items, int64 (N,) and (N, C), padded with -1.
        self.queries = torch.from_numpy(first_page + np.searchsorted(self.page_ids, table.queries))
        columns = np.searchsorted(self.element_ids, candidates)
        self.candidates = torch.from_numpy(np.where(candidates < 0, -1, columns))

    def __len__(self):
        return len(self.image_ids)

    def __getitems__(self, keys):
        """A whole batch, of elements or of pages. See the contract."""
        items = np.array([key.index for key in keys])
        images = self.images_of(items[0]).take(self.image_ids[items])  # (B, 3, H, W)
        return index_and_weight(keys) | {"images": images}

    def images_of(self, item):
        return self.elements if item < len(self.element_ids) else self.pages

    def score(self, outputs, rows):
        """Embeddings of all items, {"outputs": (M, D)}, to scores of some rows, float32 (n, C)."""
        return rerank_scores(outputs["outputs"], self.queries[rows], self.candidates[rows])

    def name_item(self, item):
        images = self.images_of(item)
        return f"{images.root}/{images.keys[self.image_ids[item]]}.png"

    def keys_of(self, row):
        """The keys of a row's candidates, in the order of the columns: a list of str."""
        return self.elements.keys.take(self.table.candidates(row))

    def relevant_key(self, row):
        return self.elements.keys[self.table.relevant[row]]
