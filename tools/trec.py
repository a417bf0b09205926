"""An evaluation for trec_eval and its like: python tools/trec.py FOLDER --data_dir DATA

Reads FOLDER/metric.csv and writes FOLDER/run and FOLDER/qrels. A query is the number of its row, as
a spreadsheet shows metric.csv. https://github.com/usnistgov/trec_eval
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

COLUMNS = ["resourceKey", "sorted_candidate_resourcekey", "sorted_score"]


def main():
    parser = argparse.ArgumentParser(description="The files `run` and `qrels` of an evaluation.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="has a metric.csv")
    parser.add_argument(
        "--data_dir", metavar="DATA", help="not needed: taken so that it is called as gallery.py is"
    )
    folder = parser.parse_args().folder
    table = folder / "metric.csv"
    try:
        queries = pd.read_csv(table, dtype=str, keep_default_na=False, usecols=COLUMNS)
        ranked, relevant = convert(queries[COLUMNS])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {table}: {error}. FOLDER must hold what evaluate.py or train.py wrote")
    for name, lines in (("run", ranked), ("qrels", relevant)):
        unfinished = folder / f".{name}-unfinished"
        unfinished.write_text("".join(lines), encoding="utf-8", newline="")
        os.replace(unfinished, folder / name)
    print(f"{folder / 'run'} and {folder / 'qrels'} hold {len(queries)} queries")


def convert(queries):
    """The lines of `run` and of `qrels`. queries: a DataFrame of COLUMNS, all text."""
    ranked, relevant = [], []
    for query, (key, keys, scores) in enumerate(queries.itertuples(index=False), start=2):
        above = np.float32(np.inf)
        scores = np.array(json.loads(scores), np.float32)
        best_first = zip(json.loads(keys), scores, strict=True)
        for rank, (candidate, score) in enumerate(best_first, start=1):
            # Such tools order by score and break ties in their own ways. The next lower number,
            # in place of an equal one, keeps the order of metric.csv.
            above = min(score, np.nextafter(above, np.float32(-np.inf)))
            ranked.append(f"{query} Q0 {as_name(candidate)} {rank} {above} train.py\n")
        relevant.append(f"{query} 0 {as_name(key)} 1\n")
    return ranked, relevant


def as_name(key):
    """A key without white space, which ends a field there."""
    return re.sub(r"[\s%]", lambda found: quote(found[0]), key)


if __name__ == "__main__":
    main()
