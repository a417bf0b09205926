"""The input pipeline: images a second that the training DataLoader delivers, by workers, and that the model takes in.

    python tests/benchmarks/input_pipeline.py

Once with the images decoded beforehand and kept, as they are, and once decoded at every use.
"""

import copy
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import measure
import torch
from page_data import write_data
from torch.utils.data import DataLoader

import sample_data
from data import read_datasets
from model import DualEncoder, DualEncoderConfig
from runtime.batches import TrainSampler, whole

BATCH, NEGATIVES = 16, 7
IMAGES = BATCH * (1 + 1 + NEGATIVES)  # in a batch: pages, relevant elements, drawn ones


def main():
    arguments = measure.arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = write_data(Path(folder) / "little") if arguments.small else arguments.data_dir
        if not data_dir.exists():
            sample_data.build(data_dir)
        batches, rounds = (3, 1) if arguments.small else (120, 3)
        model = DualEncoder(DualEncoderConfig())
        config = Namespace(data_dir=data_dir, max_candidates=400, num_negatives=NEGATIVES, seed=0)
        alternatives = {}
        kept = read_datasets(config, model, ["train"])[0]
        for kind, dataset in (
            ("kept decoded", kept),
            ("decoded at every use", measure.decoding(kept)),
        ):
            for workers in (0, 1, 2, 4):
                alternatives[f"{kind}, {workers} workers"] = (
                    lambda dataset=dataset, workers=workers: deliver(dataset, workers, batches)
                )
        sample = next(iter(loader(dataset, 0, 1)))
        alternatives["the model, training"] = lambda: train(
            copy.deepcopy(model), sample, max(2, batches // 12)
        )
        seconds = measure.in_turn(alternatives, rounds)  # of a batch
        rows = [
            [
                name,
                f"{IMAGES / sorted(took)[len(took) // 2]:,.0f}",
                f"{measure.ratio(seconds, 'the model, training', name):.1f}",
            ]
            for name, took in seconds.items()
        ]
    measure.show_table(
        "Input pipeline of the default run", ["", "images/s", "× what the model takes in"], rows
    )


def loader(dataset, workers, batches):
    return DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=TrainSampler(dataset.item_weights, BATCH, batches, seed=0),
        collate_fn=whole,
        num_workers=workers,
    )


def deliver(dataset, workers, batches):
    """Seconds a batch, from the first one on: workers start once in a run."""
    iterator = iter(loader(dataset, workers, batches))
    next(iterator)
    began = time.perf_counter()
    for _ in iterator:
        pass
    return (time.perf_counter() - began) / (batches - 1)


def train(model, batch, steps):
    batch = {name: values for name, values in batch.items() if name not in ("index", "weight")}
    optimizer = torch.optim.AdamW(model.parameters())
    began = time.perf_counter()
    for _ in range(steps):
        model(**batch)["losses"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
