"""What a run leaves to read: log.jsonl, the tracker, the screen. A step is one line, and one point on the axis."""

import json
import math
import os
import subprocess
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tqdm import tqdm
from transformers.utils import flatten_dict

from runtime.launch import UserError


def make_trackers(config) -> list:
    """What the Accelerator is to log with: log.jsonl, and the trackers that --report_to names. Raises UserError."""
    names = [] if config.report_to == "none" else config.report_to.replace(" ", "").split(",")
    known = [name for name in LoggerType.list() if name != "all"]
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(
                f"--report_to {config.report_to}: there is no {name!r}; name some of {', '.join(known)}, or none"
            )
        if name not in installed:  # accelerate would go on without it
            found = ", ".join(installed) or "none"
            raise UserError(
                f"--report_to {config.report_to}: {name} is not installed (there is {found}): pip install {name}"
            )
    return [JsonlTracker(Path(config.output_dir) / "log.jsonl"), *names]


def start_trackers(accelerator: Accelerator, config, state, datasets):
    """log.jsonl and the others, all beginning with the config, the versions, the git commit and the counts of the data.

    A run that goes on is one run in log.jsonl, wandb, trackio and TensorBoard; other trackers begin another one. What it had
    logged after its checkpoint comes again: log.jsonl leaves it out, TensorBoard hides it, trackio has it twice.
    """
    facts = {
        "config": asdict(config),
        "processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device.type),
        "data": {str(dataset.rows.path): dataset.rows.counts for dataset in datasets},
        "versions": state.versions,
        "git_commit": git_commit(),
        "depends_on": state.depends_on,
        "run_id": os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex(),
    }
    if accelerator.is_main_process:
        facts = keep_lines(Path(config.output_dir) / "log.jsonl", state) or facts
    options = {
        "trackio": {"name": facts["run_id"], "resume": "allow"},
        "tensorboard": {"purge_step": state.step + state.done},
    }
    if LoggerType.WANDB in accelerator.log_with:
        options["wandb"] = wandb_options(accelerator, config) | {
            "id": facts["run_id"],
            "resume": "allow",
        }
    accelerator.init_trackers(config.project, init_kwargs=options)
    for tracker in accelerator.trackers:  # of the main process; the other ones have none
        # Only these two take values inside of values; names such as config.learning_rate do for the others.
        tracker.store_init_configuration(
            facts if tracker.name in ("jsonl", "wandb") else flatten_dict(facts)
        )


def wandb_options(accelerator: Accelerator, config) -> dict:
    """What `wandb.init` is to be told: without a key it logs offline, and a line says so."""
    import wandb  # here, since it takes 0.6 s, which only those who ask for it are to wait

    offline = (
        "WANDB_MODE" not in os.environ
        and accelerator.is_main_process
        and not wandb.login(prompt=False)
    )
    if offline:
        accelerator.print(
            f"wandb has no key here, so it logs offline; to upload: wandb sync {config.output_dir}/wandb/offline-run-*"
        )
    return {
        "dir": config.output_dir,
        "mode": "offline" if offline else None,
        "settings": wandb.Settings(silent=offline),
    }


def keep_lines(log: Path, state) -> dict | None:
    """Leave only what `state` has behind it in log.jsonl, and return its first line, or None where nothing is left."""
    if not log.exists():
        return None
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines() if state.step > 0 else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:  # of a process that was killed while it wrote
            continue
        if not kept or step < state.step + state.done:
            kept.append(line)
    with open_whole(log) as file:
        file.writelines(f"{line}\n" for line in kept)
    return json.loads(kept[0]) if kept else None


@contextmanager
def open_whole(path: Path, mode: str = "w"):
    """A file to write, UTF-8 where it is text, at `path` once it is whole: whoever looks meanwhile sees the one before."""
    unfinished = path.with_name(f".{path.name}-unfinished")
    with (
        open(unfinished, mode)
        if "b" in mode
        else open(unfinished, mode, newline="", encoding="utf-8") as file
    ):
        yield file
    os.replace(unfinished, path)


def git_commit() -> str | None:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None


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
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.log(values, step=0)

    def log(self, values, step=None, **kwargs):
        # JSON has no inf and no NaN; a gradient norm may be one where fp16 skips an update.
        values = {
            name: None if isinstance(v, float) and not math.isfinite(v) else v
            for name, v in values.items()
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int):
    """Send a PNG to the tracker, if it is one that takes images, as of the step that its metrics have."""
    if not accelerator.is_main_process:  # the others may be here before it is written
        return
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_images(
                {name: [str(path)]}, step=step
            )  # the file as it is; pixels would be compressed anew
        elif tracker.name == "tensorboard":
            pixels = np.asarray(Image.open(path))[None]  # (1, H, W, 3)
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # accelerate's tracker of it has no log_images
            import trackio  # pyrefly: ignore[missing-import]

            tracker.log({name: trackio.Image(path)}, step=step)


def show(accelerator: Accelerator, progress: tqdm, state, values: dict[str, float]):
    """What was logged, on the screen of the main process: the latest loss and evaluation beside the bar, each evaluation in a
    line of its own."""
    if not accelerator.is_main_process or not values:
        return
    if "train/loss" in values:
        losses = f"loss {values['train/loss']:.4f}, {values['train/samples_per_second']:.0f} rows/s"
        name = state.training_config["best_metric"].partition(":")[2]
        progress.set_postfix_str(
            f"{losses}, {name} {list(state.evaluations.values())[-1][name]:.4f}"
        )
        if progress.disable:
            progress.write(f"update {state.step:>6}  {losses}")
    if state.step in state.evaluations:
        progress.write(
            f"update {state.step:>6}  "
            + "  ".join(f"{name} {values[name]:.4f}" for name in HEADLINES if name in values)
        )


HEADLINES = (
    "eval/loss",
    "eval/Recall@1",
    "eval/MRR@100",
    "rerank/Recall@1",
    "rerank/Recall@10",
    "rerank/MRR@100",
)


def closing_table(state, config, global_batch_size: int, seconds: float) -> str:
    """Updates, time, first, best and last metrics, and where everything is: str."""
    first, best, last = 0, state.best_step, state.step
    names = [name for name in HEADLINES if name in state.evaluations[last]]
    lines = [
        "",
        f"{state.step} updates of {global_batch_size} rows in {seconds:.0f} s, evaluations included",
        f"{'':<20}{'before':>12}{f'best, {best}':>14}{f'last, {last}':>14}",
    ]
    for name in names:
        values = [
            state.evaluations[step].get(name, math.nan) if step is not None else math.nan
            for step in (first, best, last)
        ]
        lines.append(f"{name:<20}{values[0]:>12.4f}{values[1]:>14.4f}{values[2]:>14.4f}")
    places = {
        "best": f"the model of update {best}, best by {config.best_metric}",
        f"checkpoints/step_{last:08d}": "the model after the last update",
        "metric.csv": "every query of the last rerank evaluation; contact_sheet.png shows some",
        "log.jsonl": "everything that was logged; curves.png draws it",
    }
    lines += [f"{f'{config.output_dir}/{place}':<36}  {what}" for place, what in places.items()]
    lines += [
        f"to evaluate it again: accelerate launch evaluate.py --model_dir {config.output_dir}/best",
        f"to train it further:  accelerate launch train.py --model_name_or_path {config.output_dir}/best --output_dir FOLDER",
    ]
    return "\n".join(lines)


def first_line(log: Path) -> dict | None:
    """What `start_trackers` wrote into log.jsonl, or None."""
    try:
        with open(log, encoding="utf-8") as file:
            return json.loads(file.readline())
    except (OSError, ValueError):  # there is none, or the process was killed while it wrote it
        return None
