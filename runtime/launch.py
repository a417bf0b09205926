"""How a process begins and ends: the Accelerator, the check that the launch is the one asked for, errors as one line."""

import dataclasses
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging


class UserError(ValueError):
    """Something that the user can mend, told in one line: what, where (file, row, value), and what to do."""


def make_accelerator(max_grad_norm: float = 0.0, **kwargs) -> Accelerator:
    """The Accelerator for this process, checked: Accelerator(**kwargs) with what a machine without a GPU needs besides.

    The strategy and the precision are those of the launch: the YAML in accelerate_config/, or flags of `accelerate launch`.
    max_grad_norm: for DeepSpeed, which clips by itself. Raises UserError where accelerate would quietly run something else.
    """
    transformers_logging.disable_progress_bar()  # a bar for each of a hundred saved models
    # Twice a micro-batch accelerate looks on all of sys.path for an optimizer that is not used here, a quarter of a millisecond:
    # None says that it is not there. Delete this to train with it.
    if "lomo_optim" not in sys.modules:
        sys.modules["lomo_optim"] = None  # pyrefly: ignore[unsupported-operation]
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    on_cpu = (
        not torch.accelerator.is_available()
        or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    )
    # On CPU processes only find each other if told so: DDP through cpu=True, DeepSpeed, which cpu=True would drop, through gloo.
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else [],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        **kwargs,
    )
    check_launch(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_up_deepspeed(accelerator, max_grad_norm, kwargs.get("gradient_accumulation_steps", 1))
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision != "no":
        plugin: Any = accelerator.state.fsdp_plugin
        # Else losses and scores leave the model in bfloat16, where many scores are tied, and gradients are added up in it.
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    accelerator.print(
        f"{processes} on {accelerator.device.type}, strategy {accelerator.distributed_type.value}, "
        f"mixed precision {accelerator.mixed_precision}"
    )
    if (
        on_cpu
        and accelerator.num_processes == 1
        and torch.get_num_threads() < (os.cpu_count() or 1)
    ):
        accelerator.print(
            f"Using {torch.get_num_threads()} of {os.cpu_count()} CPU cores, as `accelerate launch` sets it; "
            "--config_file accelerate_config/cpu.yaml uses all"
        )
    return accelerator


def check_launch(accelerator: Accelerator):
    """That the processes and the strategy are those that were asked for: accelerate falls back in silence. Raises UserError."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # `accelerate launch --num_processes 2` starts one process where it finds no GPU; its environment gives it away.
    if (
        "WORLD_SIZE" not in os.environ
        and "ACCELERATE_USE_CPU" in os.environ
        and "MASTER_ADDR" in os.environ
    ):
        raise UserError(
            "several processes were asked for and one was started: on a CPU launch with "
            "--config_file accelerate_config/cpu_2_processes.yaml (and --num_processes N)"
        )
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were launched, but they did not find each other: this one sees {accelerator.num_processes}"
        )
    for strategy in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        wanted = os.environ.get(f"ACCELERATE_USE_{strategy.value}", "").lower() == "true"
        if wanted != (accelerator.distributed_type == strategy):
            raise UserError(
                f"the launch {'asks' if wanted else 'does not ask'} for {strategy.value}, and accelerate made "
                f"{accelerator.distributed_type.value} of it"
                + ("; it runs FSDP on GPUs only" * (wanted and strategy == DistributedType.FSDP))
            )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP 1 is not supported: write fsdp_version: 2 into the config, as in accelerate_config/fsdp2.yaml"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU; on a CPU use bf16 or no")


def describe_strategy(accelerator) -> dict:
    """{"strategy": ..., and "processes": ... where each of them holds a part of the optimizer's state}"""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {
            "strategy": f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}",
            "processes": accelerator.num_processes,
        }
    if accelerator.distributed_type == DistributedType.FSDP:
        return {"strategy": "FSDP2", "processes": accelerator.num_processes}
    return {"strategy": "DDP"}  # one process is one of these


def set_up_deepspeed(accelerator, max_grad_norm, gradient_accumulation_steps):
    """What DeepSpeed takes from its own config, whatever the loop says; the one place that knows of it. Raises UserError."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    ours = {
        "gradient_clipping": float(max_grad_norm),
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    for name, value in ours.items():
        # It ignores the norm that clip_grad_norm_ is given, and takes "auto" for 1.0.
        if config.get(name, "auto") not in ("auto", value):
            raise UserError(
                f"the DeepSpeed config has {name} {config[name]}, the command {value}: leave it out of the config"
            )
        config[name] = value
    # Else transformers would hand out pieces of weights under ZeRO-3 (even with zero3_init_flag: false), before it is known
    # which of them decay. So each process builds the whole model in main memory, and DeepSpeed divides it then.
    unset_hf_deepspeed_config()


class Stopped(Exception):
    """The run was asked to end; every process has finished its update and raises this at the same one."""


_stop = SimpleNamespace(signal=None, group=None, launcher=None)


def watch_for_stop(accelerator: Accelerator):
    """From now on SIGTERM and SIGINT end nothing by themselves: `stop_if_asked` does. Every process must call it."""

    def remember(number, frame):
        _stop.signal = number

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    # Of `python train.py` the parent is a shell, which may end before it; `accelerate launch` and torchrun set these.
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    _stop.launcher = os.getppid() if launched else None
    if accelerator.num_processes > 1:
        _stop.group = torch.distributed.new_group(
            backend="gloo"
        )  # between the hosts: a GPU's queue of work is not waited for


def stop_if_asked():
    """Raise Stopped on every process if one was asked to end, or has lost its launcher. Nothing without `watch_for_stop`."""
    asked = torch.tensor(
        int(_stop.signal is not None or _stop.launcher not in (None, os.getppid()))
    )
    if _stop.group is not None:
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=_stop.group)
    if asked:
        raise Stopped


def leave_signals_to_the_main_process(worker):
    """For DataLoader workers, which would else die of the signal before the process that needs their batches is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not ignored: a Python process that ends sends SIGTERM to its workers, and waits until they are gone.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def make_writable(folder: Path):
    """Make a folder, and see that a file can be written into it before hours of work depend on that. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror}") from None


def check_shared(accelerator: Accelerator, folder: Path):
    """See that every machine has the same folder: all processes write parts of a checkpoint. Raises UserError."""
    mark = folder / ".shared"
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    if not mark.exists():
        raise UserError(
            f"--output_dir {folder.resolve()}: this machine does not see what the first writes; name a shared disk"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink()


def finish(accelerator: Accelerator):
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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # Process 0 has most likely the same to say; its end then ends the others before they repeat it. It waits a moment too,
        # for the reason given in `finish`.
        time.sleep(5 if os.environ.get("RANK", "0") != "0" else 0.5)
        # A DataLoader worker's error comes with the worker's traceback; the message is its last line.
        message = str(error).strip().splitlines()[-1].removeprefix("runtime.launch.UserError: ")
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not sys.exit, which would wait for DataLoader workers
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        # Another process is gone. It has said why, or was killed; the launcher ends those that are left, within 30 s.
        if os.environ.get("RANK", "0") == "0":
            print(
                "\nanother process ended, for the reason given above or killed from outside (out of memory?); "
                "what was saved is safe, and the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
