"""Kill runs of two processes at random moments, a third of them inside a save.

    python tests/loop/kill_test.py --kills 60

The same command brings each to its end, and it must have the bits of one that was not killed: the
log, the weights, the files.
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

from conftest import Tiny, launch_command, launch_environment
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
        tiny = Tiny(folder)

        def start(output_dir):
            with open(folder / "text", "w", encoding="utf-8") as text:
                flags = tiny.flags(output_dir, *OPTIONS, "--max_steps", 200, dropout=True)
                command = launch_command("train.py", *flags, config="cpu_2_processes")
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
            done = f"{kills} kills, {inside} of them inside a save"
            print(f"{done}, {runs} of {runs} runs equal to the bit", flush=True)


def kill_somewhere(process, output_dir, chance, wants_save):
    """SIGKILL to the launcher and all below it. Whether it was saving; None if it had ended."""
    unfinished, log = output_dir / "checkpoints", output_dir / "log.jsonl"
    began, deadline = time.time(), None
    while process.poll() is None:
        # A run writes its log when training begins, or keeps the lines before the resumed step.
        if deadline is None and log.exists() and log.stat().st_mtime > began:
            deadline = time.time() + chance.uniform(0.5, 6.0)
        saving = any(unfinished.glob(".step_*-unfinished"))
        if deadline is not None and time.time() > deadline and (saving or not wants_save):
            if wants_save:
                time.sleep(chance.uniform(0, 0.02))
            saving = any(unfinished.glob(".step_*-unfinished"))
            launcher = psutil.Process(process.pid)
            for each in (*launcher.children(recursive=True), launcher):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
            return saving
        time.sleep(0.0005)
    return None


if __name__ == "__main__":
    main()
