"""The options. The name, default, reason and bounds of each are said once, at its field.

    accelerate launch train.py --config run.yaml --learning_rate 1e-3    # flags go over the YAML

EDIT HERE to add one: a field. It is an `option` if numbers depend on it, which a resume compares,
else a `setting`. Flags, YAML, --help and checks follow from it.
Processes, strategy and precision are the launch's to say.
"""

import re
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from runtime.options import option, read_options, setting


@dataclass(frozen=True)
class Config:
    """Train a dual encoder to rank design elements by how well they fit a page.

    Processes, strategy and precision (bf16) are those of the launch's --config_file.
    """

    usage: ClassVar = "train.py [--config FILE] [--OPTION VALUE ...]"

    data_dir: str = setting(
        "default_data",
        "its format is in data.py; the default one is built if missing",
        heading="data",
    )
    max_candidates: int = option(
        400, "rows with this many candidates or more are left out", at_least=1
    )
    num_negatives: int = option(
        7, "candidates drawn for a row besides the relevant one", at_least=1
    )
    dataloader_num_workers: int = setting(
        0,
        "per process; 0 is fastest, unless it takes long to make a batch",
        check=("a whole number up to 256", lambda value: value <= 256),
    )

    # The model counts by its hash and not by its path.
    model_name_or_path: str | None = setting(
        None, "a saved folder or transformers vision model; None: a small new one", heading="model"
    )
    page_size: int | None = option(None, "pixels of a page; None: as the model says", at_least=1)
    element_size: int | None = option(None, "of an element; None: as the model says", at_least=1)
    gradient_checkpointing: bool = setting(
        False, "computes activations again in backward: less memory for one more forward"
    )

    num_train_epochs: int = option(
        2, "passes over train.csv; 2 take minutes on a CPU", heading="optimization", at_least=1
    )
    max_steps: int = option(0, "updates (20 for a trial); 0 or -1: num_train_epochs", at_least=-1)
    # How a global batch is cut changes only rounding. The loop compares the global batch's size.
    per_device_train_batch_size: int = setting(
        16, "rows in a process's micro-batch; memory grows in proportion", at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-batches per update, if a global batch does not fit in memory", at_least=1
    )
    learning_rate: float = option(4e-3, "the peak; about 1e-5 to 1e-4 for a pretrained model")
    warmup_steps: float = option(
        0.1,
        "updates of linear warmup; below 1: a share of all updates",
        check=("a whole number or a share below 1", lambda value: value < 1 or value % 1 == 0),
    )
    weight_decay: float = option(0.05, "of AdamW; biases, norms and scales have none")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never")
    seed: int = option(0, "of the initial weights, row order, negatives and dropout")
    full_determinism: bool = setting(
        False, "on GPUs the same bits again, slower; where there is no such kernel it stops"
    )

    logging_steps: int = setting(
        50,
        "updates between two lines of train/loss; each waits for the device; 0: only at the end",
        heading="logging, evaluating, saving (in updates; each also happens at the end)",
    )
    # Training depends on eval_steps and metric_for_best_model only where it stops early. They still
    # count: the numbers that are reported are those of best/.
    eval_steps: int = option(500, "updates between two; 0: only at the start and the end")
    per_device_eval_batch_size: int = option(
        32, "items in a process's batch; 32 is fastest on a CPU; raise it on a GPU", at_least=1
    )
    metric_for_best_model: str = option(
        "eval/loss",
        "what chooses best/; with one of rerank/ you would choose on your test queries",
        check=("a name like eval/loss", re.compile(r"[^/\s]+/\S+").fullmatch),
    )
    greater_is_better: bool = option(
        False, "whether higher is better; never guessed from the name, so set both"
    )
    early_stopping_patience: int = option(
        0, "evaluations in a row without a new best, after which training ends; 0: never"
    )
    save_steps: int = setting(200, "updates between two checkpoints; 0: only at the end")
    save_total_limit: int = setting(2, "how many newest checkpoints are kept; 0: all")

    output_dir: str = setting(
        "output", "for all output; an interrupted run that is there resumes", heading="where to"
    )
    resume_from_checkpoint: str = setting(
        "auto", "auto: the newest whole checkpoint in output_dir; never; or a folder"
    )
    report_to: str = setting("wandb", "trackers of accelerate: wandb,tensorboard; or none")
    project: str = setting(
        "match-element",
        "the trackers' project",
        check=("a name without / \\ # ? % :", re.compile(r"(?!\.+$)[^/\\#?%:]+").fullmatch),
    )

    def __post_init__(self):
        # Trainer's -1 means 0. As one value both resume the same run.
        object.__setattr__(self, "max_steps", max(0, self.max_steps))


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a model that train.py saved. Prints the numbers that training logged for it."""

    usage: ClassVar = "evaluate.py --model_dir FOLDER [--OPTION VALUE ...]"

    model_dir: str = option(MISSING, "a folder that train.py saved: output/best or a checkpoint")
    data_dir: str | None = option(None, "data folder; None: as in training")
    output_dir: str = option("evaluation", "where metric.csv and the pictures go")
    per_device_eval_batch_size: int | None = option(
        None, "items in a process's batch; None: as in training", at_least=1
    )


def what_numbers_depend_on(config: Config) -> dict[str, Any]:
    """{name: value}, the same when a run resumes. The caller adds the model, data and launch."""
    names = [one.name for one in fields(config) if not one.metadata["changes_no_number"]]
    return {name: getattr(config, name) for name in names}


def read_config(arguments: list[str]) -> Config:
    """The options of train.py, as read_options reads them."""
    return read_options(Config, arguments)
