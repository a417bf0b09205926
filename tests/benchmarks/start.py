"""The start: from the launch of train.py to its first update, part by part, against the imports that any such program has.

    python tests/benchmarks/start.py

The evaluation before the first update is of two rows here, and not counted: it is work, not start.
"""
# ruff: noqa: E402

import time

STARTED = time.time()  # before the other imports, which are timed

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
from conftest import launch_command, launch_environment
from page_data import make_tiny_model, write_data

import sample_data

FLOOR = "accelerate launch, PreTrainedModel and an Accelerator"
PARTS = ("accelerate launch", "imports", "data", "model", "prepare", "first update")


def main():
    if "BEGAN" in os.environ:
        return run_train()
    arguments = measure.arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        little = write_data(folder / "little", evaluation=2, test=2)
        flags = ["--max_steps", "1", "--output_dir", folder / "output", "--report_to", "none"]
        if arguments.small:
            flags += [
                "--model_name_or_path",
                make_tiny_model(folder / "tiny"),
                "--data_dir",
                little,
            ]
        else:
            if not arguments.data_dir.exists():
                sample_data.build(arguments.data_dir)
            flags += ["--data_dir", arguments.data_dir]
        alternatives = {
            "import torch, transformers, accelerate": [
                sys.executable,
                "-c",
                "import torch, transformers, accelerate",
            ],
            "..., and PreTrainedModel": [
                sys.executable,
                "-c",
                "import torch, accelerate; from transformers import PreTrainedModel",
            ],
            "..., and Trainer": [
                sys.executable,
                "-c",
                "import torch, accelerate; from transformers import Trainer",
            ],
            "python train.py, imports only": [sys.executable, "-c", "import train"],
            FLOOR: launch_command(folder / "floor.py"),
        }
        (folder / "floor.py").write_text(
            "from accelerate import Accelerator\n"
            "from transformers import PreTrainedModel\n"
            "Accelerator(cpu=True)\n"
        )
        parts = []

        def start(program):
            environment = launch_environment() | {"BEGAN": str(time.time()), "LITTLE": str(little)}
            done = subprocess.run(
                program, env=environment, capture_output=True, text=True, check=True
            )
            parts.append(
                [
                    float(line.split()[1])
                    for line in done.stdout.splitlines()
                    if line.startswith("part ")
                ]
            )
            shutil.rmtree(folder / "output")

        runs = {
            name: lambda program=program: subprocess.run(
                program,
                cwd=measure.REPOSITORY,
                env=launch_environment(),
                check=True,
                capture_output=True,
            )
            for name, program in alternatives.items()
        }
        runs["accelerate launch train.py"] = lambda: start(
            launch_command("tests/benchmarks/start.py", *flags)
        )
        seconds = measure.in_turn(runs, 1 if arguments.small else 5, warm_up=not arguments.small)
    first = next(iter(alternatives))
    rows = [
        [
            name,
            f"{np.median(took):.2f}",
            f"{measure.ratio(seconds, name, first):.2f}",
            f"{measure.ratio(seconds, name, FLOOR):.2f}",
        ]
        for name, took in seconds.items()
    ]
    for name, took in zip(PARTS, np.median(parts, axis=0), strict=True):
        shares = [f"{took / np.median(seconds[other]):.2f}" for other in (first, FLOOR)]
        rows.append([f"of it: {name}", f"{took:.2f}", *shares])
    header = ["", "s", f"× {first}", f"× {FLOOR}"]
    measure.show_table("From the launch to the first update, at a second launch", header, rows)


def run_train():
    """train.py, which prints how long each part took, and ends after the first update."""
    moments = [float(os.environ["BEGAN"]), STARTED]
    from accelerate import Accelerator

    import train

    moments.append(time.time())

    def after(function):
        def timed(*arguments, **options):
            result = function(*arguments, **options)
            moments.append(time.time())
            return result

        return timed

    # In the order of their calls: the model is built before the data is read.
    train.load_model = after(train.load_model)
    read_datasets = train.read_datasets

    def read(config, model, splits):
        datasets = read_datasets(config, model, splits)
        moments.append(time.time())
        config = type("Little", (), vars(config) | {"data_dir": os.environ["LITTLE"]})
        return [datasets[0], *read_datasets(config, model, splits[1:])]

    train.read_datasets = read
    began, prepare = [], Accelerator.prepare

    def prepared(*arguments, **options):
        began.append(time.time())
        result = prepare(*arguments, **options)
        moments.append(time.time())
        return result

    Accelerator.prepare = prepared
    step = train.train_step

    def first_update(*arguments):
        began.append(time.time())
        step(*arguments)
        moments.append(time.time())
        launched, imports, imported, model, data, prepared, updated = moments
        taken = [imports - launched, imported - imports, data - model, model - imported]
        taken += [prepared - began[0], updated - began[1]]
        print("".join(f"\npart {seconds}" for seconds in taken), flush=True)
        os._exit(0)

    train.train_step = first_update
    train.main()


if __name__ == "__main__":
    main()
