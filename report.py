"""What a rerank evaluation leaves to look at: metric.csv, contact_sheet.png, curves.png.

Pillow, matplotlib and Korean fonts are optional. Each is looked for where it draws.
N queries, C candidates.

EDIT HERE for another task: COPIED, show_query and show_candidate.
"""

import functools
import importlib.util
import json
import os
import unicodedata
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import metrics
from data import decode_image, find_image
from runtime.cache import in_workers
from runtime.launch import UserError, optional

with suppress(ImportError):
    from PIL import Image, ImageDraw, ImageFont

# EDIT HERE: columns of the data's CSV that metric.csv repeats. It needs resourceKey.
COPIED = ["search_word", "template_idx", "page_num", "x_image_path", "resourceKey"]
LISTS = ["candidate_resourceKey", "score", "sorted_score", "sorted_candidate_resourcekey"]
BLOCK = 256  # rows of metric.csv that are made at a time

TOP = 8  # candidates that are shown of a query, besides the relevant one
SAMPLE, WORST = 8, 5  # queries on the contact sheet
QUERY, CANDIDATE, GAP = 128, 80, 10  # pixels
HEADING, ROW, WORDS = 46, QUERY + 2 * GAP, 170
TEXT_LIMIT = 600  # characters of a text that stands for an image
INK, FAINT, RIGHT, WRONG, PAPER = "#222222", "#777777", "#128a4e", "#c0392b", "#f4f4f2"
LEGEND = (
    "Left the query, then the candidates, best first, with their scores. The right one is framed; "
    f"it stands at the end where it is not among the first {TOP}."
)
# Search words are often Korean. Pillow looks for these in the font folders of the system.
FONTS = ["NanumGothic", "NotoSansKR-Regular", "NotoSansCJK-Regular", "AppleSDGothicNeo", "malgun"]


# EDIT HERE: what people see. A picture is the Path of an image, or a str in a task without images.
def show_query(data_dir, row):
    """The text and the picture of a query. row: its COPIED columns by name."""
    folder = os.path.realpath(data_dir / "images")
    return row["search_word"], Path(find_image(folder, row["x_image_path"]))


def show_candidate(data_dir, key):
    """The picture of a candidate."""
    return Path(find_image(os.path.realpath(data_dir / "elements"), key))


def write(folder, dataset, prediction):
    """metric.csv and contact_sheet.png of a rerank evaluation. Raises UserError.

    prediction: scores (N, C) padded with -inf, labels (N,), and positions (N,) in the data's CSV.
    """
    queries = read_copied(dataset, prediction.inputs)
    queries["rank"] = metrics.ranks_of_relevant(prediction.predictions, prediction.label_ids)
    queries = queries.assign(**metrics.measure_queries(prediction))
    write_metric_csv(folder / "metric.csv", dataset, prediction, queries)
    with optional("contact_sheet.png"):
        draw_contact_sheet(folder / "contact_sheet.png", dataset, prediction, queries)


def read_copied(dataset, positions):
    """The COPIED columns of the queries: a DataFrame (N, ...). Training does not keep them."""
    copied = pd.DataFrame(columns=COPIED)
    with suppress(OSError, ValueError, IndexError):  # it is gone, has other columns, or fewer rows
        table = pd.read_csv(
            dataset.path, usecols=COPIED, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
        copied = table[COPIED].iloc[positions].reset_index(drop=True)
    if copied["resourceKey"].tolist() != [dataset.relevant_key(i) for i in range(len(positions))]:
        raise UserError(f"{dataset.path} has changed since it was read: restore it, or start again")
    return copied


def write_metric_csv(path, dataset, prediction, queries):
    """A line for each query. queries: a DataFrame (N, ...) of all columns but LISTS."""
    lines = functools.partial(lines_of, dataset, prediction, queries)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.writelines(in_workers(lines, range(0, len(queries), BLOCK), 8, path.name))


def lines_of(dataset, prediction, queries, start):
    lines = with_lists(queries[start : start + BLOCK], dataset, prediction)
    return lines.to_csv(header=start == 0, index=False, float_format="%.17g", lineterminator="\r\n")


def with_lists(queries, dataset, prediction):
    """Some rows of `queries` as metric.csv has them: with LISTS, as JSON."""
    lists = []
    for row in queries.index:
        keys = [json.dumps(key, ensure_ascii=False) for key in dataset.keys_of(row)]
        scores = prediction.predictions[row, : len(keys)]
        order = best_first(scores, prediction.label_ids[row])
        scores = [str(score) for score in scores]  # the shortest that read back as the same float32
        columns = keys, scores, [scores[i] for i in order], [keys[i] for i in order]
        lists.append([f"[{', '.join(values)}]" for values in columns])
    lists = pd.DataFrame(lists, queries.index, LISTS)
    return pd.concat([queries[COPIED], lists, queries.drop(columns=COPIED)], axis=1)


def best_first(scores: np.ndarray, label: int) -> np.ndarray:
    """The columns of one query's candidates, best first: int64 (C,).

    Among equal scores the relevant one is last, so it stands at its rank.
    scores: float (C,), without padding. label: the relevant one's column, or -1.
    """
    return np.lexsort((np.arange(len(scores)) == label, -scores))


def first_candidates(query):
    """The candidates to show of a row of metric.csv, and how many it has.

    The TOP best and the relevant one, each as (key, score, whether it is the relevant one). A
    relevant one that is missing has no score but None.
    """
    keys, relevant = json.loads(query["sorted_candidate_resourcekey"]), query["resourceKey"]
    scores = np.array(json.loads(query["sorted_score"]), np.float32).tolist()
    score_of = dict(zip(keys, scores, strict=True))
    shown = keys[:TOP] + [relevant] * (relevant not in keys[:TOP])
    return [(key, score_of.get(key), key == relevant) for key in shown], len(keys)


def summary(ranks):
    """How many queries went how well: str. ranks: (N,)"""
    first, ten, missing = (ranks == 1).sum(), (ranks <= 10).sum(), np.isinf(ranks).sum()
    found = f"the right one first in {first:,}, among the first ten in {ten:,}"
    lost = f", missing from the candidates in {missing:,}" if missing else ""
    return f"{len(ranks):,} queries: {found}{lost}"


def draw_contact_sheet(path, dataset, prediction, queries):
    """Some queries, the same ones whatever the model, and then the worst misses."""
    if importlib.util.find_spec("PIL") is None:
        return say(f"{path.name} is left out: pip install pillow")

    ranks = queries["rank"].to_numpy()
    sample = np.unique(((np.arange(SAMPLE) + 0.5) * len(ranks) / SAMPLE).astype(int))
    misses = np.flatnonzero((ranks > 1) & np.isfinite(ranks))  # no model finds what is missing
    worst = misses[np.argsort(-ranks[misses], kind="stable")][:WORST]
    sections = {"A sample, the same queries in every evaluation": sample}
    if len(worst):
        sections["The worst misses"] = worst

    _, query = show_query(dataset.data_dir, queries.loc[0])
    candidate = show_candidate(dataset.data_dir, queries["resourceKey"][0])
    widths = [
        size if isinstance(picture, Path) else 2 * size  # a text needs more room
        for size, picture in ((QUERY, query), (CANDIDATE, candidate))
    ]
    width = 7 * GAP + widths[0] + WORDS + (TOP + 1) * (widths[1] + GAP)
    height = 80 + sum(HEADING + ROW * len(rows) for rows in sections.values())
    sheet = Image.new("RGB", (width, height), PAPER)
    put(sheet, 2 * GAP, 14, summary(ranks), 20)
    put(sheet, 2 * GAP, 44, LEGEND, 14, FAINT)
    y = 80
    for title, rows in sections.items():
        put(sheet, 2 * GAP, y + 10, title, 17)
        y += HEADING
        for _, query in with_lists(queries.loc[rows], dataset, prediction).iterrows():
            draw_query(sheet, y, widths, dataset.data_dir, query)
            y += ROW
    sheet.save(path, compress_level=1)  # half the time while others wait, and no larger


def draw_query(sheet, y, widths, data_dir, query):
    """A query and its first candidates, one row of the sheet. query: its row of metric.csv."""
    word, picture = show_query(data_dir, query)
    shown, count = first_candidates(query)
    draw_picture(sheet, 2 * GAP, y, picture, widths[0], QUERY)
    x = 3 * GAP + widths[0]
    lines = wrap(word, 18, WORDS - 2 * GAP, 2)
    put(sheet, x, y, "\n".join(lines), 18)
    below = y + 26 * len(lines)
    rank = f"rank {query['rank']:.0f} of" if np.isfinite(query["rank"]) else "not among the"
    put(sheet, x, below + 8, f"{rank} {count}", 16, RIGHT if query["rank"] == 1 else WRONG)
    put(sheet, x, below + 34, f"row {query.name + 2}", 13, FAINT)  # as a spreadsheet shows it

    x, y = x + WORDS, y + 12
    for place, (key, score, relevant) in enumerate(shown):
        if place == TOP:
            put(sheet, x + 3, y + CANDIDATE // 2, "…", 16, FAINT, anchor="mm")
            x += 2 * GAP
        draw_picture(sheet, x, y, show_candidate(data_dir, key), widths[1], CANDIDATE, relevant)
        text = "missing" if score is None else f"{score:.3f}"
        ink = INK if relevant else FAINT
        put(sheet, x + widths[1] // 2, y + CANDIDATE + 15, text, 13, ink, anchor="mm")
        x += widths[1] + GAP


def draw_picture(sheet, x, y, picture, width, height, framed=False):
    if framed:
        sheet.paste(RIGHT, (x - 5, y - 5, x + width + 5, y + height + 5))
    sheet.paste("#cccccc", (x - 1, y - 1, x + width + 1, y + height + 1))
    sheet.paste(small(picture, width, height), (x, y))


def put(sheet, x, y, text, size, ink=INK, **options):
    ImageDraw.Draw(sheet).text((x, y), text, ink, font(size), **options)


@functools.lru_cache(512)  # the sample comes again at each evaluation; 20 MB
def small(picture, width, height):
    """An RGB image: of a Path a square as high as `height`, of a text its first lines."""
    if isinstance(picture, Path):
        return Image.fromarray(decode_image(picture, height).permute(1, 2, 0).numpy())
    image = Image.new("RGB", (width, height), "white")
    put(image, 4, 1, "\n".join(wrap(picture, 12, width - 8, height // 16)), 12, spacing=1)
    return image


def wrap(text, size, width, length):
    """At most `length` lines of `width` pixels, cut at spaces where possible: a list of str."""
    # Files named on a Mac have Korean in pieces. Not every machine puts them together.
    text = unicodedata.normalize("NFC", " ".join(text[:TEXT_LIMIT].split()))
    lines = []
    while text:
        ends = accumulate(advance(character, size) for character in text[:width])
        end = bisect_right(list(ends), width)
        if end < len(text):
            if len(lines) == length - 1:
                return [*lines, text[: max(0, end - 1)] + "…"]
            end = text.rfind(" ", 0, end + 1) + 1 or max(1, end)
        lines.append(text[:end].rstrip())
        text = text[end:]
    return lines


@functools.cache
def advance(character, size):
    return font(size).getlength(character)


@functools.cache
def font(size):
    """The best font there is: of the package pylopdf-fonts-ko, of the system, or Pillow's own."""
    for name in [packaged_font(), *FONTS]:
        with suppress(OSError):  # there is none of this name
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def packaged_font():
    """The file of Noto Sans KR in pylopdf-fonts-ko, or "". The package is found, not imported."""
    package = importlib.util.find_spec("pylopdf_fonts_ko")
    if package is None or not package.submodule_search_locations:
        return ""
    return os.path.join(package.submodule_search_locations[0], "NotoSansKR-Regular.otf")


def draw_curves(path, log):
    """The losses, and the first and the last metric of each evaluation, over the updates."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"{path.name} is left out: pip install matplotlib")

    with open(log, encoding="utf-8") as file:
        lines = pd.DataFrame(map(json.loads, file)).set_index("step")
    names = [name for name in map(str, lines) if "/" in name]
    losses = [name for name in names if name.endswith("/loss")]
    ranking = [name for name in names if name not in losses and not name.startswith("train/")]
    first = {name.partition("/")[0]: name for name in reversed(ranking)}
    last = {name.partition("/")[0]: name for name in ranking}
    ranking = [name for name in ranking if name in {*first.values(), *last.values()}]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, 2), (losses, ranking), strict=True):
        for name in names:
            values = lines[name].dropna()
            axes.plot(values.index, values, marker=".", label=name)
        axes.set_xlabel("updates")
        axes.set_ylim(bottom=min(0, axes.dataLim.y0))
        axes.grid(alpha=0.3)
        if names:
            axes.legend()
    unfinished = path.with_name(f".{path.name}-unfinished")
    figure.savefig(unfinished, dpi=100, format="png")
    os.replace(unfinished, path)


@functools.cache  # once a run, not at each evaluation
def say(line):
    tqdm.write(line)
