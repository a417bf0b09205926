"""Training: train.py's loop, Trainer, and a bare loop, on the same model, rows and batches.

    python tests/benchmarks/training.py

The bare loop does the same arithmetic (forward, backward, clipping, learning rate, AdamW) and nothing else: no log, no
checkpoint, no accelerate. It is run over the same DataLoader, and over batches that are in memory already, which is the floor.
Trainer is run as one has it, over a data set of one row an item that decodes its images, and its default collator; then over the
images that data.py keeps decoded; then over its whole batches.
"""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import measure
import torch
from page_data import make_tiny_model, write_data
from torch.utils.data import DataLoader, Dataset
from trainer_reference import make_trainer
from transformers import TrainerCallback, default_data_collator

import sample_data
import train
from config import read_config
from data import read_datasets
from evaluate import make_evaluations
from model import SMALL_BACKBONE, DualEncoder, DualEncoderConfig, load_model
from runtime.batches import TrainSampler, whole
from runtime.launch import make_accelerator
from runtime.resume import make_state
from runtime.tracking import JsonlTracker

TENTH = SMALL_BACKBONE | {"embedding_size": 32, "hidden_sizes": [32], "depths": [1]}


def main():
    arguments = measure.arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # Two rows to evaluate, which train() does before the first update and after the last; neither is counted.
        little = write_data(folder / "little", train=64, evaluation=2, test=2)
        data_dir = little if arguments.small else arguments.data_dir
        if not data_dir.exists():
            sample_data.build(data_dir)
        kinds = (
            [("tiny", load_model(make_tiny_model(folder / "tiny")), 8, 1)]
            if arguments.small
            else models()
        )
        for title, model, updates, rounds in kinds:
            config = read_config([f"--max_steps={updates}", "--eval_steps=0", "--save_steps=0"])
            train_dataset = read(data_dir, model, ["train"])[0]
            work = Work(
                config,
                model,
                train_dataset,
                *read(little, model, ["eval", "test_vocabulary"]),
                folder,
            )
            alternatives = {
                "train.py": work.ours,
                "Trainer": partial(work.trainer_of_rows, measure.decoding(train_dataset)),
                "Trainer, images in memory": partial(work.trainer_of_rows, train_dataset),
                "Trainer, same DataLoader": work.trainer,
                "bare loop, same DataLoader": work.bare,
                "bare loop, batches in memory": work.bare_in_memory,
            }
            seconds = measure.in_turn(alternatives, rounds)  # of an update
            bare, floor = "bare loop, same DataLoader", "bare loop, batches in memory"
            rows = [
                [
                    name,
                    f"{config.per_device_train_batch_size / statistics.median(took):.0f}",
                    f"{1 / measure.ratio(seconds, name, 'Trainer'):.2f}",
                    f"{1 / measure.ratio(seconds, name, 'Trainer, images in memory'):.2f}",
                    f"{1 / measure.ratio(seconds, name, bare):.2f}",
                    f"{1 / measure.ratio(seconds, name, floor):.2f}",
                    f"{statistics.median(a - b for a, b in zip(took, seconds[floor], strict=True)) * 1000:.1f}",
                ]
                for name, took in seconds.items()
            ]
            parameters = sum(parameter.numel() for parameter in model.parameters())
            measure.show_table(
                f"Training, {title} model, {parameters:,} parameters, batches of {config.per_device_train_batch_size}",
                [
                    "",
                    "rows/s",
                    "× Trainer",
                    "× Trainer, images in memory",
                    "× bare loop",
                    "× floor",
                    "ms an update above the floor",
                ],
                rows,
            )


def models():
    """[(title, model, updates of a run, rounds)]"""
    torch.manual_seed(0)
    # A tenth of the parameters of the default one, a seventh of its time: fewer and narrower layers, on smaller images.
    tenth = DualEncoderConfig(
        backbone_config=TENTH, feature_size=166, embedding_size=48, page_size=32, element_size=8
    )
    return [
        ("default", DualEncoder(DualEncoderConfig()), 30, 10),
        ("ten times smaller", DualEncoder(tenth), 150, 15),
    ]


def read(data_dir, model, splits):
    config = Namespace(data_dir=data_dir, max_candidates=400, num_negatives=7, seed=0)
    return read_datasets(config, model, splits)


class Work:
    """Each method trains a copy of the model and returns the seconds of an update, without the first and the last few."""

    def __init__(self, config, model, train_dataset, eval_dataset, rerank_dataset, folder):
        self.config, self.model, self.folder = config, model, folder
        self.datasets = (train_dataset, eval_dataset, rerank_dataset)
        self.stamps = []

    def per_update(self):
        first, last = len(self.stamps) // 6, len(self.stamps) - 2
        seconds = (self.stamps[last] - self.stamps[first]) / (last - first)
        self.stamps.clear()
        return seconds

    def stamp(self, *_):
        self.stamps.append(time.perf_counter())

    def ours(self):
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as output_dir,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            config = replace(self.config, output_dir=output_dir)
            log = JsonlTracker(Path(output_dir) / "log.jsonl")
            accelerator = make_accelerator(max_grad_norm=config.max_grad_norm, log_with=[log])
            accelerator.init_trackers("benchmark", config={})
            train_dataset, *others = self.datasets
            state = make_state(accelerator, config, train_dataset, depends_on={})
            evaluations = make_evaluations(*others)
            model, due = copy.deepcopy(self.model), train.maybe_log_save_evaluate

            def stamped(*arguments):  # what train() calls after each update
                due(*arguments)
                self.stamp()

            with mock.patch.object(train, "maybe_log_save_evaluate", stamped):
                train.train(accelerator, config, model, state, None, train_dataset, evaluations)
        return self.per_update()

    def trainer(self):
        return self.run_trainer(*self.datasets, data_collator=whole)

    def trainer_of_rows(self, train_dataset):
        _, eval_dataset, rerank_dataset = self.datasets
        return self.run_trainer(
            OfRows(train_dataset),
            OfRows(eval_dataset),
            rerank_dataset,
            data_collator=default_data_collator,
        )

    def run_trainer(self, *datasets, data_collator):
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as output_dir,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            config, model = replace(self.config, output_dir=output_dir), copy.deepcopy(self.model)
            stamp = type(
                "Stamp", (TrainerCallback,), {"on_step_end": lambda *_, **__: self.stamp()}
            )()
            make_trainer(
                config,
                model,
                *datasets,
                config.max_steps,
                data_collator=data_collator,
                callbacks=[stamp],
            ).train()
        return self.per_update()

    def bare(self):
        return self.loop(self.dataloader())

    def bare_in_memory(self):
        return self.loop(list(self.dataloader()))

    def dataloader(self):
        dataset, batch_size = self.datasets[0], self.config.per_device_train_batch_size
        sampler = TrainSampler(
            dataset.item_weights, batch_size, self.config.max_steps, self.config.seed
        )
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=whole)

    def loop(self, batches):
        config, model = self.config, copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(
            train.parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            eps=1e-6,
            fused=True,
        )
        model.train()
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate_at(step, config.max_steps, config)
            batch = {
                name: values for name, values in batch.items() if name not in ("index", "weight")
            }
            model(**batch)["losses"].mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            self.stamp()
        return self.per_update()


class OfRows(Dataset):
    """The same rows one by one, as an ordinary data set has them, for a collator that stacks them."""

    def __init__(self, dataset):
        self.dataset, self.item_weights = dataset, dataset.item_weights

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        return {name: values[0] for name, values in self.dataset.__getitems__([key]).items()}


if __name__ == "__main__":
    main()
