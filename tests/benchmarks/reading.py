"""Reading: from a CSV of 200,000 rows of 40 candidates to a data set, in rows a second and peak memory.

    python tests/benchmarks/reading.py

The lists are Python literals or JSON, and come back a hundred times each, as with a search word, or are all different. The images
are few and small: decoding is in input_pipeline.py.
"""

import json
import os
import random
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import measure
import numpy as np
from page_data import save_image, write_csv

from data import read_datasets


def main():
    arguments = measure.arguments(__doc__)
    num_rows = 400 if arguments.small else 200_000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cells in ("Python literals", "JSON"):
            for distinct in (num_rows // 100, num_rows):
                data_dir = write(
                    Path(folder) / f"{cells} {distinct}",
                    num_rows,
                    distinct,
                    str if cells != "JSON" else json.dumps,
                )
                for kind, split in (("training", "train"), ("rerank", "test_vocabulary")):
                    config = Namespace(
                        data_dir=data_dir, max_candidates=400, num_negatives=7, seed=0
                    )
                    took = []

                    def read(config=config, split=split, took=took):
                        os.environ["DATA_CACHE"] = tempfile.mkdtemp(dir=folder)  # a first launch
                        began = time.perf_counter()
                        read_datasets(
                            config,
                            Namespace(config=Namespace(page_size=16, element_size=16)),
                            [split],
                        )
                        took.append(time.perf_counter() - began)

                    memory = measure.peak_memory(read)
                    read()
                    per_row = [f"{num_rows / min(took):,.0f}", f"{memory / num_rows:,.0f}"]
                    rows.append([cells, f"{distinct:,}", kind, *per_row, f"{memory / 1e6:,.0f} MB"])
    header = ["cells", "distinct lists", "data set", "rows/s", "peak bytes a row", "peak"]
    measure.show_table(f"Reading {num_rows:,} rows of 40 candidates", header, rows)


def write(data_dir, num_rows, distinct, written):
    """One CSV under two names, of lists of 40 of 2,000 keys, with 200 pages."""
    chooser = random.Random(0)
    keys = [f"element_{number:06d}" for number in range(2000)]
    pages = [f"page_{number}" for number in range(200)]
    for name, names in (("elements", keys), ("images", pages)):
        (data_dir / name).mkdir(parents=True)
        for key in names:
            save_image(data_dir / name / f"{key}.png", np.zeros((16, 16, 3), np.uint8))
    lists = [chooser.sample(keys, 40) for _ in range(distinct)]
    (data_dir / "csv").mkdir()
    rows = [
        [
            f"word {row % distinct}",
            row,
            1,
            pages[row % 200],
            lists[row % distinct][row % 40],
            written(lists[row % distinct]),
        ]
        + ["[64, 64]", "[0, 0, 32, 32]"]
        for row in range(num_rows)
    ]
    write_csv(data_dir / "csv" / "train.csv", rows)
    (data_dir / "csv" / "test_vocabulary.csv").hardlink_to(data_dir / "csv" / "train.csv")
    return data_dir


if __name__ == "__main__":
    main()
