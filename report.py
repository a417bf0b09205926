"""What people would rather look at than read: contact_sheet.png, gallery.html, curves.png.

What a query and a candidate look like the data set says (`show_query` and `show_candidate` in data.py): a picture is the Path of
an image, or a text where the task has no images. Ranks and order are those of metric.csv. N queries, C candidates.
"""

import base64
import functools
import importlib.util
import io
import json
import re
import unicodedata
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import metrics
from data import decode_image
from runtime.tracking import HEADLINES, open_whole

TOP = 8  # candidates of a query that are shown, besides the relevant one
SAMPLE, WORST = 8, 5  # queries on the contact sheet
QUERY, CANDIDATE, GAP = 128, 80, 10  # pixels
TEXT_LIMIT = 600  # characters of a text that stands for an image
INK, FAINT, RIGHT, WRONG, PAPER = "#222222", "#777777", "#128a4e", "#c0392b", "#f4f4f2"

# Noto Sans KR, since search words are often Korean and few servers have a Korean font. The package is found, not imported.
FONT_PACKAGE = importlib.util.find_spec("pylopdf_fonts_ko")
if FONT_PACKAGE is None or not FONT_PACKAGE.submodule_search_locations:
    raise ModuleNotFoundError(
        "gallery.py writes with the font of the package pylopdf-fonts-ko: pip install pylopdf-fonts-ko"
    )
FONT = Path(FONT_PACKAGE.submodule_search_locations[0]) / "NotoSansKR-Regular.otf"


def draw(config, dataset, scores):
    """contact_sheet.png in config.output_dir, and gallery.html if evaluate.py was asked for it.

    scores: float32 (N, C), padded with -inf.
    """
    ranks = metrics.ranks_of_relevant(scores, dataset.labels.numpy())  # (N,)
    draw_contact_sheet(Path(config.output_dir) / "contact_sheet.png", dataset, scores, ranks)
    if getattr(config, "gallery", False):  # training has no such option
        write_gallery(Path(config.output_dir) / "gallery.html", dataset, scores, ranks)


def draw_contact_sheet(path, dataset, scores, ranks):
    """A PNG of some queries, the same ones whatever the model, and of the worst misses: what was asked, and what came first."""
    sample = np.unique(((np.arange(SAMPLE) + 0.5) * len(ranks) / SAMPLE).astype(int))
    misses = np.flatnonzero(
        (ranks > 1) & np.isfinite(ranks)
    )  # no model finds what is not among the candidates
    worst = misses[np.argsort(-ranks[misses], kind="stable")][:WORST]
    sections = {"A sample, the same queries in every evaluation": sample}
    if len(worst):
        sections["The worst misses"] = worst

    query_width, candidate_width = (
        size if isinstance(picture, Path) else 2 * size  # a text needs more room
        for size, (_, picture) in (
            (QUERY, dataset.show_query(0)),
            (CANDIDATE, dataset.show_candidate(0, 0)),
        )
    )
    words, candidates = (
        3 * GAP + query_width,
        3 * GAP + query_width + 170,
    )  # where their columns begin
    step, row_height, heading = candidate_width + GAP, QUERY + 2 * GAP, 46
    height = 80 + sum(heading + row_height * len(rows) for rows in sections.values())
    sheet = Image.new("RGB", (candidates + TOP * step + 3 * GAP + step + GAP, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, 14), summary(ranks), INK, font(20))
    legend = "Left the query, then the candidates, best first, with their scores. The right one is framed; "
    pen.text(
        (2 * GAP, 44),
        legend + f"it stands at the end where it is not among the first {TOP}.",
        FAINT,
        font(14),
    )
    y = 80
    for title, rows in sections.items():
        pen.text((2 * GAP, y + 10), title, INK, font(17))
        y += heading
        for row in rows.tolist():
            word, picture = dataset.show_query(row)
            draw_picture(sheet, (2 * GAP, y), picture, query_width, QUERY)
            lines = wrap(word, 18, 150, 2)
            pen.text((words, y), "\n".join(lines), INK, font(18))
            length = len(dataset.rows.candidates.places_of(row))
            rank = (
                f"rank {ranks[row]:.0f} of {length}"
                if np.isfinite(ranks[row])
                else f"not among the {length}"
            )
            pen.text(
                (words, y + 8 + 26 * len(lines)),
                rank,
                RIGHT if ranks[row] == 1 else WRONG,
                font(16),
            )
            pen.text(
                (words, y + 34 + 26 * len(lines)),
                f"row {dataset.rows.numbers[row]}",
                FAINT,
                font(13),
            )
            for place, (_, picture, score, relevant) in enumerate(
                first_candidates(dataset, scores, row)
            ):
                x, top = candidates + place * step + 2 * GAP * (place == TOP), y + 12
                if relevant:
                    pen.rectangle(
                        (x - 5, top - 5, x + candidate_width + 4, top + CANDIDATE + 4), RIGHT
                    )
                if place == TOP:
                    pen.text(
                        (x - 2 * GAP + 3, top + CANDIDATE // 2), "…", FAINT, font(16), anchor="mm"
                    )
                draw_picture(sheet, (x, top), picture, candidate_width, CANDIDATE)
                below = (x + candidate_width // 2, top + CANDIDATE + 15)
                pen.text(
                    below,
                    "missing" if score is None else f"{score:.3f}",
                    INK if relevant else FAINT,
                    font(13),
                    anchor="mm",
                )
            y += row_height
    with open_whole(path, "wb") as file:
        sheet.save(
            file, "PNG", compress_level=1
        )  # in half the time, while other processes wait; no larger


def write_gallery(path, dataset, scores, ranks):
    """One HTML file of all queries, to be filtered by search word and sorted by rank in a browser; it needs no network.

    Each distinct picture is in it once, small.
    """
    pictures, candidates, queries = (
        {},
        {},
        [],
    )  # of the first two the values are numbers, in the order in which they come

    def number(numbers, item):
        return numbers.setdefault(item, len(numbers))

    for row, rank in enumerate(ranks.tolist()):
        word, picture = dataset.show_query(row)
        shown = first_candidates(dataset, scores, row)
        queries.append(
            {
                "word": unicodedata.normalize("NFC", word),
                "row": int(dataset.rows.numbers[row]),
                "picture": number(pictures, (picture, QUERY)),
                "rank": int(rank) if np.isfinite(rank) else None,
                "of": len(dataset.rows.candidates.places_of(row)),
                "candidates": [
                    number(candidates, (name, number(pictures, (look, CANDIDATE))))
                    for name, look, _, _ in shown
                ],
                "scores": [score if score is None else round(score, 3) for _, _, score, _ in shown],
                "right": [relevant for *_, relevant in shown].index(True),
            }
        )
    data = {
        "summary": summary(ranks),
        "pictures": [
            for_html(*item)
            for item in tqdm(pictures, desc="drawing the gallery", leave=False, disable=None)
        ],
        "candidates": list(candidates),
        "queries": queries,
    }
    # No text of the data can end the script element that it stands in.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, between, after = re.split("FONT|DATA", PAGE)
    with open_whole(path) as file:
        file.writelines([before, font_for_html(text), between, text, after])


def draw_curves(path, log):
    """A PNG of the losses and the main metrics over the updates, from log.jsonl."""
    # Only here: its import takes half a second, at the start of every launch.
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, ranking = figure.subplots(1, 2)
    for name in ("train/loss", *HEADLINES):
        steps = [line["step"] for line in lines if line.get(name) is not None]
        values = [line[name] for line in lines if line.get(name) is not None]
        axes = losses if name.endswith("/loss") else ranking
        if steps:
            axes.plot(
                steps, values, "--" if name.startswith("eval/") else "-", marker=".", label=name
            )
    for axes in (losses, ranking):
        axes.set_xlabel("updates")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with open_whole(path, "wb") as file:
        figure.savefig(file, dpi=100)


def summary(ranks):
    """How many queries went how well: str. ranks: (N,)"""
    first, ten, missing = (ranks == 1).sum(), (ranks <= 10).sum(), np.isinf(ranks).sum()
    counts = (
        f"{len(ranks):,} queries: the right one first in {first:,}, among the first ten in {ten:,}"
    )
    return counts + (f", missing from the candidates in {missing:,}" if missing else "")


def first_candidates(dataset, scores, row):
    """[(name, picture, score, whether it is the relevant one)]: the TOP best, and the relevant one if it is none of them.

    A relevant element that is missing has no score, but None.
    """
    label = dataset.labels[row].item()
    score = scores[row, : len(dataset.rows.candidates.places_of(row))]
    columns = metrics.best_first(score, label)[:TOP].tolist()
    if label not in columns:
        columns.append(label)
    return [
        (*dataset.show_candidate(row, c), None if c < 0 else float(score[c]), c == label)
        for c in columns
    ]


def draw_picture(sheet, corner, picture, width, height):
    x, y = corner
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), "white", "#cccccc")
    sheet.paste(small(picture, width, height), corner)


@functools.lru_cache(512)  # the sample comes again at every evaluation; 20 MB
def small(picture, width, height):
    """An RGB image: of a Path a square as high as `height`, of a text its first lines."""
    if isinstance(picture, Path):
        return Image.fromarray(decode_image(picture, height).permute(1, 2, 0).numpy())
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text(
        (4, 1), "\n".join(wrap(picture, 12, width - 8, height // 16)), INK, font(12), spacing=1
    )
    return image


def wrap(text, size, width, length):
    """`text` cut into at most `length` lines of `width` pixels, at spaces where that is possible: a list of str."""
    # Files named on a Mac have Korean in pieces, which not every machine puts together.
    text = unicodedata.normalize("NFC", " ".join(text[:TEXT_LIMIT].split()))
    lines = []
    while text:
        end = bisect_right(
            list(accumulate(advance(character, size) for character in text[:width])), width
        )
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
    return ImageFont.truetype(FONT, size)


def for_html(picture, size):
    if isinstance(picture, Path):
        encoded = io.BytesIO()
        small(picture, size, size).save(encoded, "WEBP", quality=80)
        return {"image": f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"}
    return {"text": picture if len(picture) <= TEXT_LIMIT else f"{picture[:TEXT_LIMIT]}…"}


def font_for_html(text):
    """A WOFF font in base64, of FONT what `text` needs: about 150 bytes a Korean syllable, 0.2 s and a second for a thousand."""
    from fontTools import subset  # only here: its import takes 0.2 s, at the start of every launch

    options, encoded = subset.Options(flavor="woff"), io.BytesIO()
    with subset.load_font(FONT, options) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="".join(set(text)))
        subsetter.subset(font)
        subset.save_font(font, encoded, options)
    return base64.b64encode(encoded.getvalue()).decode()


# Rows are made as one scrolls to them. All text of the data goes through textContent, and the policy forbids what is not inside.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Gallery</title>
<style>
  @font-face { font-family: inside; src: url(data:font/woff;base64,FONT) }
  body { margin: 0; background: #f4f4f2; color: #222; font: 14px system-ui, inside, sans-serif }
  header { position: sticky; top: 0; z-index: 1; padding: 10px 20px; background: #fff; border-bottom: 1px solid #ccc }
  header p { margin: 0 0 8px; font-size: 16px }
  input, select { font: inherit; padding: 4px 6px; margin-right: 12px }
  .query { display: flex; gap: 14px; padding: 12px 20px; border-bottom: 1px solid #ddd;
           content-visibility: auto; contain-intrinsic-height: auto 130px }
  .about { width: 150px; flex: none; overflow-wrap: anywhere }
  .about button { display: block; border: 0; padding: 0; background: none; color: inherit; font: inherit; font-size: 18px;
                  text-align: left; overflow-wrap: anywhere; cursor: pointer; text-decoration: underline dotted }
  .rank { margin: 6px 0; color: #c0392b; font-size: 16px } .first { color: #128a4e } .faint { color: #777; font-size: 12px }
  .candidates { display: flex; flex-wrap: wrap; gap: 8px; align-content: flex-start }
  .candidate { text-align: center; font-size: 12px; color: #777; padding: 4px; border: 1px solid transparent }
  .right { outline: 4px solid #128a4e; color: #222; border-radius: 2px } .further { margin-left: 24px; position: relative }
  .further::before { content: "…"; position: absolute; left: -24px; top: 36px; color: #777 }
  img { display: block; background: #fff; border: 1px solid #ccc } .text { overflow: auto; text-align: left; background: #fff;
        border: 1px solid #ccc; color: #222; overflow-wrap: anywhere; padding: 2px 4px; box-sizing: border-box }
  .large { width: 128px; height: 128px; flex: none } .large.text { width: 256px }
  .small { width: 80px; height: 80px } .small.text { width: 190px }
</style>
<header>
  <p id="summary"></p>
  <label>search word <input id="word" type="search" autofocus></label>
  <label>order <select id="order">
    <option value="file">of the file</option>
    <option value="worst">worst rank first</option>
    <option value="best">best rank first</option>
  </select></label>
  <span id="count"></span>
</header>
<main id="list"></main>
<div id="end">&nbsp;</div>
<script type="application/json" id="data">DATA</script>
<script>
  const find = id => document.getElementById(id)
  const { summary, pictures, candidates, queries } = JSON.parse(find("data").textContent)
  const rank = query => query.rank ?? Infinity
  const compare = (a, b) => (a > b) - (a < b)
  let shown = [], drawn = 0

  function element(name, classes, text = "") {
    const made = document.createElement(name)
    made.className = classes
    made.textContent = text
    return made
  }

  function drawPicture(number, size) {
    const { image, text } = pictures[number]
    if (image === undefined) return element("div", size + " text", text)
    const made = element("img", size)
    made.src = image
    return made
  }

  function drawQuery(query) {
    const row = element("section", "query"), about = element("div", "about"), list = element("div", "candidates")
    const word = element("button", "", query.word)
    word.title = "only this search word"
    word.onclick = () => { find("word").value = query.word; update() }
    const found = query.rank === null ? `not among the ${query.of}` : `rank ${query.rank} of ${query.of}`
    const rank = element("p", query.rank === 1 ? "rank first" : "rank", found)
    about.append(word, rank, element("div", "faint", `row ${query.row}`))
    query.candidates.forEach((number, place) => {
      const [name, picture] = candidates[number], score = query.scores[place], right = place === query.right
      const cell = element("div", "candidate" + (right ? " right" : ""))
      if (right && (query.rank === null || query.rank > place + 1)) cell.classList.add("further")
      cell.title = name
      cell.append(drawPicture(picture, "small"), element("div", "", score === null ? "missing" : score.toFixed(3)))
      list.append(cell)
    })
    row.append(drawPicture(query.picture, "large"), about, list)
    return row
  }

  function more() {
    find("list").append(...shown.slice(drawn, drawn + 50).map(drawQuery))
    drawn = Math.min(drawn + 50, shown.length)
  }

  function update() {
    const word = find("word").value.trim().normalize("NFC").toLowerCase(), order = find("order").value
    shown = queries.filter(query => query.word.toLowerCase().includes(word))
    if (order !== "file") shown.sort((a, b) => compare(rank(a), rank(b)) * (order === "worst" ? -1 : 1))
    const first = shown.filter(query => query.rank === 1).length
    find("count").textContent = `${shown.length} of ${queries.length}, the right one first in ${first}`
    find("list").replaceChildren()
    drawn = 0
    more()
    scrollTo(0, 0)
  }

  find("summary").textContent = summary
  find("word").oninput = find("order").onchange = update
  new IntersectionObserver(entries => entries[0].isIntersecting && more(), { rootMargin: "1500px" }).observe(find("end"))
  update()
</script>
</html>
"""
