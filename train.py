"""The training loop: copy it, edit it. No Trainer, no callbacks; what happens at a step can be read from top to bottom.

    accelerate launch --config_file accelerate_config/cpu.yaml train.py                # all cores of a CPU
    accelerate launch --config_file accelerate_config/cpu_2_processes.yaml train.py
    accelerate launch --config_file accelerate_config/single_gpu.yaml train.py         # multi_gpu.yaml for several
    accelerate launch train.py --config run.yaml --learning_rate 1e-3                  # a YAML of flags, and flags over it

Reading order: Config, TrainState, main, train, train_step, then what they call, in the order in which they call it.

EDIT HERE for another task: the loss, one line of train_step. What a row is stands in data.py, what a score is in model.py.

B micro-batch of one process, G global batch = B x processes x accumulation, update = one step of the optimizer.
"""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import wandb
import yaml
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

import sample_data
from data import TrainSampler, UserError, read_datasets, updates_per_epoch
from evaluate import maybe_log_save_evaluate
from launch import errors_in_one_line, finish, make_accelerator, make_writable
from metrics import compute_metrics
from model import load_model

DEFAULT_DATA_DIR = "default_data"


def option(default, text):
    return field(
        default=default, metadata={"help": text, "metavar": "STR" if default is None else type(default).__name__.upper()}
    )


@dataclass(frozen=True)
class Config:
    """Each value has its default here and nowhere else. Processes, strategy and precision are the launch's to say."""

    # data
    data_dir: str = option(DEFAULT_DATA_DIR, "data folder, laid out as data.py says; the default one is built when it is absent")
    max_candidates: int = option(400, "rows with this many candidates or more are left out")
    num_negatives: int = option(
        7, "candidates drawn for a row besides the relevant one, in training and in the shared evaluation"
    )
    num_workers: int = option(
        0, "DataLoader workers per process; 0 is fastest while the decoded images fit in 2 GB, else about 4"
    )
    # model
    model_name_or_path: str | None = option(
        None, "a folder that train.py saved, or any transformers vision model, local or on the hub; none: a small one, untrained"
    )
    # optimization
    num_epochs: int = option(2, "passes over train.csv")
    max_steps: int = option(0, "stop after this many updates, and plan the learning rate for them; 0: as num_epochs says")
    per_device_batch_size: int = option(16, "rows in a micro-batch of a process")
    gradient_accumulation_steps: int = option(1, "micro-batches in an update")
    learning_rate: float = option(
        4e-3, "the highest, after the warm-up; 4e-3 suits the small model, about 1e-5 to 1e-4 a pretrained one"
    )
    warmup_ratio: float = option(
        0.1, "share of the updates over which the learning rate rises from 0; it then falls to 0 as a cosine"
    )
    weight_decay: float = option(0.05, "of AdamW, on matrices and kernels; biases, norms and scales have none")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    seed: int = option(0, "of the initial weights, the order of the rows and the drawn candidates")
    # logging, evaluating, saving: counted in updates; all three also happen at the end
    log_every: int = option(50, "updates between two lines of train/loss and its like; 0: only at the end")
    eval_every: int = option(500, "updates between two evaluations, both ways; 0: only before the first update and at the end")
    per_device_eval_batch_size: int = option(64, "inputs in a batch of an evaluation, on a process")
    save_every: int = option(0, "updates between two checkpoints; 0: only at the end")
    best_metric: str = option("min:eval/loss", "what output_dir/best is the best of: min: or max:, then any name in the log")
    output_dir: str = option("output", "where everything goes; it must not hold another run")
    project: str = option("match-element", "project in the tracker")


@dataclass
class TrainState:
    """Where the run is. Everything else follows from the config and from `step`."""

    num_updates: int
    training_config: dict  # what save_model puts beside the weights
    name_row: object  # row of train.csv -> its name in messages
    step: int = 0  # updates done
    best_step: int | None = None
    best_value: float | None = None
    evaluations: dict = field(default_factory=dict)  # step -> {"eval/...": ..., "rerank/...": ...}
    # since the last look at the losses: (step, learning rate, index (B,), weight (B,), losses (B,)) of each micro-batch
    window: list = field(default_factory=list)
    window_began: float = field(default_factory=time.perf_counter)
    grad_norm: torch.Tensor | float = 0.0


def main():
    config = read_config(sys.argv[1:])
    accelerator = make_accelerator(
        max_grad_norm=config.max_grad_norm,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=[JsonlTracker(Path(config.output_dir) / "log.jsonl"), "wandb"],
    )
    set_seed(config.seed)  # the same on every process: all begin with the same weights
    make_output_dir(accelerator, config)
    build_default_data(accelerator, config)
    try:
        model = load_model(config.model_name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {config.model_name_or_path}: {' '.join(str(error).split())}") from None
    datasets = read_datasets(config, model.config, ("train", "eval", "test_vocabulary"))
    start_trackers(accelerator, config, datasets)
    train(accelerator, config, model, *datasets, compute_metrics)
    finish(accelerator)


def train(accelerator, config, model, train_dataset, eval_dataset, rerank_dataset, compute_metrics):
    """Train `model` as `config` says; everything it leaves is in config.output_dir. Raises UserError."""
    global_batch_size = config.per_device_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    if global_batch_size > len(train_dataset):
        raise UserError(
            f"a global batch of {global_batch_size} rows is more than the {len(train_dataset)} rows of {train_dataset.rows.path}"
        )
    state = TrainState(
        num_updates=config.max_steps or config.num_epochs * updates_per_epoch(len(train_dataset), global_batch_size),
        training_config=asdict(config) | {"mixed_precision": accelerator.mixed_precision},
        name_row=train_dataset.rows.name,
    )
    # One DataLoader for the whole run, whose sampler knows of epochs: no start-up at each, and workers that stay.
    train_dataloader = DataLoader(
        train_dataset,
        batch_size=config.per_device_batch_size,
        sampler=TrainSampler(len(train_dataset), global_batch_size, state.num_updates, config.seed),
        collate_fn=train_dataset.collate,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    # eps: with the usual 1e-8 a weight whose gradient is all rounding moves by a full step, and runs that should agree drift.
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate, eps=1e-6)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    set_seed(config.seed, device_specific=True)  # from here on each process has dropout of its own

    evaluation = (accelerator, model, state, config, eval_dataset, rerank_dataset, compute_metrics)
    began = time.perf_counter()
    maybe_log_save_evaluate(*evaluation)
    model.train()
    # None: a bar only where there is a screen; a log file would get one at each redrawing.
    progress = tqdm(total=state.num_updates, desc="training", unit="update", disable=not accelerator.is_main_process or None)
    for batch in train_dataloader:
        # A micro-batch. At the last one of an update gradients meet the other processes', and only then step and zero_grad act.
        with accelerator.accumulate(model):
            learning_rate = learning_rate_at(state.step, state.num_updates, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            state.window.append((state.step, learning_rate, *train_step(accelerator, model, batch)))
            if accelerator.sync_gradients:
                state.grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            state.step += 1
            progress.update()
            show(accelerator, progress, state, maybe_log_save_evaluate(*evaluation))
    progress.close()
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


def learning_rate_at(step, num_updates, config):
    """Of update `step` (from 0): linear from 0 to config.learning_rate, then half a cosine to 0, however many processes."""
    warmup = max(1, round(config.warmup_ratio * num_updates))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_updates - warmup)))


def parameter_groups(model, weight_decay):
    """Matrices and kernels decay; biases, norms and scales, which have fewer than two dimensions, do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def read_config(arguments):
    """Config from flags; `--config FILE` names a YAML of them, over which the flags of the command line go. Raises UserError."""
    parser = HfArgumentParser(
        Config, description="Train a dual encoder to rank design elements by how well they fit a page.", allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these options, without the dashes")
    file = parser.parse_known_args(arguments)[0].config
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {file}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(f"--config {file}: expected lines of the form `option: value`")
        # As flags before the others, so that a value is read and checked in one way wherever it stands, and the last one counts.
        arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))] + arguments
    config, _, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise UserError(f"there is no such option: {' '.join(unknown)}; --help lists them")
    problems = [
        f"--{name} is {value}, it must be {'at least' if least in (0, 1) else 'above'} {least}"
        for least, names in AT_LEAST.items()
        for name in names
        for value in [getattr(config, name)]
        if not value >= least  # so that NaN is one too
    ]
    if not config.best_metric.startswith(("min:", "max:")):
        problems.append(f"--best_metric is {config.best_metric}, it must begin with min: or max:")
    if problems:
        raise UserError("; ".join(problems))
    return config


AT_LEAST = {
    0: ("max_steps", "num_workers", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm", "seed")
    + ("log_every", "eval_every", "save_every"),
    1: ("num_epochs", "num_negatives", "max_candidates", "per_device_batch_size", "per_device_eval_batch_size")
    + ("gradient_accumulation_steps",),
}


def make_output_dir(accelerator, config):
    """Make the folder, and see that it can be written and holds no other run. Raises UserError."""
    folder = Path(config.output_dir)
    if (folder / "log.jsonl").exists():
        raise UserError(f"--output_dir {folder} holds a run already: name another one, or remove it")
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    make_writable(folder)


def build_default_data(accelerator, config):
    """Build the default data where it is absent, once on each machine. A folder that the user names must be there."""
    if config.data_dir == DEFAULT_DATA_DIR:
        with accelerator.local_main_process_first():
            if accelerator.is_local_main_process and not Path(config.data_dir).exists():
                sample_data.build(config.data_dir)
    if not Path(config.data_dir).is_dir():
        raise UserError(f"--data_dir {config.data_dir}: there is no such folder")


def start_trackers(accelerator, config, datasets):
    """log.jsonl and wandb, both beginning with the config, the versions, the git commit and the counts of the data."""
    offline = "WANDB_MODE" not in os.environ and accelerator.is_main_process and not wandb.login(prompt=False)
    if offline:
        accelerator.print(
            f"wandb has no key here, so it logs offline; to upload: wandb sync {config.output_dir}/wandb/offline-run-*"
        )
    options = {"dir": config.output_dir, "mode": "offline" if offline else None, "settings": wandb.Settings(silent=offline)}
    packages = ("torch", "accelerate", "transformers", "numpy", "pillow")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    facts = {
        "config": asdict(config),
        "processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device.type),
        "data": {str(dataset.rows.path): dataset.rows.counts for dataset in datasets},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": commit.stdout.strip() or None,
    }
    accelerator.init_trackers(config.project, config=facts, init_kwargs={"wandb": options})


class JsonlTracker(GeneralTracker):
    """log.jsonl: a JSON object a line, each with its `step`; the first one holds what `start_trackers` says of the run."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    def store_init_configuration(self, values):
        self.log(values, step=0)

    def log(self, values, step=None, **kwargs):
        # JSON has no inf and no NaN; a gradient norm may be one where fp16 skips an update.
        values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")


def show(accelerator, progress, state, values):
    """What was logged, on the screen of the main process: the loss beside the bar, an evaluation in a line of its own."""
    if not accelerator.is_main_process or not values:
        return
    losses = f"loss {values['train/loss']:.4f}, {values['train/samples_per_second']:.0f} rows/s"
    progress.set_postfix_str(losses)
    if progress.disable:
        progress.write(f"update {state.step:>6}  {losses}")
    if state.step in state.evaluations:
        progress.write(
            f"update {state.step:>6}  " + "  ".join(f"{name} {values[name]:.4f}" for name in HEADLINES if name in values)
        )


HEADLINES = ("eval/loss", "eval/Recall@1", "eval/MRR@100", "rerank/Recall@1", "rerank/Recall@10", "rerank/MRR@100")


def closing_table(state, config, global_batch_size, seconds):
    """Updates, time, first, best and last metrics, and where everything is: str."""
    first, best, last = 0, state.best_step, state.step
    names = [name for name in HEADLINES if name in state.evaluations[last]]
    lines = [
        "",
        f"{state.step} updates of {global_batch_size} rows in {seconds:.0f} s, evaluations included",
        f"{'':<20}{'before':>12}{f'best, {best}':>14}{f'last, {last}':>14}",
    ]
    for name in names:
        values = [state.evaluations[step].get(name, math.nan) if step is not None else math.nan for step in (first, best, last)]
        lines.append(f"{name:<20}{values[0]:>12.4f}{values[1]:>14.4f}{values[2]:>14.4f}")
    places = {
        "best": f"the model of update {best}, best by {config.best_metric}",
        f"checkpoints/step_{last:08d}": "the model after the last update",
        "metric.csv": "every query of the last rerank evaluation",
        "log.jsonl": "everything that was logged",
    }
    lines += [f"{f'{config.output_dir}/{place}':<36}  {what}" for place, what in places.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
