"""How a process begins and ends: the Accelerator, the check that the launch is the one asked for, errors as one line."""

import os
import sys
import tempfile
import time
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import InitProcessGroupKwargs
from transformers.utils import logging as transformers_logging

from data import UserError


def make_accelerator(**kwargs):
    """The Accelerator for this process, checked: Accelerator(**kwargs) with what a machine without a GPU needs besides.

    The strategy and the precision are those of the launch: the YAML in accelerate_config/, or flags of `accelerate launch`.
    Raises UserError where accelerate would quietly run something else.
    """
    transformers_logging.disable_progress_bar()  # a bar for each of a hundred saved models
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # On CPU processes only find each other if told so: DDP through cpu=True, DeepSpeed, which cpu=True would drop, through gloo.
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else [],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        **kwargs,
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --num_processes 2` starts one process where it finds no GPU; its environment gives it away.
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "several processes were asked for and one was started: on a CPU launch with "
            "--config_file accelerate_config/cpu_2_processes.yaml (and --num_processes N)"
        )
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were launched, but they did not find each other: this one sees {accelerator.num_processes}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU; on a CPU use bf16 or no")
    if on_cpu and accelerator.num_processes == 1 and torch.get_num_threads() < (os.cpu_count() or 1):
        accelerator.print(
            f"Using {torch.get_num_threads()} of {os.cpu_count()} CPU cores, as `accelerate launch` sets it; "
            "--config_file accelerate_config/cpu.yaml uses all"
        )
    return accelerator


def make_writable(folder):
    """Make a folder, and see that a file can be written into it before hours of work depend on that. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror}") from None


def finish(accelerator):
    """Close the trackers and leave the process group. Every process must call it."""
    # Without this barrier a launch now and then hangs at its end: to let go of the tensors of the last gather, a thread of gloo's
    # needs the interpreter's lock, while the interpreter, holding it, waits for that thread. At a barrier the lock is free.
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def errors_in_one_line():
    """End the program with one line for a UserError, and status 1, however many processes meet it."""
    try:
        yield
    except UserError as error:
        # Process 0 has most likely the same to say; its end then ends the others before they repeat it. It waits a moment too,
        # for the reason given in `finish`.
        time.sleep(5 if os.environ.get("RANK", "0") != "0" else 0.5)
        # A DataLoader worker's error comes with the worker's traceback; the message is its last line.
        message = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
