"""How a process begins and ends: the Accelerator, signals, and errors in one line."""

import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from traceback import extract_tb
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    PrecisionType,
    broadcast_object_list,
    is_deepspeed_available,
)
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import enable_full_determinism
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from runtime import lock

SAFE = "what was saved is safe, and the same command resumes from there"
TIMEOUT = timedelta(hours=2)  # a process that is dead is noticed at once all the same


class UserError(ValueError):
    """What a user can correct, told in one line: what, where (file, row, value) and what to do."""

    status = 1  # the exit status of the program


def refuse_hidden_library():
    """`import evaluate` in metrics.py finds our evaluate.py. Python would tell of a circle.

    Returns the __getattr__ of evaluate.py, for an import inside a function of metrics.py.
    """
    message = (
        "in metrics.py `import evaluate` is our evaluate.py, not the library: import "
        "what the library wraps (from sklearn.metrics import f1_score), or rename evaluate.py"
    )
    if "metrics" in sys.modules and not hasattr(sys.modules["metrics"], "compute_metrics"):
        sys.exit(f"error: {message}")

    def refuse(name):
        if name in ("load", "combine", "evaluator"):
            raise UserError(message)
        raise AttributeError(f"evaluate.py has no {name!r}")

    return refuse


def make_accelerator(
    max_grad_norm: float = 0.0, full_determinism: bool = False, **kwargs
) -> Accelerator:
    """Accelerator(**kwargs), with what a machine without a GPU needs, and checked.

    Strategy and precision are the launch's: accelerate_config/, or flags of `accelerate launch`.
    max_grad_norm: for DeepSpeed, which clips by itself. full_determinism: as in transformers.
    Raises UserError where accelerate would run something else in silence.
    """
    transformers_logging.disable_progress_bar()  # else a bar for each model that is saved
    if full_determinism:  # before anything is on a GPU
        enable_full_determinism(0)  # the caller sets the seed
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    on_cpu = (
        not torch.accelerator.is_available()
        or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    )
    if deepspeed and not is_deepspeed_available():
        raise UserError("this launch needs DeepSpeed: pip install -r requirements-deepspeed.txt")
    if not deepspeed:  # else accelerate loads it in the middle of a run: 4 s and a warning
        sys.modules.setdefault("deepspeed", None)  # pyrefly: ignore[no-matching-overload]
    # On a CPU DDP needs cpu=True. DeepSpeed needs gloo, and cpu=True would switch it off.
    # Others wait while process 0 writes files, for longer than the 10 minutes of NCCL.
    group: Any = {"timeout": TIMEOUT} | ({"backend": "gloo"} if on_cpu and deepspeed else {})
    if deepspeed:  # it makes groups of its own, and names no time
        torch.distributed.distributed_c10d.default_pg_timeout = TIMEOUT
        torch.distributed.distributed_c10d.default_pg_nccl_timeout = TIMEOUT
    with option_named("the launch"):  # a variable of another one may have been left behind
        accelerator = Accelerator(
            cpu=on_cpu and not deepspeed,
            kwargs_handlers=[
                InitProcessGroupKwargs(**group),
                # Without it DDP keeps the gradients twice, 4 bytes a parameter.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            **kwargs,
        )
    # One precision for matrix products and convolutions: torch has TF32 for the latter alone, and
    # accelerate switches it on for a compiled model. Whoever wants speed launches with bf16.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check_launch(accelerator, kwargs.get("gradient_accumulation_steps", 1))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_up_deepspeed(accelerator, max_grad_norm, kwargs.get("gradient_accumulation_steps", 1))
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision != "no":
        plugin: Any = accelerator.state.fsdp_plugin
        # Else losses and scores are rounded to bfloat16, and many scores are tied. Gradients would
        # be summed in it too.
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    accelerator.print(
        f"processes: {accelerator.num_processes}, device: {accelerator.device.type}, "
        f"strategy: {accelerator.distributed_type.value}, "
        f"mixed precision: {accelerator.mixed_precision}"
    )
    if (
        on_cpu
        and accelerator.num_processes == 1
        and torch.get_num_threads() < (os.cpu_count() or 1)
    ):
        accelerator.print(
            f"using {torch.get_num_threads()} of {os.cpu_count()} CPU cores, as `accelerate "
            "launch` sets it; --config_file accelerate_config/cpu.yaml uses all"
        )
    return accelerator


def check_launch(accelerator: Accelerator, gradient_accumulation_steps: int):
    """Raise a UserError where accelerate fell back to fewer processes or another strategy."""
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # Without a GPU `accelerate launch --num_processes 2` starts one process. Its environment tells.
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
            f"{asked} processes were launched, but they did not find each other: "
            f"this one sees {accelerator.num_processes}"
        )
    steps = accelerator.gradient_accumulation_steps
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not deepspeed and steps != gradient_accumulation_steps:  # set_up_deepspeed compares too
        raise UserError(
            f"the launch or ACCELERATE_GRADIENT_ACCUMULATION_STEPS asks for accumulation {steps}, "
            f"the command for {gradient_accumulation_steps}: say it in the command alone"
        )
    for strategy in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        wanted = os.environ.get(f"ACCELERATE_USE_{strategy.value}", "").lower() == "true"
        if wanted != (accelerator.distributed_type == strategy):
            asks = "asks" if wanted else "does not ask"
            hint = "; it runs FSDP on GPUs only" if strategy == DistributedType.FSDP else ""
            raise UserError(
                f"the launch {asks} for {strategy.value}, and accelerate made "
                f"{accelerator.distributed_type.value} of it{hint}"
            )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP 1 is not supported: write fsdp_version: 2 into the config, "
            "as in accelerate_config/fsdp2.yaml"
        )
    if accelerator.mixed_precision not in PrecisionType.list():  # it would compute in float32
        raise UserError(
            f"the launch asks for mixed precision {accelerator.mixed_precision}; "
            f"name one of {', '.join(PrecisionType.list())}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU; on a CPU use bf16 or no")


def refuse_sharded_weights(accelerator: Accelerator):
    """For an evaluation by itself. Raises UserError."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise UserError(
            "DeepSpeed and FSDP2 divide what training needs; "
            "to evaluate launch with cpu, single_gpu or multi_gpu.yaml; "
            "a model that does not fit on one GPU is evaluated by its training: --eval_steps"
        )


def describe_strategy(accelerator) -> dict:
    """{"strategy": ...}, and "processes" where each of them holds a part of the optimizer."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {
            "strategy": f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}",
            "processes": accelerator.num_processes,
        }
    if accelerator.distributed_type == DistributedType.FSDP:
        return {"strategy": "FSDP2", "processes": accelerator.num_processes}
    return {"strategy": "DDP"}  # or one process: the numbers are the same


def set_up_deepspeed(accelerator, max_grad_norm, gradient_accumulation_steps):
    """Write into DeepSpeed's config what it reads there and nowhere else. Raises UserError."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    ours = {
        "gradient_clipping": float(max_grad_norm),
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "communication_data_type": "fp32",  # with bf16 gradients would be summed in bfloat16
    }
    for name, value in ours.items():
        # DeepSpeed ignores the norm given to clip_grad_norm_, and takes "auto" for 1.0.
        if config.get(name, "auto") not in ("auto", value):
            raise UserError(
                f"the DeepSpeed config has {name} {config[name]}, the command {value}: "
                "leave it out of the config"
            )
        config[name] = value
    # Else transformers divides the weights while it builds the model, before `parameter_groups` can
    # see their dimensions. So each process builds the whole model in main memory, and DeepSpeed
    # divides it later.
    unset_hf_deepspeed_config()


class Stopped(Exception):
    """The run was asked to end. Every process raises this after the same update."""

    def __init__(self, signal_number):
        super().__init__()
        self.status = 128 + signal_number  # 130 for Ctrl+C, 143 for SIGTERM, as shells say it


# The last three are what clusters send before the time is up.
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP += (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_stop = SimpleNamespace(signal=0, group=None, launcher=None)


def watch_for_stop(accelerator: Accelerator):
    """From now on the signals of STOP wait for `stop_if_asked`. Every process must call this."""

    def remember(number, frame):
        _stop.signal = number

    # `nohup` ignores SIGHUP. But torchrun's launcher, which starts several processes, ends at it
    # even so, and ends them 30 s later.
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number in STOP:
        if number != signal.SIGHUP or not nohup or "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(number, remember)
    # These are set by `accelerate launch` and torchrun. The parent of `python train.py` is a shell,
    # which may end first.
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    _stop.launcher = os.getppid() if launched else None
    if accelerator.num_processes > 1:
        # On gloo, between the hosts: nobody waits for the work that a GPU still has to do.
        _stop.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


def stop_if_asked():
    """Raise Stopped on every process if one of them was asked to end or has lost its launcher."""
    orphaned = _stop.launcher not in (None, os.getppid())
    asked = torch.tensor(signal.SIGTERM.value if orphaned else _stop.signal)
    if _stop.group is not None:
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=_stop.group)
    if asked:
        raise Stopped(asked.item())


def ask_to_stop():
    """As a signal from outside would: all processes stop after the same update, and it is saved."""
    _stop.signal = signal.SIGTERM


def leave_signals_to_the_main_process(worker):
    """For DataLoader workers: a signal must not end them while their process needs batches."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    # Not ignored: a process that ends sends SIGTERM to its workers and waits until they are gone.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
    # Else a worker whose process was killed waits for ever: nobody reads the batch that it sends.
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int):
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def make_writable(folder: str | Path):
    """Make a folder and write into it, before hours of work depend on it. Raises UserError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror}") from None


def own(accelerator: Accelerator, folder: str | Path):
    """Refuse the folder to other runs until `finish`. Every process must call this.

    Process 0 owns it. Raises UserError if another run does.
    """
    problem: list = [None]
    if accelerator.is_main_process:
        with option_named(f"--output_dir {folder}"):
            problem = [lock.take(Path(folder) / ".owner")]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(f"--output_dir {folder}: {problem[0]}")


def check_shared(accelerator: Accelerator, folder: Path):
    """Every machine must see one folder: all write to a checkpoint. Raises UserError."""
    mark = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115
    name = [Path(mark.name).name]  # that of process 0
    broadcast_object_list(name)
    if not (folder / name[0]).exists():
        raise UserError(
            f"--output_dir {folder.resolve()}: this machine does not see what the first writes; "
            "name a shared disk"
        )
    accelerator.wait_for_everyone()
    mark.close()  # which removes it


def finish(accelerator: Accelerator):
    """Close the trackers and leave the process group. Every process must call this."""
    # Without this barrier a launch can hang at its end. A thread of gloo's needs the interpreter's
    # lock to free the tensors of the last gather, and the interpreter holds the lock while it waits
    # for that thread.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    lock.give_back()


@contextmanager
def optional(what: str):
    """What a run can do without. A failure is one line, and the run continues."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"{what} is left out: {reason:.300}")


@contextmanager
def option_named(option: str):
    """What a library says of a file or a folder becomes a UserError that begins with the option:
    `--model_dir x`. An error of another kind also says where in the project it came from.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {' '.join(str(error).split())}") from None
    except SafetensorError as error:
        raise UserError(f"{option}: a file is cut short, or of git-lfs: {error}") from None
    except Exception as error:  # a config can hold anything
        project = Path(__file__).parents[1]
        frames = [(Path(frame.filename), frame.lineno) for frame in extract_tb(error.__traceback__)]
        place = [f for f in frames if f[0].parent in (project, project / "runtime")][-1]
        raise UserError(
            f"{option}: {type(error).__name__}: {' '.join(str(error).split())} "
            f"({place[0].name}, line {place[1]})"
        ) from None


@contextmanager
def errors_in_one_line():
    """End the program with one line for a UserError, however many processes meet it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        drop_failed_writes(stream)
    try:
        yield
    except UserError as error:
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
        # Process 0 most likely has the same to say. The others give it time, and its end ends them.
        # Process 0 waits a little too, for the reason given in `finish`.
        time.sleep(5 if os.environ.get("RANK", "0") != "0" else 0.5)
        # The error of a DataLoader worker comes after the worker's traceback.
        message = str(error).rpartition("runtime.launch.UserError: ")[2]
        say_and_exit(f"error: {' '.join(message.split())}", error.status)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            say_and_exit("interrupted before training began: nothing was lost", 130)
        os._exit(130)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            said = str(error).splitlines()[-1]
            say_and_exit(f"error: {said} Out of memory? {SAFE}", 1)
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        # Another process is gone. It has said why, or it was killed. The launcher ends the others
        # within 30 s.
        if os.environ.get("RANK", "0") == "0":
            say_and_exit(
                "another process ended: the reason stands above, or it was killed from outside "
                f"(out of memory?); {SAFE}",
                1,
            )
        os._exit(1)


def drop_failed_writes(stream):
    """For a terminal that is closed, a pipe whose reader is gone, and letters it cannot spell.

    Ctrl+C on `train.py | tee log` ends tee, and what the run says then must not end its save.
    """
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")

    def tolerant(method):
        def call(*arguments):
            with suppress(OSError):
                return method(*arguments)

        return call

    stream.write, stream.flush = tolerant(stream.write), tolerant(stream.flush)


def say_and_exit(message, status):
    lock.give_back()
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)  # not sys.exit, which would wait for DataLoader workers
