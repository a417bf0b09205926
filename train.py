"""The training loop: copy it, edit it. No Trainer, no callbacks; what happens at a step can be read from top to bottom.

    accelerate launch --config_file accelerate_config/cpu.yaml train.py                # all cores of a CPU
    accelerate launch --config_file accelerate_config/cpu_2_processes.yaml train.py
    accelerate launch --config_file accelerate_config/single_gpu.yaml train.py         # multi_gpu.yaml for several
    accelerate launch train.py --config run.yaml --learning_rate 1e-3                  # a YAML of flags, and flags over it

Reading order: Config, TrainState, main, train, train_step, then what they call, in the order in which they call it.

EDIT HERE for another task: the loss, one line of train_step. What a row is stands in data.py, what a score is in model.py.

B micro-batch of one process, G global batch = B x processes x accumulation, update = one step of the optimizer.
"""

import argparse
import importlib.metadata
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

import report
from data import TrainSampler, fingerprint, read_datasets, updates_per_epoch, whole
from evaluate import collect_losses, maybe_log_save_evaluate
from metrics import compute_metrics
from model import load_model
from runtime.checkpoint import (
    MANIFEST,
    check_checkpoint,
    load_training_state,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from runtime.launch import (
    Stopped,
    UserError,
    check_shared,
    describe_strategy,
    errors_in_one_line,
    finish,
    leave_signals_to_the_main_process,
    make_accelerator,
    make_writable,
    stop_if_asked,
    watch_for_stop,
)
from runtime.tracking import closing_table, first_line, make_trackers, show, start_trackers

DEFAULT_DATA_DIR = "default_data"


def option(default, text, **heading):
    """A value of Config with its help; heading="...": it is the first one under that in --help."""
    kind = str if default is None else type(default)
    return field(
        default=default,
        metadata=heading | {"help": text, "type": kind, "metavar": kind.__name__.upper()},
    )


@dataclass(frozen=True)
class Config:
    """Each value has its default here and nowhere else. Processes, strategy and precision are the launch's to say."""

    data_dir: str = option(
        DEFAULT_DATA_DIR,
        "data folder, laid out as data.py says; the default one is built when it is absent",
        heading="data",
    )
    max_candidates: int = option(
        400, "rows with this many candidates or more are left out: searches that found far too much"
    )
    num_negatives: int = option(
        7,
        "candidates drawn for a row besides the relevant one, in training and in the shared evaluation; each one costs time",
    )
    num_workers: int = option(
        0,
        "DataLoader workers per process; 0 is fastest while the decoded pages and elements fit in 2 GB each, else about 4",
    )

    model_name_or_path: str | None = option(
        None,
        "a folder that train.py saved, or any transformers vision model, local or on the hub; None: a small one, untrained",
        heading="model",
    )

    num_epochs: int = option(
        2, "passes over train.csv; 2 take 1 to 3 minutes on two CPU cores", heading="optimization"
    )
    max_steps: int = option(
        0,
        "stop after this many updates, and plan the learning rate for them, 20 for a trial; 0: as num_epochs says",
    )
    per_device_batch_size: int = option(
        16, "rows in a micro-batch of a process; more take memory in proportion"
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches in an update, for a global batch that the memory does not hold"
    )
    learning_rate: float = option(
        4e-3,
        "the highest, after the warm-up; 4e-3 suits the small model, about 1e-5 to 1e-4 a pretrained one",
    )
    warmup_ratio: float = option(
        0.1,
        "share of the updates over which the learning rate rises from 0; it then falls to 0 as a cosine",
    )
    weight_decay: float = option(
        0.05, "of AdamW, on matrices and kernels; biases, norms and scales have none"
    )
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm, lest one batch undo the others; 0: never"
    )
    seed: int = option(0, "of the initial weights, the order of the rows and the drawn candidates")

    log_every: int = option(
        50,
        "updates between two lines of train/loss and its like, for each of which the device waits; 0: only at the end",
        heading="logging, evaluating, saving (counted in updates; all three also happen at the end)",
    )
    eval_every: int = option(
        500,
        "updates between two evaluations, both ways; 0: only before the first update and at the end",
    )
    per_device_eval_batch_size: int = option(
        32,
        "rows or pages in a batch of an evaluation, on a process; more suit a GPU, but on a CPU the layers of more are above the "
        "32 MB that glibc keeps and uses again, and take half as long again",
    )
    save_every: int = option(
        200,
        "updates between two checkpoints, from which an interrupted run goes on; 0: only at the end",
    )
    save_total_limit: int = option(2, "checkpoints that are kept, the newest ones; 0: all")
    best_metric: str = option(
        "min:eval/loss",
        "what output_dir/best is the best of: min: or max:, then a name of eval/ or rerank/; with one of rerank/ the number "
        "that is reported would be chosen on its own queries",
    )

    output_dir: str = option(
        "output",
        "where everything goes; a run that is there and was interrupted goes on",
        heading="where to",
    )
    resume: str = option(
        "auto",
        "auto: from the newest whole checkpoint in output_dir; never; or a checkpoint's folder",
    )
    report_to: str = option(
        "wandb",
        "trackers, besides output_dir/log.jsonl: any that accelerate knows, with commas between (wandb,tensorboard), or none",
    )
    project: str = option("match-element", "project in the trackers")


# What may differ between the parts of an interrupted run: it changes no number.
WITHOUT_EFFECT = (
    "data_dir",
    "num_workers",
    "log_every",
    "save_every",
    "save_total_limit",
    "output_dir",
    "resume",
    "report_to",
)
WITHOUT_EFFECT += ("project",)


@dataclass
class TrainState:
    """Where the run is. Everything else follows from the config and from `step`."""

    num_updates: int
    training_config: dict  # what save_model puts beside the weights
    depends_on: dict  # what the numbers depend on, for the checkpoints
    versions: dict
    name_row: Callable[[int], str]  # row of train.csv -> its name in messages
    # since the last look at the losses: (step, learning rate, index (B,), weight (B,), losses (B,)) of each micro-batch
    window: list = field(default_factory=list)
    window_began: float = field(default_factory=time.perf_counter)
    # what a checkpoint keeps
    step: int = 0  # updates done
    done: bool = False  # whether what is due at this step (log, evaluate, save) is done
    best_step: int | None = None
    best_value: float | None = None
    evaluations: dict = field(default_factory=dict)  # step -> {"eval/...": ..., "rerank/...": ...}
    # since the last line of the log: weight x loss of each row, rows, seconds; of the last update: norm and rate
    losses: list = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0
    grad_norm: torch.Tensor | float = 0.0
    learning_rate: float = 0.0

    @property
    def finished(self) -> bool:
        return self.step == self.num_updates and self.done

    def to_save(self):
        """What JSON can hold of it: a dict, which `restore` takes."""
        return {name: getattr(self, name) for name in SAVED}

    def restore(self, saved):
        for name in SAVED:
            setattr(self, name, saved[name])
        self.evaluations = {
            int(step): values for step, values in self.evaluations.items()
        }  # JSON has only text for keys


SAVED = (
    "step",
    "done",
    "best_step",
    "best_value",
    "evaluations",
    "losses",
    "rows",
    "seconds",
    "grad_norm",
    "learning_rate",
)


def main():
    config = read_config(sys.argv[1:])
    accelerator = make_accelerator(
        max_grad_norm=config.max_grad_norm,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=make_trackers(config),
        project_dir=config.output_dir,
    )
    set_seed(config.seed)  # the same on every process: all begin with the same weights
    make_output_dir(accelerator, config)
    build_default_data(accelerator, config)
    try:
        model = load_model(config.model_name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {config.model_name_or_path}: {' '.join(str(error).split())}"
        ) from None
    accelerator.print(
        f"reading {config.data_dir}: each row and image is checked before training begins"
    )
    datasets = read_datasets(config, model, ("train", "eval", "test_vocabulary"))
    state = make_state(accelerator, config, datasets)
    checkpoint = find_checkpoint(accelerator, config, state)
    if state.finished:
        accelerator.print(
            f"{config.output_dir} holds a run that is finished ({state.step} updates), and is left as it is"
        )
        return finish(accelerator)
    if checkpoint is not None:
        model = load_model(checkpoint)
    accelerator.print(
        f"{state.num_updates} updates on {len(datasets[0])} rows; everything goes to {config.output_dir}/; "
        "Ctrl+C saves and ends, and the same command goes on"
    )
    start_trackers(accelerator, config, state, datasets)
    try:
        train(
            accelerator,
            config,
            model,
            state,
            checkpoint,
            *datasets,
            compute_metrics=compute_metrics,
        )
    except Stopped:
        accelerator.print(
            f"\nstopped, as asked, after update {state.step}, which is in {config.output_dir}/checkpoints: "
            "the same command goes on from there"
        )
        finish(accelerator)
        sys.exit(128 + signal.SIGTERM)
    finish(accelerator)


def train(
    accelerator,
    config,
    model,
    state,
    checkpoint,
    train_dataset,
    eval_dataset,
    rerank_dataset,
    compute_metrics,
):
    """Train `model` from `state` on, as `config` says; everything it leaves is in config.output_dir.

    checkpoint: the folder that `state` was read from, or None. Raises UserError, and Stopped once everything is saved.
    """
    # One DataLoader for the whole run, whose sampler knows of epochs: no start-up at each, and workers that stay.
    global_batch_size = state.depends_on["global_batch_size"]
    train_dataloader = DataLoader(
        train_dataset,
        batch_size=config.per_device_batch_size,
        sampler=TrainSampler(
            len(train_dataset), global_batch_size, state.num_updates, config.seed, state.step
        ),
        collate_fn=whole,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else iterating draws from the state that dropout uses, and a resumed run differs
        pin_memory=accelerator.device.type == "cuda",
    )
    # eps: with the usual 1e-8 a weight whose gradient is all rounding moves by a full step, and runs that should agree drift.
    # fused: on a CPU in a third of the time or less; torch does not take it by itself.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, eps=1e-6, fused=True
    )
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    set_seed(config.seed, device_specific=True)  # from here on each process has dropout of its own
    if checkpoint is not None:
        load_training_state(accelerator, checkpoint)
    watch_for_stop(accelerator)

    evaluation = (accelerator, model, state, config, eval_dataset, rerank_dataset, compute_metrics)
    began = state.window_began = time.perf_counter()
    progress = tqdm(
        desc="training",
        unit="update",
        total=state.num_updates,
        initial=state.step,
        disable=not accelerator.is_main_process or None,  # None: a bar on a screen, none in a file
    )
    try:
        if not state.done:  # before the first update, or where an evaluation was interrupted
            show(accelerator, progress, state, maybe_log_save_evaluate(*evaluation))
        model.train()
        for batch in train_dataloader:
            # A micro-batch. At the last one of an update gradients meet the other processes', and only then do step and zero_grad
            # act.
            with accelerator.accumulate(model):
                state.learning_rate = learning_rate_at(state.step, state.num_updates, config)
                for group in optimizer.param_groups:
                    group["lr"] = state.learning_rate
                state.window.append(
                    (state.step, state.learning_rate, *train_step(accelerator, model, batch))
                )
                if accelerator.sync_gradients:
                    state.grad_norm = accelerator.clip_grad_norm_(
                        model.parameters(), config.max_grad_norm or math.inf
                    )
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                state.step, state.done = state.step + 1, False
                progress.update()
                show(accelerator, progress, state, maybe_log_save_evaluate(*evaluation))
                if state.step < state.num_updates:
                    stop_if_asked()
    except Stopped:
        collect_losses(accelerator, state)
        save_checkpoint(
            accelerator,
            model,
            state,
            Path(config.output_dir) / "checkpoints",
            config.save_total_limit,
        )
        raise
    progress.close()
    if accelerator.is_main_process:
        report.draw_curves(
            Path(config.output_dir) / "curves.png", Path(config.output_dir) / "log.jsonl"
        )
    accelerator.print(closing_table(state, config, global_batch_size, time.perf_counter() - began))


def train_step(accelerator, model, batch):
    """Forward and backward of one micro-batch: (index (B,), weight (B,), losses (B,)), on the device, without waiting for it."""
    index, weight = batch.pop("index"), batch.pop("weight")  # (B,), (B,)
    # Only through the wrapped model: DDP, DeepSpeed and FSDP hook nothing but its forward.
    losses = model(**batch)["losses"]  # (B,)  EDIT HERE: any loss that has one value a row
    # A mean over B here, over the micro-batches in backward and over the processes in the all-reduce: the mean over the global
    # batch. Where that is not full, `weight` makes it the mean over the rows that are there; it is exactly 1 otherwise.
    accelerator.backward((losses * weight).mean())
    return index, weight, losses.detach()


def learning_rate_at(step: int, num_updates: int, config: Config) -> float:
    """Of update `step` (from 0): linear from 0 to config.learning_rate, then half a cosine to 0, however many processes."""
    warmup = max(1, round(config.warmup_ratio * num_updates))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return (
        config.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - warmup) / max(1, num_updates - warmup)))
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; biases, norms and scales, which have fewer than two dimensions, do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def read_config(arguments: list[str]) -> Config:
    """Config from flags; `--config FILE` names a YAML of them, over which the flags of the command line go. Raises UserError."""
    parser = make_parser()
    file = vars(parser.parse_known_args(arguments)[0]).get("config")
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {file}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(f"--config {file}: expected lines of the form `option: value`")
        # As flags before the others, so that a value is read and checked in one way wherever it stands, and the last one counts.
        # One that is null has its default.
        given = [
            (name, value)
            for name, value in values.items()
            if value is not None or name not in Config.__dataclass_fields__
        ]
        arguments = [
            word for name, value in given for word in (f"--{name}", str(value))
        ] + arguments
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"there is no such option: {' '.join(unknown)}; --help lists them")
    config = Config(**{name: value for name, value in vars(found).items() if name != "config"})
    problems = [
        f"--{name} is {value}, it must be {'at least' if least in (0, 1) else 'above'} {least}"
        for least, names in AT_LEAST.items()
        for name in names
        for value in [getattr(config, name)]
        if not value >= least  # so that NaN is one too
    ]
    if config.warmup_ratio > 1:
        problems.append(
            f"--warmup_ratio is {config.warmup_ratio}, it must be at most 1: it is a share of the updates"
        )
    if config.seed >= 2**32:
        problems.append(f"--seed is {config.seed}, it must be below 2**32")
    if not config.best_metric.startswith(("min:eval/", "max:eval/", "min:rerank/", "max:rerank/")):
        problems.append(
            f"--best_metric is {config.best_metric}, it must be min: or max:, then a name that begins with eval/ or rerank/"
        )
    if problems:
        raise UserError("; ".join(problems))
    return config


def make_parser() -> argparse.ArgumentParser:
    """The options are the values of Config, under its headings."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch --config_file accelerate_config/cpu.yaml train.py [--config FILE] [--OPTION VALUE ...]",
        description="Train a dual encoder to rank design elements by how well they fit a page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a YAML of these options, without the dashes",
    )
    group = parser
    for each in fields(Config):
        how = dict(each.metadata)
        if "heading" in how:
            group = parser.add_argument_group(how.pop("heading"))
        group.add_argument(f"--{each.name}", default=each.default, **how)
    return parser


AT_LEAST = {
    0: (
        "max_steps",
        "num_workers",
        "learning_rate",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "seed",
    )
    + ("log_every", "eval_every", "save_every", "save_total_limit"),
    1: (
        "num_epochs",
        "num_negatives",
        "max_candidates",
        "per_device_batch_size",
        "per_device_eval_batch_size",
    )
    + ("gradient_accumulation_steps",),
}


def make_output_dir(accelerator: Accelerator, config: Config):
    """Make the folder, and see that all can write to it and that --resume allows what is in it. Raises UserError."""
    folder = Path(config.output_dir)
    if config.resume not in ("auto", "never") and not (Path(config.resume) / MANIFEST).is_file():
        raise UserError(
            f"--resume {config.resume}: no checkpoint is there; name a folder like output/checkpoints/step_00000200"
        )
    goes_on = config.resume == "auto" or (
        config.resume != "never" and Path(config.resume).resolve().is_relative_to(folder.resolve())
    )
    if (folder / "log.jsonl").exists() and not goes_on:
        raise UserError(
            f"--output_dir {folder} holds a run already: name another one, remove it, or leave --resume out"
        )
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    make_writable(folder)
    check_shared(accelerator, folder)


def build_default_data(accelerator: Accelerator, config: Config):
    """Build the default data where it is absent, once on each machine. A folder that the user names must be there."""
    if config.data_dir == DEFAULT_DATA_DIR:
        with accelerator.local_main_process_first():
            if accelerator.is_local_main_process and not Path(config.data_dir).exists():
                print(
                    f"building the default data, once: 25,000 small images in {config.data_dir}/, about 20 seconds",
                    flush=True,
                )
                import sample_data  # here, so that whoever has data can delete that file

                sample_data.build(config.data_dir)
    if not Path(config.data_dir).is_dir():
        raise UserError(f"--data_dir {config.data_dir}: there is no such folder")


def make_state(accelerator: Accelerator, config: Config, datasets) -> TrainState:
    """The state before the first update. Raises UserError."""
    num_rows = len(datasets[0])
    global_batch_size = (
        config.per_device_batch_size
        * accelerator.num_processes
        * config.gradient_accumulation_steps
    )
    if global_batch_size > num_rows:
        raise UserError(
            f"a global batch of {global_batch_size} rows is more than the {num_rows} rows of {datasets[0].rows.path}"
        )
    # How the global batch is cut and who computes it changes only the last bits, unless each process holds its part of the state.
    cut = ("per_device_batch_size", "gradient_accumulation_steps")
    depends_on = {
        name: value for name, value in asdict(config).items() if name not in (*WITHOUT_EFFECT, *cut)
    }
    depends_on |= {
        "global_batch_size": global_batch_size,
        "mixed_precision": accelerator.mixed_precision,
    }
    depends_on |= describe_strategy(accelerator) | {"data": fingerprint(datasets)}
    packages = ("torch", "accelerate", "transformers", "numpy", "pillow")
    return TrainState(
        num_updates=config.max_steps
        or config.num_epochs * updates_per_epoch(num_rows, global_batch_size),
        training_config=asdict(config) | {"mixed_precision": accelerator.mixed_precision},
        depends_on=depends_on,
        versions={name: importlib.metadata.version(name) for name in packages},
        name_row=datasets[0].rows.name,
    )


def find_checkpoint(accelerator: Accelerator, config: Config, state: TrainState) -> Path | None:
    """The checkpoint to go on from, as --resume says, or None; `state` becomes what it holds. Raises UserError."""
    folder = Path(config.output_dir)
    if config.resume == "auto":
        checkpoint = newest_checkpoint(accelerator, folder / "checkpoints")
    elif config.resume == "never":
        checkpoint = None
    else:
        checkpoint = Path(config.resume)
        problem = check_checkpoint(accelerator, checkpoint)
        if problem is not None:
            raise UserError(f"--resume {checkpoint}: it is damaged: {problem}")
    manifest, saved = (
        read_checkpoint(checkpoint) if checkpoint else (first_line(folder / "log.jsonl"), None)
    )
    if manifest is None:
        return None
    names = [
        name
        for name in state.depends_on
        if manifest["depends_on"].get(name) != state.depends_on[name]
    ]
    if names:
        differences = "; ".join(
            f"{name} was {manifest['depends_on'].get(name)}, is {state.depends_on[name]}"
            for name in names
        )
        raise UserError(
            f"{checkpoint or folder} is of a run with other numbers: {differences}: launch as before, or name another folder"
        )
    if checkpoint is None:
        accelerator.print(f"{folder} holds a run without a whole checkpoint: it begins again")
        return None
    state.restore(saved)
    if not (
        folder / "best"
    ).exists():  # in another folder than the checkpoint's: the next evaluation is the best one here
        state.best_step = state.best_value = None
    if not state.finished:
        others = [
            name
            for name, version in state.versions.items()
            if manifest["versions"].get(name) != version
        ]
        warning = (
            f" (last bits may differ: other versions of {', '.join(others)})" if others else ""
        )
        accelerator.print(
            f"going on from update {state.step} of {state.num_updates}: {checkpoint}{warning}"
        )
    return checkpoint


if __name__ == "__main__":
    with errors_in_one_line():
        main()
