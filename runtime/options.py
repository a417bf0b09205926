"""Options from the fields of a dataclass: flags, a YAML, checks of the values, and --help."""

import argparse
import difflib
import os
import re
import typing
from contextlib import suppress
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from runtime.launch import UserError


class WrongOption(UserError):
    """An option that is not there, or a value that it cannot have."""

    status = 2  # the program's exit status

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # what it quotes may have several lines


def option(default, text, *, heading="", at_least=0, check=None, changes_no_number=False) -> Any:
    """A field of a dataclass of options. MISSING as default: it must be given.

    text: the reason, for --help. heading: --help has it above this field. at_least: for numbers.
    check: (what the value must be, a function that tells whether it is).
    """
    return field(default=default, metadata=locals())


# An option that changes no number, so it may differ when a run resumes.
setting = partial(option, changes_no_number=True)

# What to do instead of Trainer's usual options, and of the names of version 0.1.
INSTEAD = {
    "bf16 fp16": "use accelerate launch --mixed_precision bf16 (or fp16)",
    "deepspeed": "use accelerate launch --config_file accelerate_config/zero2.yaml",
    "fsdp fsdp_config": "use accelerate launch --config_file accelerate_config/fsdp2.yaml",
    "no_cuda use_cpu": "use accelerate launch --config_file accelerate_config/cpu.yaml",
    "optim adam_beta1 adam_beta2": "edit train.py: the optimizer is one line in `train`",
    "lr_scheduler_type": "edit train.py: learning_rate_at",
    "push_to_hub hub_model_id": "when training is done: hf upload NAME output/best",
    "evaluation_strategy eval_strategy eval_every": "updates are counted: --eval_steps",
    "logging_strategy log_every": "updates are counted: --logging_steps",
    "save_strategy save_every": "updates are counted: --save_steps",
    "load_best_model_at_end": "the best model is in best/ of --output_dir",
    "overwrite_output_dir": "nothing is overwritten: remove the folder or name another one",
    "num_epochs": "now --num_train_epochs",
    "per_device_batch_size": "now --per_device_train_batch_size and --per_device_eval_batch_size",
    "warmup_ratio": "now --warmup_steps: below 1 it is a share of the updates",
    "resume": "now --resume_from_checkpoint",
    "num_workers": "now --dataloader_num_workers",
    "best_metric": "now --metric_for_best_model and --greater_is_better",
    "gallery trec_dir": "now tools/gallery.py and tools/trec.py, which read metric.csv",
}


def read_options(kind: Any, arguments: list[str]) -> Any:
    """The dataclass `kind` from flags, and below them the YAML that --config names.

    Raises WrongOption, which tells all names and values that are wrong.
    """
    dashed = re.compile(r"(?<=^--)[\w-]+(?=$|=)")  # Trainer takes --output-dir too
    words = [dashed.sub(lambda name: name[0].replace("-", "_"), word) for word in arguments]
    given, unknown = make_parser(kind).parse_known_args(words)
    texts = {name: (f"--{name}", text) for name, text in vars(given).items()}
    file = texts.pop("config", None)
    if file:
        texts = read_yaml(file[1]) | texts
    # A word without dashes is most likely the value of an unknown option.
    unknown = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown
    wrong = [(word, word.lstrip("-")) for word in unknown]
    names = [one.name for one in fields(kind)]
    wrong += [(texts[name][0], name) for name in texts if name not in names]
    problems = [f"{where}: {what_instead(name, kind)}" for where, name in wrong]
    values = {}
    for one in fields(kind):
        where, text = texts.get(one.name, (f"--{one.name}", None))
        if text is not None:
            try:
                values[one.name] = read_value(one, text)
            except ValueError as error:
                problems.append(f"{where} is {text!r}, it must be {error}")
        elif one.default is MISSING:
            problems.append(f"{where} is missing: {one.metadata['text']}")
    if problems:
        raise WrongOption("; ".join(problems))
    return kind(**values)


# HfArgumentParser would leave 1e-3 of a YAML as text and let names pass that it does not know.
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage and ends the program
        raise WrongOption(message)


def make_parser(kind) -> Parser:
    """It has the names and the --help. Values stay text, as in a YAML, until read_value."""
    parser = group = Parser(
        usage=f"accelerate launch --config_file accelerate_config/cpu.yaml {kind.usage}",
        description=kind.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML of these options, without dashes")
    for one in fields(kind):
        said = one.metadata
        if said["heading"]:
            group = parser.add_argument_group(said["heading"])
        notes = [f"default: {one.default}"] if one.default is not MISSING else ["required"]
        notes += [f"at least {said['at_least']}"] if said["at_least"] else []
        alone = type_of(one) is bool  # --flag stands for --flag true
        group.add_argument(
            f"--{one.name}",
            nargs="?" if alone else None,
            const="true" if alone else None,
            metavar=type_of(one).__name__.upper(),
            help=f"{said['text']} ({'; '.join(notes)})".replace("%", "%%"),
        )
    return parser


def type_of(one) -> type:
    return (typing.get_args(one.type) or (one.type,))[0]  # int, of `int | None`


BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MUST_BE = {bool: "true or false", str: "a line of text", int: "a whole number", float: "a number"}


def read_value(one, text: str) -> Any:
    """The value that the text means for a field. Raises ValueError, which says what it must be."""
    kind, least = type_of(one), one.metadata["at_least"]
    must_be, fits = one.metadata["check"] or (MUST_BE[kind], lambda value: True)
    with suppress(KeyError, ValueError):
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is str:
            if re.fullmatch(r"(?=.*\S)[^\0\n\ud800-\udfff]+", text) and fits(text):
                return os.path.expanduser(text)
        # NaN compares as false. Numpy takes no seed of 2**32, and each process adds its number to
        # the seed. Any other number so large is a slip.
        elif least <= (number := float(text)) < 2**31 and kind(number) == number and fits(number):
            return kind(number)
    bounds = f", at least {least} and below 2**31" if kind in (int, float) else ""
    raise ValueError(must_be + bounds)


def read_yaml(file: str) -> dict[str, tuple[str, str | None]]:
    """{name: (where it stands, its text)}: a value means what it means as a flag. Null is None."""
    where, texts = f"--config {file}:", {}
    try:
        text = Path(os.path.expanduser(file)).read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WrongOption(f"{where} {error}") from None
    pairs = root.value if isinstance(root, yaml.MappingNode) else [(None, None)]
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in pairs):
        raise WrongOption(f"{where} it must have lines of the form `option: value`")
    for key, value in pairs:
        name = key.value.replace("-", "_")
        if not isinstance(value, yaml.ScalarNode):
            raise WrongOption(f"{where} {name} must have one value, on its line")
        if name in texts:
            raise WrongOption(f"{where} {name} is there twice")
        null = value.style is None and value.value.lower() in ("", "~", "null")
        texts[name] = (f"{where} {name}", None if null else value.value)
    return texts


def what_instead(name: str, kind) -> str:
    """What to do instead of an option that `kind` does not have, or that has not two dashes."""
    ours = [one.name for one in fields(kind)]
    for names, what in INSTEAD.items():
        if name in names.split():
            return what
    from transformers import TrainingArguments  # here: it takes a second, for a slip alone

    if name not in ours and name in TrainingArguments.__dataclass_fields__:
        return "a Trainer option that is not here: edit the loop"
    closest = difflib.get_close_matches(name, ours, 1)
    return "there is no such option" + "".join(f", is it --{near}?" for near in closest)
