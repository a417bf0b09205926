"""The state of a run, the checkpoint that it resumes from, and whether it may.

A resume goes in this order: find the checkpoint; load the model from it; read the data with the
preprocessing of that model; compare what the numbers depend on; load the optimizer.
"""

import importlib.metadata
import json
import math
import operator
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from runtime import launch
from runtime.batches import updates_per_epoch
from runtime.checkpoint import (
    MANIFEST,
    check_checkpoint,
    checkpoints_in,
    newest_checkpoint,
    read_checkpoint,
)
from runtime.launch import UserError

PACKAGES = ("torch", "accelerate", "transformers", "numpy")


@dataclass
class TrainState:
    """Where a run is. Everything else follows from the config and from `step`."""

    num_updates: int  # fewer once the run has stopped early; saved too
    global_batch_size: int
    depends_on: dict  # what the numbers depend on; a checkpoint has it too
    training_config: dict  # what is saved beside the weights
    versions: dict  # {package: version}
    name_item: Callable[[int], str]  # what messages call an item of the training data

    # Saved in checkpoints:
    step: int = 0  # updates done
    done: bool = False  # whether what is due at this step (log, evaluate, save) is done
    best_step: int | None = None
    best_value: float | None = None
    evaluations: dict = field(default_factory=dict)  # {step: {"eval/loss": ...}}
    losses: list = field(default_factory=list)  # weight x loss of each item since the last log
    items: int = 0  # since the last log, and so are the seconds
    seconds: float = 0.0
    grad_norm: torch.Tensor | float = 0.0  # of the last update, and so is the learning rate
    learning_rate: float = 0.0

    # Not saved. Losses still on the device, one entry a micro-batch: (step, learning rate,
    # index (B,), weight (B,), losses (B,)).
    window: list = field(default_factory=list)
    window_began: float = 0.0  # when the window began, and when training did, in seconds
    began: float = 0.0
    progress: tqdm = field(default_factory=lambda: tqdm(disable=True))  # the bar on the screen

    @property
    def finished(self) -> bool:
        return self.step == self.num_updates and self.done

    @property
    def evaluations_since_best(self) -> int:
        return sum(step > (self.best_step or 0) for step in self.evaluations)

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many updates is due now. It is after the last one."""
        due = every > 0 and self.step % every == 0
        return self.step > 0 and (due or self.step == self.num_updates)

    def to_save(self) -> dict:
        """What JSON can hold; `restore` takes it."""
        return {name: getattr(self, name) for name in SAVED}

    def restore(self, saved):
        for name in SAVED:
            setattr(self, name, saved[name])
        # JSON has only text for keys.
        self.evaluations = {int(step): values for step, values in self.evaluations.items()}


SAVED = ("num_updates", "step", "done", "best_step", "best_value", "evaluations")
SAVED += ("losses", "items", "seconds", "grad_norm", "learning_rate")


def make_state(accelerator: Accelerator, config, train_dataset, depends_on: dict) -> TrainState:
    """The state before the first update. depends_on: what the numbers depend on. Raises UserError.

    config: a dataclass with the options of that name.
    """
    num_items = len(train_dataset)
    global_batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    global_batch_size *= accelerator.num_processes
    if global_batch_size > num_items:
        raise UserError(
            f"a global batch of {global_batch_size} rows is more than the {num_items} rows of "
            f"{train_dataset.path}"
        )
    num_updates = config.num_train_epochs * updates_per_epoch(num_items, global_batch_size)
    precision = {"mixed_precision": accelerator.mixed_precision}
    # How G is cut changes only rounding. Some strategies add the number of processes.
    depends_on = depends_on | {"global_batch_size": global_batch_size} | precision
    return TrainState(
        num_updates=config.max_steps if config.max_steps > 0 else num_updates,
        global_batch_size=global_batch_size,
        depends_on=depends_on | launch.describe_strategy(accelerator),
        training_config=asdict(config) | precision,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        name_item=train_dataset.name_item,
    )


def collect_losses(accelerator: Accelerator, state: TrainState):
    """Move the losses that are still on the device into `state`, of every process.

    The one place where training waits for the device. Every process must call this.
    Raises UserError if a loss or the gradient is not finite.
    """
    if not state.window:
        return
    # Each a list, with one entry for each micro-batch of this process.
    steps, learning_rates, *columns = zip(*state.window, strict=True)
    shape = (accelerator.num_processes, *torch.stack(columns[0]).shape)  # (W, micro-batches, B)
    index, weight, losses = (
        accelerator.gather(torch.stack(column)).cpu().view(shape) for column in columns
    )
    state.grad_norm = float(state.grad_norm)
    state.seconds += time.perf_counter() - state.window_began
    state.window_began = time.perf_counter()
    state.window.clear()

    broken = ~losses.isfinite() & (index >= 0)
    if broken.any():
        first = broken.any(2).any(0).nonzero()[0].item()  # the first such micro-batch
        items = sorted({state.name_item(i) for i in index[:, first][broken[:, first]].tolist()})
        raise UserError(
            f"the loss of update {steps[first] + 1} is not finite "
            f"(learning rate {learning_rates[first]:.3g}), {len(items)} rows: "
            f"{'; '.join(items[:5])}: lower --learning_rate, or look at these rows. "
            "What was saved before is safe"
        )
    # With fp16 such an update is skipped by the scaler.
    if not math.isfinite(state.grad_norm) and accelerator.mixed_precision != "fp16":
        raise UserError(
            f"the gradient of update {state.step} is not finite "
            f"(learning rate {learning_rates[-1]:.3g}): lower --learning_rate"
        )
    state.losses += (weight * losses).double().flatten().tolist()
    state.items += (index >= 0).sum().item()


def training_metrics(state: TrainState) -> dict[str, float]:
    """{"train/...": value} since the last log. The loss is a mean of the updates' means."""
    if not state.losses:
        return {}
    values = {
        # Summed exactly: the order changes no bit, nor do interruptions and processes.
        "train/loss": math.fsum(state.losses) / len(state.losses),
        "train/grad_norm": float(state.grad_norm),
        "train/learning_rate": state.learning_rate,
        "train/samples_per_second": state.items / state.seconds,
    }
    if torch.cuda.is_initialized():  # of process 0, since it started
        values["train/peak_memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    state.losses, state.items, state.seconds = [], 0, 0.0
    return values


def make_output_dir(accelerator: Accelerator, output_dir: str, resume_from_checkpoint: str):
    """Make the folder, and own it. All must be able to write to it, and it must hold no other run.

    Every process must call this. Raises UserError.
    """
    folder = Path(output_dir)
    named = Path(resume_from_checkpoint)
    # Of os.path, which says no of a name that is too long. Path raises.
    if resume_from_checkpoint not in ("auto", "never"):
        try:
            os.stat(named / MANIFEST)
        except OSError as error:
            raise UserError(
                f"--resume_from_checkpoint {named}: no checkpoint is there ({error.strerror}); "
                "name a folder like output/checkpoints/step_00000200"
            ) from None
    resumes = resume_from_checkpoint != "never" and (
        resume_from_checkpoint == "auto" or named.resolve().is_relative_to(folder.resolve())
    )
    log = folder / "log.jsonl"
    with launch.option_named(f"--output_dir {folder}"):
        has_log = os.path.exists(log)
        holds_a_run = has_log or bool(checkpoints_in(folder / "checkpoints"))
        if has_log and not log.is_file():  # a FIFO would wait for ever
            raise ValueError(f"{log} is no regular file")
        if has_log:
            open(log, "a").close()
    if holds_a_run and not resumes:
        raise UserError(
            f"--output_dir {folder} holds a run already: name another one, remove it, "
            "or leave --resume_from_checkpoint out"
        )
    for name in ("best", "metric.csv", "run.yaml"):
        if not holds_a_run and os.path.lexists(folder / name):
            raise UserError(
                f"--output_dir {folder}: a {name} is there, and no run that made it: "
                "it would be overwritten; name another folder"
            )
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    launch.make_writable(folder)
    launch.own(accelerator, folder)
    for name in ("checkpoints", "best"):
        if os.path.lexists(folder / name):  # it may be a file, or somebody else's
            launch.make_writable(folder / name)
    launch.check_shared(accelerator, folder)


def find_checkpoint(
    accelerator: Accelerator, output_dir: str, resume_from_checkpoint: str
) -> Path | None:
    """The checkpoint that the run resumes from, or None. Every process must call this."""
    if resume_from_checkpoint == "never":
        return None
    folder = Path(output_dir) / "checkpoints"
    ours = checkpoints_in(folder)
    if resume_from_checkpoint == "auto":
        newest = newest_checkpoint(accelerator, folder, SAVED)
        if ours and newest is None:
            raise UserError(
                f"--output_dir {output_dir}: none of its {len(ours)} checkpoints can be read: move "
                "them away to start again, or name another folder"
            )
        return newest
    named = Path(resume_from_checkpoint)
    problem = check_checkpoint(accelerator, named, SAVED)
    if problem is not None:
        raise UserError(f"--resume_from_checkpoint {named}: it is damaged: {problem}")
    step = read_checkpoint(named)[1]["step"]
    if ours and ours[0].name > f"step_{step:08d}":
        raise UserError(
            f"--resume_from_checkpoint {named}: {output_dir} has newer ones, up to {ours[0].name}, "
            "which a run from here would mix with its own: name another --output_dir"
        )
    return named


def resume(accelerator: Accelerator, state: TrainState, checkpoint: Path | None, output_dir: str):
    """Make `state` that of the checkpoint, if the run may resume from it. Raises UserError.

    It may if everything that the numbers depend on is as it was. Without a checkpoint the same is
    asked of the run whose log is in output_dir.
    """
    folder = Path(output_dir)
    log = folder / "log.jsonl"
    first, lines, damaged = read_log(log)
    if first is None and (damaged or lines) and (checkpoint is None or not lines):
        raise UserError(
            f"{log} is another program's, or damaged: move it away, or name another --output_dir"
        )
    if checkpoint is None:
        if first is not None:
            compare(state, first["depends_on"], folder)
            accelerator.print(f"{folder} holds a run without a whole checkpoint: it starts again")
        return
    manifest, saved = read_checkpoint(checkpoint)
    if state.depends_on["model"] is None:
        accelerator.print("the base model is not there any more; the checkpoint has all of it")
        state.depends_on["model"] = manifest["depends_on"].get("model")
    compare(state, manifest["depends_on"], checkpoint)
    state.restore(saved)
    if not (folder / "best").exists():  # resumed in another folder: its next evaluation is the best
        state.best_step = state.best_value = None
    if not state.finished:
        versions = manifest["versions"]
        others = [name for name in state.versions if versions.get(name) != state.versions[name]]
        warning = (
            f" (last bits may differ: other versions of {', '.join(others)})" if others else ""
        )
        accelerator.print(f"resuming after update {state.step}: {checkpoint}{warning}")


def compare(state, before, what):
    differences = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in state.depends_on.items()
        if before.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{what} belongs to a run with other settings: {'; '.join(differences)}: "
            "launch as before, or name another --output_dir"
        )


def read_log(log: Path) -> tuple[dict | None, list, list]:
    """The line of log.jsonl that describes the run, if it is there, and [(step, text)] of all that
    are whole, and the numbers of those that are not: after a full disk, or a loss of power.
    """
    first, lines, damaged = None, [], []
    for number, line in enumerate(log.read_bytes().splitlines() if log.exists() else [], 1):
        try:
            values = json.loads(line.decode("utf-8"))
            lines.append((operator.index(values["step"]), line.decode("utf-8")))
            if first is None and isinstance(values.get("depends_on"), dict):
                first, lines = values, lines[-1:]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            damaged.append(number)
    return first, lines, damaged
