"""End runs of two processes at random moments, a third of them inside a save.

    python tests/loop/kill_test.py --kills 60

Most are killed. In the others the terminal is closed (SIGHUP), or Ctrl+C also ends the `tee` that
reads what they say. The same command starts again at once and brings each to its end, and it must
have the bits of one that was not killed: the log, the weights, the files.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import SIDE_BY_SIDE, Tiny, launch_command, launch_environment, not_under_nohup
from test_resume import OPTIONS, assert_the_same_run

KILLS_OF_A_RUN = 5
WAYS = ("KILL", "KILL", "HUP", "KILL", "PIPE")


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
            """A run, and the process that writes what it says into a file."""
            flags = tiny.flags(output_dir, *OPTIONS, "--max_steps", 200, dropout=True)
            command = launch_command("train.py", *flags, config="cpu_2_processes")
            with open(folder / "text", "w", encoding="utf-8") as text:
                reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=text)
            options = {"env": launch_environment() | SIDE_BY_SIDE, "start_new_session": True}
            options["preexec_fn"] = not_under_nohup
            run = subprocess.Popen(command, stdout=reader.stdin, stderr=reader.stdin, **options)
            reader.stdin.close()
            return run, reader

        def to_the_end(output_dir):
            run, reader = start(output_dir)
            run.wait(), reader.wait()
            assert run.returncode == 0, (folder / "text").read_text()

        to_the_end(folder / "whole")
        kills = inside = runs = 0
        while kills < arguments.kills:
            output_dir = folder / f"run_{runs}"
            for _ in range(KILLS_OF_A_RUN):
                way = WAYS[kills % len(WAYS)]
                wants_save = kills % 3 == 0
                in_a_save = end_somewhere(*start(output_dir), way, output_dir, chance, wants_save)
                if in_a_save is None:  # it came to its end before
                    break
                kills, inside = kills + 1, inside + in_a_save
            to_the_end(output_dir)
            assert_the_same_run(output_dir, folder / "whole", last=200)
            runs += 1
            done = f"{kills} ends, {inside} of them inside a save"
            print(f"{done}, {runs} of {runs} runs equal to the bit", flush=True)


def end_somewhere(process, reader, way, output_dir, chance, wants_save):
    """End the launcher and all below it. Whether it was saving; None if it had ended."""
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
            if way == "KILL":
                launcher = psutil.Process(process.pid)
                for each in (*launcher.children(recursive=True), launcher):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            else:
                if way == "PIPE":
                    reader.kill()
                os.killpg(process.pid, signal.SIGHUP if way == "HUP" else signal.SIGINT)
            assert process.wait(60) != 0
            reader.wait()
            return saving
        time.sleep(0.0005)
    return None


if __name__ == "__main__":
    main()
