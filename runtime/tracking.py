"""What a run leaves to read: log.jsonl, the trackers, the screen. A step is one line of the log."""

import inspect
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from tqdm import tqdm
from transformers.utils import flatten_dict

from runtime.checkpoint import require_owner, writing
from runtime.launch import UserError, option_named, optional
from runtime.resume import TrainState, read_log


def make_trackers(report_to: str, output_dir: str, project: str | None = None) -> list:
    """What the Accelerator logs with: log.jsonl, and what report_to names. Raises UserError.

    project: wandb is asked here whether it takes it, before anything is spent.
    """
    names = [] if report_to == "none" else report_to.replace(" ", "").split(",")
    known = [name for name in LoggerType.list() if name != "all"]
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(
                f"--report_to {report_to}: there is no {name!r}; "
                f"name some of {', '.join(known)}, or none"
            )
        if name not in installed:  # accelerate would leave it out in silence
            raise UserError(
                f"--report_to {report_to}: {name} is not installed "
                f"(there is {', '.join(installed) or 'none'}): pip install {name}"
            )
    if "wandb" in names and project is not None and os.environ.get("RANK", "0") == "0":
        set_up_wandb(project, output_dir)
    return [JsonlTracker(Path(output_dir) / "log.jsonl"), *names]


def set_up_wandb(project: str, output_dir: str):
    """Without a key it logs offline, and a line says so. Raises UserError if it would not start."""
    import wandb  # here, since it takes 0.6 s

    with option_named("--report_to wandb"):
        try:
            wandb.Settings(project=project)
            has_key = wandb.login(prompt=False, verify=False)
        except Exception as error:
            raise ValueError(error) from None
        if os.environ.get("WANDB_MODE") == "online" and not has_key:
            raise ValueError("WANDB_MODE is online, and there is no key: wandb login")
    if "WANDB_MODE" not in os.environ and not has_key:
        os.environ["WANDB_MODE"] = "offline"
        print(
            "wandb has no key here, so it logs offline; "
            f"to upload: wandb sync {output_dir}/wandb/offline-run-*"
        )


def start_trackers(accelerator: Accelerator, config, state: TrainState, datasets: list):
    """Start all trackers. Each begins with the config, versions, git commit and counts of rows.

    config: a dataclass with output_dir and project.
    A resumed run is one run in log.jsonl and in wandb. Other trackers start another one.
    """
    facts = {
        "config": asdict(config),
        "processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "data": {str(dataset.path): dataset.counts for dataset in datasets},
        "versions": state.versions,
        "git_commit": git_commit(),
        "depends_on": state.depends_on,
        "run_id": os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex(),
    }
    if not accelerator.is_main_process:
        return
    facts = keep_lines(Path(config.output_dir) / "log.jsonl", state, facts)
    with optional("run.yaml"):
        write_run_yaml(Path(config.output_dir) / "run.yaml", facts)
    jsonl, *names = accelerator.log_with
    accelerator.trackers = [jsonl]
    for name in map(str, names):
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        where = [accelerator.logging_dir] if kind.requires_logging_directory else []
        options = wandb_options(facts["run_id"], config.output_dir) if name == "wandb" else {}
        tracker = OptionalTracker(kind(config.project, *where, **options))
        accelerator.trackers.append(tracker)
        tracker.start()
        # Only wandb takes values inside of values. The others get names as config.learning_rate.
        tracker.store_init_configuration(facts if name == "wandb" else flatten_dict(facts))


def write_run_yaml(path: Path, facts: dict):
    """The options of the run, for --config: with the launch in its first lines the same numbers."""
    launch = ", ".join(f"{name} {facts[name]}" for name in ("processes", "strategy"))
    text = f"# the same run again: --config {path} --output_dir FOLDER\n"
    text += f"# launched with: {launch}, mixed precision {facts['mixed_precision']}\n"
    options = yaml.safe_dump(facts["config"], sort_keys=False, allow_unicode=True)
    path.write_text(text + options, encoding="utf-8")


def wandb_options(run_id: str, output_dir: str) -> dict:
    """Options of wandb.init."""
    import wandb

    offline = os.environ.get("WANDB_MODE") == "offline"
    # Seconds that it waits for its server. What it could not send stays in output_dir.
    settings = wandb.Settings(silent=offline, init_timeout=30, finish_timeout=600)
    mode = "offline" if offline else None  # wandb has read the environment before
    return {"dir": output_dir, "mode": mode, "id": run_id, "resume": "allow", "settings": settings}


class OptionalTracker:
    """A tracker whose first failure is one line, and its last call. log.jsonl has everything."""

    def __init__(self, tracker):
        self.wrapped, self.works = tracker, True

    def __getattr__(self, name):
        value = getattr(self.wrapped, name)

        def call(*arguments, **options):
            if self.works:
                self.works = False
                with optional(f"{self.wrapped.name}, from here on,"):
                    value(*arguments, **options)
                    self.works = True

        return call if inspect.ismethod(value) else value


def keep_lines(log: Path, state: TrainState, facts: dict) -> dict:
    """Drop the lines after the resumed step. The first one stays, or is `facts`. Returns it."""
    first, lines, damaged = read_log(log)
    first = first if state.step > 0 else None
    kept = [] if first else [json.dumps({"step": 0, **facts}, ensure_ascii=False)]
    for step, line in lines if state.step > 0 else []:
        # The step itself is logged again if what is due at it was not done.
        if not kept or step < state.step or (step == state.step and state.done):
            kept.append(line)
    with writing("log.jsonl", log.parent):
        if damaged:
            copy = log.with_name("damaged_log.jsonl")
            with open(copy, "ab") as file:  # after those of an earlier time
                file.write(log.read_bytes())
            print(f"{log}: lines {damaged} are damaged and left out; {copy} has them")
        unfinished = log.with_name(f".{log.name}-unfinished")  # a kill leaves one or the other
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, log)
    return facts | (first or {})


def git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="ascii",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):  # there is no git here, or it waits
        return None
    return done.stdout.strip() or None


class JsonlTracker(GeneralTracker):
    """log.jsonl: one JSON object a line, each with its `step`. The first describes the run."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    def log(self, values, step=None, **kwargs):
        # JSON has no inf and no NaN. A gradient norm is one where fp16 skips an update.
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = json.dumps({"step": step, **values}, ensure_ascii=False) + "\n"
        with writing("log.jsonl", self.path.parent), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


def write_report(accelerator: Accelerator, name: str, evaluation, prediction, folder: Path, step):
    """The files of an evaluation's report, each atomically. wandb also gets the pictures.

    They keep their names for the evaluation "rerank". For another one metric.csv becomes
    metric_{name}.csv. step: None where nothing is tracked.
    """
    unfinished = folder / f".report-{name}"
    suffix = "" if name == "rerank" else f"_{name}"
    what = f"the report of {name}"
    with option_named(what) if step is None else optional(what):  # evaluate.py is asked for it
        shutil.rmtree(unfinished, ignore_errors=True)  # after a kill
        unfinished.mkdir()
        evaluation.report(unfinished, evaluation.dataset, prediction)
        require_owner(what, folder)
        for file in sorted(unfinished.iterdir()):
            path = folder / f"{file.stem}{suffix}{file.suffix}"
            os.replace(file, path)
            for tracker in accelerator.trackers:
                if tracker.name == "wandb" and path.suffix == ".png":
                    tracker.log_images({f"{name}/{file.stem}": [str(path)]}, step=step)
        unfinished.rmdir()


def start_progress(accelerator: Accelerator, state: TrainState):
    """Say what will be done, and start the bar: on a screen, not in a file."""
    output_dir = state.training_config["output_dir"]
    accelerator.print(
        f"{state.num_updates} updates of {state.global_batch_size} rows; everything goes to "
        f"{output_dir}/; Ctrl+C saves and ends, and the same command resumes"
    )
    state.progress = tqdm(
        desc="training",
        unit="update",
        total=state.num_updates,
        initial=state.step,
        disable=not accelerator.is_main_process or None,
    )
    state.began = state.window_began = time.perf_counter()


def show(accelerator: Accelerator, state: TrainState, values: dict[str, float]):
    """What was logged, on the screen: losses beside the bar, a line for each evaluation.

    Of an evaluation it shows the loss, the metric that chooses best/ and the first three others.
    The closing table has all.
    """
    if not accelerator.is_main_process:
        return
    chosen = state.training_config["metric_for_best_model"]
    if "train/loss" in values:
        text = f"loss {values['train/loss']:.4f}, {values['train/samples_per_second']:.0f} rows/s"
        latest = [f", {chosen} {values[chosen]:.4f}" for values in state.evaluations.values()]
        state.progress.set_postfix_str(text + "".join(latest[-1:]))
        if state.progress.disable:  # there is no bar in a file
            state.progress.write(f"update {state.step:>6}  {text}")
    evaluations = {}  # {"eval": its names}
    for name in values:
        evaluations.setdefault(name.partition("/")[0], []).append(name)
    evaluations.pop("train", None)
    for evaluation, names in evaluations.items():
        first = [name for name in names if name in (f"{evaluation}/loss", chosen)]
        shown = first + [name for name in names if name not in first][:3]
        line = "  ".join(f"{name} {values[name]:.4f}" for name in shown)
        state.progress.write(f"update {state.step:>6}  {line}")


def closing_table(state: TrainState, config) -> str:
    """Updates, time, all metrics before, at best and at last, and where everything is."""
    state.progress.close()
    seconds = time.perf_counter() - state.began
    first, best, last = 0, state.best_step, state.step
    lines = [
        "",
        f"{last} updates of {state.global_batch_size} rows in {seconds:.0f} s, all included",
        f"{'':<24}{'before':>12}{f'best, {best}':>14}{f'last, {last}':>14}",
    ]
    for name in state.evaluations.get(last, {}):
        before, at_best, at_last = (
            state.evaluations.get(step, {}).get(name, math.nan) for step in (first, best, last)
        )
        lines.append(f"{name:<24}{before:>12.4f}{at_best:>14.4f}{at_last:>14.4f}")
    kind = "greatest" if config.greater_is_better else "smallest"
    contents = {
        "best": f"the model of update {best}: the {kind} {config.metric_for_best_model}",
        f"checkpoints/step_{last:08d}": "the model after the last update",
        "log.jsonl": "everything that was logged",
        "run.yaml": "the options, for --config",
    }
    if best is None:  # there was no evaluation, or its metric was NaN
        del contents["best"]
    files = sorted(path.name for path in Path(config.output_dir).glob("[!.]*.*"))
    contents |= {name: "" for name in files if name not in contents}
    lines += [f"{f'{config.output_dir}/{name}':<36}  {text}" for name, text in contents.items()]
    lines += [
        f"to evaluate: accelerate launch evaluate.py --model_dir {config.output_dir}/best",
        f"to train on: accelerate launch train.py --model_name_or_path {config.output_dir}/best "
        "--output_dir FOLDER",
    ]
    return "\n".join(line.rstrip() for line in lines)
