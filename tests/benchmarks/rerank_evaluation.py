"""The rerank evaluation: ours, the per-query loop of the Trainer reference, and the floor.

    python tests/benchmarks/rerank_evaluation.py

It launches itself on one process and on two. The Trainer reference keeps embeddings for later queries, or not, or decodes images
at each use as well. The floor sends each distinct image through the model once, from memory, at the best batch size, divided
among the processes, and does nothing else; the lower floor has a best batch size for elements and another for pages. Then how
time and memory of ours grow with the queries over the same pages and elements.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import measure
import numpy as np
import torch
from conftest import launch_command, launch_environment
from page_data import make_tiny_model, read_csv, write_csv, write_data
from trainer_reference import make_trainer

import evaluate
import sample_data
from config import read_config
from data import read_datasets
from model import load_model
from runtime.batches import Key
from runtime.evaluation import evaluation_mode
from runtime.launch import finish, make_accelerator


def main():
    if "WORLD_SIZE" in os.environ or "ACCELERATE_USE_CPU" in os.environ:
        return measure_here()
    for config in ("cpu", "cpu_2_processes"):
        command = launch_command(
            "tests/benchmarks/rerank_evaluation.py", *sys.argv[1:], config=config
        )
        subprocess.run(command, env=launch_environment(), check=True)


def measure_here():
    arguments = measure.arguments(__doc__)
    with contextlib.redirect_stdout(io.StringIO()):
        accelerator = make_accelerator()
    folder = Path(tempfile.mkdtemp()) if accelerator.is_main_process else Path()
    if accelerator.is_main_process:
        if arguments.small:
            write_data(folder / "little")
            make_tiny_model(folder / "tiny")
        elif not arguments.data_dir.exists():
            sample_data.build(arguments.data_dir)
    folders = [folder] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(folders)
    folder = folders[0]
    data_dir = folder / "little" if arguments.small else arguments.data_dir
    torch.manual_seed(0)
    model = load_model(folder / "tiny" if arguments.small else None)

    config = Namespace(**vars(read_config([])) | {"output_dir": folder, "data_dir": data_dir})
    dataset = read_datasets(config, model, ["test_vocabulary"])[0]
    model = accelerator.prepare_model(model, evaluation_mode=True)
    trainers = {
        name: make_trainer(
            read_config(["--output_dir", str(folder)]), model, *[queries] * 3, 1, cache=cache
        )
        for name, queries, cache in (
            ("Trainer reference", dataset, True),
            ("Trainer reference, embeddings not kept", dataset, False),
            ("Trainer reference, nothing kept", measure.decoding(dataset), False),
        )
    }
    for trainer in trainers.values():
        trainer.log = lambda values: None
    alternatives = {"evaluate.py": lambda: ours(accelerator, model, dataset, config)}
    alternatives |= {
        name: lambda trainer=trainer: quietly(trainer.rerank_evaluate)
        for name, trainer in trainers.items()
    }
    one_size, sizes = best_batch_sizes(accelerator, model, dataset)
    alternatives["floor"] = lambda: floor(accelerator, model, dataset, one_size)
    alternatives["lower floor"] = lambda: floor(accelerator, model, dataset, sizes)
    results = [
        ours(accelerator, model, dataset, config),
        *(trainer.rerank_evaluate() for trainer in trainers.values()),
    ]
    # They agree, or the comparison is of nothing; but for a query or two, whose scores batches of other shapes tie or part.
    assert all(
        abs(a - b) < 0.01
        for r in results[1:]
        for a, b in zip(results[0].values(), r.values(), strict=True)
    ), results

    def together(run):
        def timed():
            accelerator.wait_for_everyone()
            began = time.perf_counter()
            run()
            accelerator.wait_for_everyone()
            return time.perf_counter() - began

        return timed

    rounds = 1 if arguments.small else 4
    seconds = measure.in_turn({name: together(run) for name, run in alternatives.items()}, rounds)
    rows = [
        [name, f"{np.median(took):.2f}", f"{measure.ratio(seconds, name, 'floor'):.2f}"]
        + [f"{measure.ratio(seconds, name, 'evaluate.py'):.2f}"]
        for name, took in seconds.items()
    ]
    queries, inputs = dataset.candidates.shape[0], len(dataset)
    if accelerator.is_main_process:
        measure.show_table(
            f"Rerank evaluation, {queries} queries, {inputs} distinct images, {accelerator.num_processes} process(es), "
            f"floor at batches of {one_size[0]}, lower floor at {' and '.join(map(str, sizes))}",
            ["", "s", "× floor", "× evaluate.py"],
            rows,
        )
    if accelerator.num_processes == 1:
        growth(accelerator, model, config, folder, (1, 5) if arguments.small else (1, 10, 100))
    finish(accelerator)
    if accelerator.is_main_process:
        shutil.rmtree(folder)


def quietly(run):
    with contextlib.redirect_stdout(io.StringIO()):
        run()


def ours(accelerator, model, dataset, config):
    """With its report, metric.csv and the contact sheet, as in training."""
    evaluation = evaluate.make_evaluations(None, dataset)["rerank"]
    return evaluate.run_evaluation(accelerator, model, "rerank", evaluation, config)


def floor(accelerator, model, dataset, sizes):
    """Seconds of the forward passes of this process's share of the distinct images, which are in memory. sizes: of the
    batches of each group."""
    with evaluation_mode(model):
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        batches = []
        for (group, _), batch_size in zip(dataset.groups, sizes, strict=True):
            images = dataset.__getitems__([Key(index) for index in group])["images"][share]
            batches += images.to(accelerator.device).split(batch_size)
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        for images in batches:
            model(images=images)
        accelerator.wait_for_everyone()
        return time.perf_counter() - began


def best_batch_sizes(accelerator, model, dataset):
    """([size, size], [size of the elements' batches, size of the pages']): the same for both, and each its own."""

    def best(choices):
        seconds = [
            min(floor(accelerator, model, dataset, sizes) for _ in range(2)) for sizes in choices
        ]
        place = torch.tensor([int(np.argmin(seconds))], device=accelerator.device)
        return choices[accelerator.gather(place)[0].item()]  # the same on all

    sizes = 16, 32, 64, 128, 256
    one_size = best([[size, size] for size in sizes])
    of_elements = best([[size, one_size[1]] for size in sizes])[0]
    return one_size, best([[of_elements, size] for size in sizes])


def growth(accelerator, model, config, folder, factors):
    """Ours on `factors` times the queries: every row of the CSV again, so that pages and elements are the same."""
    rows = read_csv(Path(config.data_dir) / "csv" / "test_vocabulary.csv")
    (folder / "more" / "csv").mkdir(parents=True)
    for name in ("images", "elements"):
        (folder / "more" / name).symlink_to(Path(config.data_dir).resolve() / name)
    table, datasets = [], {}
    for factor in factors:
        write_csv(
            folder / "more" / "csv" / "test_vocabulary.csv",
            [list(row.values()) for row in rows] * factor,
            list(rows[0]),
        )
        more = Namespace(**vars(config) | {"data_dir": folder / "more"})
        datasets[factor] = read_datasets(more, model, ["test_vocabulary"])[0]
    memory = {
        factor: measure.peak_memory(
            lambda dataset=dataset: ours(accelerator, model, dataset, config)
        )
        for factor, dataset in datasets.items()
    }
    runs = {
        factor: lambda dataset=dataset: ours(accelerator, model, dataset, config)
        for factor, dataset in datasets.items()
    }
    seconds = measure.in_turn(runs, 2)
    for factor, dataset in datasets.items():
        (queries, width), inputs = dataset.candidates.shape, len(dataset)
        predicted = inputs * model.config.embedding_size * 4 + queries * width * 12
        table.append(
            [f"{queries:,}", f"{queries * width:,}", f"{np.median(seconds[factor]):.2f}"]
            + [
                f"{measure.ratio(seconds, factor, factors[0]):.2f}",
                f"{memory[factor] / 1e6:.0f}",
                f"{predicted / 1e6:.0f}",
            ]
        )
    header = [
        "queries",
        "N × C",
        "s",
        "× the first",
        "peak MB above what was there",
        "MB of outputs, scores and indices",
    ]
    measure.show_table(
        f"Rerank evaluation of more queries over the same {inputs} images, 1 process", header, table
    )


if __name__ == "__main__":
    main()
