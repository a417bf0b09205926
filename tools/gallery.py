"""All queries of an evaluation as one page: python tools/gallery.py FOLDER --data_dir DATA

Reads FOLDER/metric.csv and writes FOLDER/gallery.html. A browser filters the queries by search word
and sorts them by rank. The page needs no network: each distinct picture is in it once, small.
"""

import argparse
import base64
import functools
import importlib.util
import io
import json
import os
import sys
import unicodedata
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import report

COLUMNS = [*report.COPIED, "sorted_score", "sorted_candidate_resourcekey", "rank"]


def main():
    parser = argparse.ArgumentParser(description="All queries of an evaluation as one HTML page.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="has a metric.csv")
    parser.add_argument(
        "--data_dir", type=Path, required=True, metavar="DATA", help="the data it was made from"
    )
    arguments = parser.parse_args()
    table, path = arguments.folder / "metric.csv", arguments.folder / "gallery.html"
    try:
        queries = pd.read_csv(table, dtype=str, keep_default_na=False, usecols=COLUMNS)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {table}: {error}. FOLDER must hold what evaluate.py or train.py wrote")
    try:
        data = collect(queries, arguments.data_dir)
    except ValueError as error:
        sys.exit(f"error: {table}, {error}. Give the data that it was made from by --data_dir")
    # No text of the data can end the script element that it stands in.
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    # The page forbids itself what is not inside, and its script sets text as text alone.
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("[[FONT]]", embedded_font(data)).replace("[[DATA]]", data)
    unfinished = path.with_name(f".{path.name}-unfinished")
    unfinished.write_text(page, encoding="utf-8", newline="")
    os.replace(unfinished, path)
    print(f"{path} shows {len(queries)} queries in a browser")


def collect(queries, data_dir):
    """What the page shows, as JSON: its queries name candidates, and these pictures, by number.

    queries: a DataFrame of COLUMNS, all text. Raises ValueError that begins with the row.
    """
    pictures, candidates, rows = [], [], []

    @functools.cache
    def picture_number(picture, size):
        pictures.append(as_html(picture, size))
        return len(pictures) - 1

    @functools.cache
    def candidate_number(key):
        picture = report.show_candidate(data_dir, key)
        candidates.append((key, picture_number(picture, report.CANDIDATE)))
        return len(candidates) - 1

    def show(query):
        word, picture = report.show_query(data_dir, query)
        shown, count = report.first_candidates(query)
        return {
            "word": unicodedata.normalize("NFC", word),
            "row": number,
            "picture": picture_number(picture, report.QUERY),
            "rank": None if query["rank"] == "inf" else int(query["rank"]),
            "of": count,
            "candidates": [candidate_number(key) for key, _, _ in shown],
            "scores": [None if score is None else round(score, 3) for _, score, _ in shown],
            "right": [relevant for *_, relevant in shown].index(True),
        }

    progress = tqdm(queries.to_dict("records"), "drawing the gallery", leave=False, disable=None)
    for number, query in enumerate(progress, start=2):  # as a spreadsheet numbers rows
        try:
            rows.append(show(query))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    summary = report.summary(queries["rank"].to_numpy(float))
    return {"summary": summary, "pictures": pictures, "candidates": candidates, "queries": rows}


def as_html(picture, size):
    if isinstance(picture, Path):
        encoded = io.BytesIO()
        report.small(picture, size, size).save(encoded, "WEBP", quality=80)
        return {"image": f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"}
    limit = report.TEXT_LIMIT
    return {"text": picture if len(picture) <= limit else f"{picture[:limit]}…"}


def embedded_font(text):
    """Of Noto Sans KR what `text` needs, as WOFF in base64: about 150 bytes a Korean syllable."""
    path = report.packaged_font()
    if not path or importlib.util.find_spec("fontTools") is None:
        print("the page has no font of its own: for one, pip install pylopdf-fonts-ko fonttools")
        return ""
    from fontTools import subset

    options, encoded = subset.Options(flavor="woff"), io.BytesIO()
    with subset.load_font(path, options) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="".join(set(text)))
        subsetter.subset(font)
        subset.save_font(font, encoded, options)
    return base64.b64encode(encoded.getvalue()).decode()


if __name__ == "__main__":
    main()
