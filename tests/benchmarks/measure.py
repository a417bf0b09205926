"""What the benchmarks share: alternatives timed in turn in one run, peak memory, and a table of ratios."""

import argparse
import copy
import ctypes
import gc
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "task")]

import torch  # noqa: E402


def arguments(description):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "--small",
        action="store_true",
        help="little data and one round: to see that it works, not how fast",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=REPOSITORY / "default_data",
        help="built where it is absent",
    )
    return parser.parse_args()


def in_turn(alternatives, rounds, warm_up=1):
    """{name: [seconds, one of each round]}: in turn, so that what else the machine does meets all. Warm-up rounds do not count.

    alternatives: {name: function}, which returns the seconds that it took (float), or else is timed from call to return.
    """
    seconds = {name: [] for name in alternatives}
    for number in range(-warm_up, rounds):
        names = list(alternatives)
        for name in (
            names[number % len(names) :] + names[: number % len(names)]
        ):  # each has each place in the order
            began = time.perf_counter()
            took = alternatives[name]()
            if number >= 0:
                seconds[name].append(
                    took if isinstance(took, float) else time.perf_counter() - began
                )
    return seconds


def ratio(seconds, name, other):
    """How many times as long as `other` it takes: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def decoding(dataset):
    """A copy of a data set that decodes its images at each use, as programs do that keep none."""
    dataset = copy.copy(dataset)
    for name in ("pages", "elements"):
        images = copy.copy(getattr(dataset, name))
        images.take = lambda numbers, images=images: torch.stack(
            [torch.from_numpy(images.decode(number)) for number in numbers]
        )
        setattr(dataset, name, images)
    return dataset


def peak_memory(run):
    """Bytes that the process has at most, while `run` runs, above what it had before."""

    def read(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else what earlier runs let go of is there to be used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest back to the present
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def machine():
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{processor[1].strip() if processor else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {device}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def show_table(title, header, rows):
    """A table for the README, of cells that are text."""
    print(f"\n{title}\n({machine()})\n")
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
    print(flush=True)
