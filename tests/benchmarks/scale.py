"""What grows with the data: start, memory of a machine, speed; with 20,000 pages and 200,000 elements, and with a tenth of that.

    python tests/benchmarks/scale.py

Memory is the PSS of all processes of a launch after all pixels were read: what several map is counted once.
"""

import ctypes
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
from conftest import launch_command, launch_environment
from page_data import make_tiny_model, save_image, write_csv

UPDATES = 40
LAUNCHES = {  # {name: (processes, workers of each)}, in this order
    "first launch": (1, 0),
    "second launch": (1, 0),
    "2 processes": (2, 0),
    "4 processes": (4, 0),
    "2 workers": (1, 2),
}


def main():
    if "BEGAN" in os.environ:
        return run_train()
    arguments = measure.arguments(__doc__)
    pages = 400 if arguments.small else 20_000
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        for name, size in (("a tenth", pages // 10), ("all", pages)):
            data_dir = write(Path(folder) / name, size)
            for launch, (processes, workers) in LAUNCHES.items():
                if processes < 4 or not arguments.small:
                    results[name, launch] = start(data_dir, model, processes, workers)
    rows = []
    for title, key in (
        ("s to the first update", "start"),
        ("MB of the machine", "memory"),
        ("rows/s", "speed"),
        ("s for an evaluation", "evaluation"),
    ):
        for launch in LAUNCHES:
            if ("all", launch) in results:
                little, much = (results[name, launch][key] for name in ("a tenth", "all"))
                cells = [f"{little:,.1f}", f"{much:,.1f}", f"{much - little:,.1f}"]
                rows.append([f"{title}, {launch}", *cells])
    measure.show_table(
        f"{pages:,} pages, {10 * pages:,} elements", ["", "a tenth", "all", "more"], rows
    )


def write(data_dir, num_pages):
    """Of 16 pixels; few files under many names."""
    random = np.random.default_rng(0)
    for kind, number in (("images", num_pages), ("elements", 10 * num_pages)):
        (data_dir / kind).mkdir(parents=True)
        for i in range(number):
            path = data_dir / kind / f"{kind}_{i:08d}.png"
            if i % 1000 == 0:
                source = path
                save_image(path, random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            else:
                os.link(source, path)
    (data_dir / "csv").mkdir()
    rows = []
    for i in range(num_pages):
        keys = [f"elements_{key:08d}" for key in random.integers(0, 10 * num_pages, 40)]
        rows.append([f"word {i}", i, 1, f"images_{i:08d}", keys[0], json.dumps(keys), "[]", "[]"])
    held_out = num_pages // 10
    splits = {"train": rows[2 * held_out :], "eval": rows[:held_out]}
    for split, part in (splits | {"test_vocabulary": rows[held_out : 2 * held_out]}).items():
        write_csv(data_dir / "csv" / f"{split}.csv", part)
    return data_dir


def start(data_dir, model, processes, workers):
    with tempfile.TemporaryDirectory() as output:
        flags = ["--data_dir", data_dir, "--model_name_or_path", model, "--output_dir", output]
        flags += ["--max_steps", UPDATES, "--report_to", "none", "--save_steps", 0]
        flags += ["--dataloader_num_workers", workers, "--logging_steps", UPDATES // 2]
        config = "cpu" if processes == 1 else "cpu_2_processes"
        command = launch_command(
            "tests/benchmarks/scale.py", *flags, config=config, processes=processes
        )
        environment = launch_environment() | {"BEGAN": str(time.time())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        name: float(value) for name, value in re.findall(r"^of it (\w+) (.*)$", done.stdout, re.M)
    }


def run_train():
    """train.py, which prints what it measures. The evaluation before the first update is not part of the start."""
    from accelerate.utils import gather_object

    import evaluate
    import train

    train_step, run_evaluation = train.train_step, evaluate.run_evaluation
    moments, evaluations, images = [], [], []
    read_datasets = train.read_datasets

    def read(*arguments):
        datasets = read_datasets(*arguments)
        images.extend((datasets[0].pages, datasets[0].elements))
        return datasets

    def evaluated(*arguments):
        began = time.time()
        values = run_evaluation(*arguments)
        evaluations.append(time.time() - began)
        return values

    def step(accelerator, model, batch):
        result = train_step(accelerator, model, batch)
        moments.append(time.time())
        if len(moments) == UPDATES:
            touched = sum(
                int(one.take(np.arange(len(one.keys))[i::64]).sum())
                for one in images
                for i in range(64)
            )
            assert touched > 0
            accelerator.wait_for_everyone()
            ctypes.CDLL(None).malloc_trim(0)  # else each process keeps what an evaluation had
            memory = sum(gather_object([pss()]))
            accelerator.wait_for_everyone()
            speed = 16 * accelerator.num_processes * (UPDATES - 6) / (moments[-1] - moments[5])
            began = float(os.environ["BEGAN"])
            if accelerator.is_main_process:
                print(f"\nof it start {moments[0] - began - sum(evaluations)}")
                print(f"of it memory {memory / 1e6}\nof it speed {speed}")
                print(f"of it evaluation {sum(evaluations)}", flush=True)
        return result

    train.read_datasets, train.train_step, evaluate.run_evaluation = read, step, evaluated
    train.main()


def pss():
    """Bytes of this process and of its workers. Of what n processes map each has 1/n."""
    own, total = os.getpid(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if own in (int(folder.name), parent):
                text = (folder / "smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss: +(\d+)", text, re.M)[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return total


if __name__ == "__main__":
    main()
