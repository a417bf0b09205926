"""Kill runs of two processes at random moments, a third of them inside a save, and bring each to its end by the same command.

    python tests/loop/kill_test.py --kills 60

Every run must end with the bits of one that was not killed: losses, learning rates, metrics, weights, metric.csv, the log.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import launch_command, launch_environment, make_tiny_model, write_data
from test_resume import OPTIONS, assert_the_same_run

KILLS_OF_A_RUN = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, model = write_data(folder / "data"), make_tiny_model(folder / "model")
        options = ["--data_dir", data, "--model_name_or_path", model, *OPTIONS, "--max_steps", 200]

        def start(output_dir):
            with open(folder / "text", "w", encoding="utf-8") as text:
                command = launch_command(
                    "train.py", *options, "--output_dir", output_dir, config="cpu_2_processes"
                )
                return subprocess.Popen(command, env=launch_environment(), stdout=text, stderr=text)

        assert start(folder / "whole").wait() == 0, (folder / "text").read_text()
        kills = inside = runs = 0
        while kills < arguments.kills:
            output_dir = folder / f"run_{runs}"
            for _ in range(KILLS_OF_A_RUN):
                process = start(output_dir)
                in_a_save = kill_somewhere(process, output_dir, chance, wants_save=kills % 3 == 0)
                if in_a_save is None:  # it came to its end before
                    break
                kills, inside = kills + 1, inside + in_a_save
            assert start(output_dir).wait() == 0, (folder / "text").read_text()
            assert_the_same_run(output_dir, folder / "whole", last=200)
            runs += 1
            print(
                f"{kills} kills, {inside} of them inside a save, {runs} of {runs} runs equal to the bit",
                flush=True,
            )


def kill_somewhere(process, output_dir, chance, wants_save):
    """SIGKILL to the launcher and all below it. Whether a save was going on; None if the run had ended."""
    unfinished = output_dir / "checkpoints"
    training = output_dir / "wandb"
    deadline = None
    while process.poll() is None:
        if (
            deadline is None
            and training.exists()
            and any(path.stat().st_mtime > time.time() - 2 for path in training.iterdir())
        ):
            deadline = time.time() + chance.uniform(0.5, 6.0)
        saving = any(unfinished.glob(".step_*-unfinished"))
        if deadline is not None and time.time() > deadline and (saving or not wants_save):
            if wants_save:
                time.sleep(chance.uniform(0, 0.02))
            saving = any(unfinished.glob(".step_*-unfinished"))
            for each in (
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
            return saving
        time.sleep(0.0005)
    return None


if __name__ == "__main__":
    main()
