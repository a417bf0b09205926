"""Build the default data: icons of 13 styles as the pages and elements of a match-element search.

    python sample_data.py --data_dir default_data

train.py builds it where it is absent. Delete this file when you bring data of your own.

The icons come from the fonts in the PyPI package `qtawesome`. A *style* is one way of drawing:
ph-thin, mdi-outline, ... A *search word* is a word of an icon's name. A *page* holds icons of one
style. One of them is taken out, and it is the relevant element. The *candidates* are the icons of
all styles whose name has the word. Others of the page's style are left out, so there is one right
answer. The test asks for words and elements that training never saw.

With the same packages every run writes the same bytes.
"""

import argparse
import csv
import functools
import importlib.util
import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from runtime.launch import UserError, errors_in_one_line, option_named

SEED = 0
PAGE_SIZE, ELEMENT_SIZE = 96, 32  # pixels. An element has its own size in a page: widths compare.
PAGES = {"train": 8000, "eval": 500, "test_vocabulary": 500}  # rows that are used
SHARE = {"train": 0.76, "eval": 0.08, "test_vocabulary": 0.16}  # of the search words
ODD_ROWS = 5  # rows without candidates in each CSV, and rows with 400 or more, as real data has

COLUMNS = ("search_word", "template_idx", "page_num", "x_image_path", "resourceKey")
COLUMNS += ("candidate_resourceKey", "x_info", "y_info")

# {font file without its version: {style: the suffix of its icons' names}}
FONTS = {
    "fontawesome6-regular-webfont": {"fa-regular": ""},
    "fontawesome6-solid-webfont": {"fa-solid": ""},
    "materialdesignicons6-webfont": {"mdi-outline": "-outline", "mdi-filled": ""},
    "phosphor": {f"ph-{way}": f"-{way}" for way in ("thin", "light", "bold", "fill")}
    | {"ph-regular": ""},
    "remixicon": {"ri-line": "-line", "ri-fill": "-fill"},
    "codicon": {"codicon": ""},
    "elusiveicons-webfont": {"elusive": ""},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default="default_data", help="folder; it must not exist yet")
    build(parser.parse_args().data_dir)


def build_once(accelerator, data_dir: str):
    """Build the data where it is absent, once on each machine. Every process must call this."""
    with accelerator.local_main_process_first(), option_named(f"--data_dir {data_dir}"):
        if accelerator.is_local_main_process and not Path(data_dir).exists():
            print(
                f"building the default data, once: 25,000 small images in {data_dir}/, "
                "about 20 seconds",
                flush=True,
            )
            build(data_dir)


def build(data_dir: str | Path, progress: bool = True):
    """Write the data set to `data_dir`, whole or not at all. Raises UserError where it exists."""
    data_dir = Path(data_dir)
    if data_dir.exists():
        raise UserError(f"{data_dir} is there already: remove it to have it built again")
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    icons = read_icons()
    bar = tqdm(
        total=len(icons) + sum(PAGES.values()) + 2 * ODD_ROWS * len(PAGES),
        desc="building the default data",
        unit="image",
        disable=not progress or None,
    )
    prefix = f".{data_dir.name}-unfinished-"
    with bar, tempfile.TemporaryDirectory(prefix=prefix, dir=data_dir.parent) as temporary:
        unfinished = Path(temporary, "data")
        for folder in ("csv", "images", "elements"):
            (unfinished / folder).mkdir(parents=True)
        glyphs = draw_elements(icons, unfinished / "elements", bar)
        for number, (split, (split_icons, words)) in enumerate(split_by_word(icons).items()):
            random = np.random.default_rng((SEED, number))
            rows = compose_pages(
                split, split_icons, words, glyphs, random, unfinished / "images", bar
            )
            path = unfinished / "csv" / f"{split}.csv"
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *rows])
        try:
            os.rename(unfinished, data_dir)
        except OSError:
            # Another machine on the same disk may have been first, with the same bytes.
            if not data_dir.exists():
                raise


def read_icons():
    """{(style, name without the style's suffix): (font file, code point)}, in a fixed order."""
    # The package is found and not imported: an import needs Qt.
    package = importlib.util.find_spec("qtawesome")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the default data is drawn from the fonts of a package: pip install qtawesome"
        )
    folder = Path(package.submodule_search_locations[0]) / "fonts"
    icons = {}
    for font, styles in FONTS.items():
        charmap = json.loads(next(folder.glob(f"{font}-charmap-*.json")).read_text())
        font_file = next(folder.glob(f"{font}-[0-9]*.ttf"))
        for name, code_point in sorted(charmap.items()):
            style = next((style for style, suffix in styles.items() if name.endswith(suffix)), None)
            if style is not None:  # a few of remixicon are neither line nor fill
                icons[style, name.removesuffix(styles[style])] = (font_file, int(code_point, 16))
    return icons


def split_by_word(icons):
    """Deal the search words to the splits, and each icon to one: {split: (icons, words)}.

    A word of many icons names a manner ("circle", "off"), and one of few leaves nothing to rank.
    Neither is a search word. An icon with a word of the test goes to the test, so no word of the
    test brings an icon that training saw. The same holds for eval.
    """
    icons_of = defaultdict(set)  # {word: its icons}
    for style, name in icons:
        for word in name.split("-"):
            icons_of[word].add((style, name))
    words = sorted(
        w
        for w, has in icons_of.items()
        if len(w) > 2 and w.isalpha() and 8 <= len(has) <= 160 and len({s for s, _ in has}) > 2
    )
    words = np.random.default_rng(SEED).permutation(words)
    ends = np.cumsum(list(SHARE.values())) * len(words)
    parts = np.split(words, ends.round().astype(int)[:-1])
    splits = {split: ([], set(part.tolist())) for split, part in zip(SHARE, parts, strict=True)}
    for style, name in icons:
        words = set(name.split("-"))
        split = next((s for s in ("test_vocabulary", "eval") if splits[s][1] & words), "train")
        splits[split][0].append((style, name))
    return splits


def draw_elements(icons, folder, bar):
    """Write {style}_{name}.png for each icon. Return {(style, name): its ink}, 255 is black.

    The ink is uint8 (ELEMENT_SIZE, ELEMENT_SIZE).
    """
    glyphs = {}
    for number, ((style, name), (font_file, code_point)) in enumerate(icons.items()):
        # One size for all icons of a font keeps its line width. Only those too wide are smaller.
        character = chr(code_point)
        font = load_font(font_file, ELEMENT_SIZE - 4)
        left, top, right, bottom = font.getbbox(character)
        longer = max(right - left, bottom - top)
        if longer > ELEMENT_SIZE:
            font = load_font(font_file, (ELEMENT_SIZE - 4) * ELEMENT_SIZE // longer)
            left, top, right, bottom = font.getbbox(character)
        ink = Image.new("L", (ELEMENT_SIZE, ELEMENT_SIZE))
        origin = (ELEMENT_SIZE - left - right) / 2, (ELEMENT_SIZE - top - bottom) / 2
        ImageDraw.Draw(ink).text(origin, character, fill=255, font=font)
        element = ImageOps.invert(ink)
        if number % 2:  # every other element is a transparent PNG, as designers export them
            element = Image.merge("LA", [Image.new("L", ink.size), ink])
        element.save(folder / f"{style}_{name}.png", compress_level=1)
        glyphs[style, name] = np.asarray(ink)
        bar.update()
    return glyphs


def compose_pages(split, icons, words, glyphs, random, folder, bar):
    """Write the pages of one split and return its CSV rows, in the order of COLUMNS."""
    by_style, by_word = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for style, name in icons:
        by_style[style].append(name)
        for word in name.split("-"):
            by_word[word][style].append(name)

    def pick(items):
        return items[random.integers(len(items))]

    rows = []
    steps = range(0, PAGE_SIZE, ELEMENT_SIZE)
    # A word of one style leaves nothing to rank.
    words = sorted(word for word in words if len(by_word[word]) > 1)
    while len(rows) < PAGES[split] + 2 * ODD_ROWS:
        word = pick(words)
        style = pick(list(by_word[word]))
        name = pick(by_word[word][style])
        candidates = [(style, name)] + [
            (s, n) for s, names in by_word[word].items() if s != style for n in names
        ]
        odd = len(rows) - PAGES[split]  # the odd rows come last
        if odd >= ODD_ROWS:  # a search that found far too much
            others = [icon for icon in icons if icon[0] != style and icon not in candidates]
            candidates += others[: 400 - len(candidates) + odd]
        elif odd >= 0:
            candidates = []

        # A grid of icons of the style, with one cell left empty: the relevant one was taken out.
        cells = random.permutation([(x, y) for y in steps for x in steps]).tolist()
        page = np.full((PAGE_SIZE, PAGE_SIZE), 255, np.uint8)
        for x, y in cells[1:]:
            page[y : y + ELEMENT_SIZE, x : x + ELEMENT_SIZE] -= glyphs[style, pick(by_style[style])]
        path = f"{split}_{len(rows):05d}"
        Image.fromarray(page).save(folder / f"{path}.png", compress_level=1)
        keys = random.permutation([f"{s}_{n}" for s, n in candidates]).tolist()
        row = [word, len(rows) // 4, len(rows) % 4, path, f"{style}_{name}", keys]
        x, y = cells[0]
        rows.append([*row, [PAGE_SIZE, PAGE_SIZE], [x, y, x + ELEMENT_SIZE, y + ELEMENT_SIZE]])
        bar.update()
    return rows


@functools.cache
def load_font(font_file, size):
    # The basic layout engine. The other one places glyphs differently, where it is installed.
    return ImageFont.truetype(font_file, size, layout_engine=ImageFont.Layout.BASIC)


if __name__ == "__main__":
    with errors_in_one_line(), option_named("--data_dir"):
        main()
