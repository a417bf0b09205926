"""Saving and loading: models, and checkpoints that are whole or absent.

    output_dir/checkpoints/step_00000100/
        config.json, model.safetensors, training_config.json, README.md, and for a class that
                          transformers does not have model.py: the model, as in output_dir/best
        training_state/   what accelerate saves besides: the optimizer, each process's random
                          states; under DeepSpeed and FSDP2 their parts of model and optimizer
        run.json          TrainState
        manifest.json     what the numbers depend on; size and hash of every file; written last

Loading runs no code that is in a file. DeepSpeed is the exception, since its parts are pickles.
Their hashes say that nothing was damaged; whoever can write to the folder must be trusted.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.utils import cached_file

from runtime import lock
from runtime.card import write_card
from runtime.launch import UserError, option_named

TRAINING_CONFIG = "training_config.json"  # beside the weights: what evaluate.py needs of the run
MANIFEST = "manifest.json"


def save_checkpoint(accelerator: Accelerator, model, state, output_dir: str, total_limit: int):
    """Save checkpoints/step_... atomically. Then remove all but the newest `total_limit` (0: none).

    Every process must call this, with no losses left in state.window. A kill or a full disk at any
    moment leaves the older checkpoints whole. Only an older one of this same step is replaced, and
    can be lost to a kill between two renames. Raises UserError.
    """
    folder = Path(output_dir) / "checkpoints"
    checkpoint = folder / f"step_{state.step:08d}"
    unfinished = folder / f".{checkpoint.name}-unfinished"
    with writing(f"the checkpoint of update {state.step}", output_dir):
        if accelerator.is_main_process:
            for left in folder.glob(".step_*"):
                if re.fullmatch(r"\.step_\d{8}-(unfinished|removed)", left.name):  # after a kill
                    shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write_model(accelerator, model, unfinished, state)
        # The weights are saved already: keep accelerate from saving them again.
        hook = accelerator.register_save_state_pre_hook(
            lambda models, weights, path: weights.clear()
        )
        accelerator.save_state(str(unfinished / "training_state"))
        hook.remove()
        if accelerator.is_main_process:
            (unfinished / "run.json").write_text(json.dumps(state.to_save()), encoding="utf-8")
        accelerator.wait_for_everyone()
        names = files_of(unfinished)
        for name in share(accelerator, names):
            flush(unfinished / name)
        files = describe_files(accelerator, unfinished, names)
        if accelerator.is_main_process:
            manifest = {"depends_on": state.depends_on, "versions": state.versions, "files": files}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            folders = [path for path in unfinished.glob("**") if path.is_dir()]
            for path in (unfinished / MANIFEST, *folders):
                flush(path)
            if checkpoint.is_dir():  # damaged, or saved before its evaluation was done
                remove(checkpoint)
            os.rename(unfinished, checkpoint)
            flush(folder)
            # A newer one is damaged: a run resumes from the newest that is whole.
            older = [path for path in checkpoints_in(folder) if path.name <= checkpoint.name]
            for old in older[total_limit:] if total_limit else []:
                remove(old)
        accelerator.wait_for_everyone()


@contextmanager
def writing(what: str, output_dir: str | Path):
    """What must be written, or the run ends with a UserError that says what is safe."""
    try:
        require_owner(what, output_dir)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError):  # torch says so of a full disk, in these words
            if not re.search("file|iostream|inline_container", reason):
                raise
            reason += " (is the disk full?)"
        safe = ", ".join(path.name for path in checkpoints_in(Path(output_dir) / "checkpoints"))
        raise UserError(
            f"{what} could not be written to {output_dir}: {reason}. "
            f"Safe: {safe or 'no checkpoint yet'}. "
            "Correct this, and the same command resumes from there"
        ) from None


def require_owner(what: str, output_dir: str | Path):
    """Raise a UserError if another run owns the folder by now."""
    if lock.is_lost():
        raise UserError(
            f"{what} is not written: this run stood still for long, and another one owns "
            f"{output_dir} by now. What was saved is safe"
        )


def checkpoints_in(folder):
    """Our checkpoints, newest first. Anything else in the folder is the user's."""
    ours = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return sorted((path for path in ours if path.is_dir()), reverse=True)


def files_of(folder):
    """The names of all files of a checkpoint, in a fixed order."""
    files = [path for path in folder.glob("**/*") if path.is_file() and path.name != MANIFEST]
    return sorted(str(path.relative_to(folder)) for path in files)


def share(accelerator, names):
    return names[accelerator.process_index :: accelerator.num_processes]


def describe_files(accelerator, folder, names):
    """{name: [bytes, hash]}. Each process reads its share, so every one must call this."""
    described = {name: describe_file(folder / name) for name in share(accelerator, names)}
    return {name: value for part in gather_object([described]) for name, value in part.items()}


def describe_file(path):
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()]


def flush(path):
    # Until then a file, or a name in a folder, may be in memory only and lost with the power.
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(checkpoint):
    # Renamed first: after a kill half a checkpoint must not look like a whole one.
    removed = checkpoint.with_name(f".{checkpoint.name}-removed")
    os.rename(checkpoint, removed)
    removed.unlink() if removed.is_symlink() else shutil.rmtree(removed)


def newest_checkpoint(accelerator: Accelerator, folder: Path, needed=()) -> Path | None:
    """The newest whole checkpoint, or None. Names damaged ones. Every process must call this."""
    for checkpoint in checkpoints_in(folder):
        problem = check_checkpoint(accelerator, checkpoint, needed)
        if problem is None:
            return checkpoint
        accelerator.print(f"{checkpoint} is damaged, so it is passed over: {problem}")
    return None


def check_checkpoint(accelerator: Accelerator, checkpoint: Path, needed=()) -> str | None:
    """What is wrong with it, or None. Each process checks a share: every one must call this.

    needed: names that run.json must have.
    """
    problem = None
    try:
        manifest, run = read_checkpoint(checkpoint)
        tables = ("files", "depends_on", "versions")
        absent = [name for name in tables if not isinstance(manifest.get(name), dict)]
        absent += sorted({*needed} - {*run})
        if absent:
            problem = f"it was saved without {', '.join(absent)}"
        described = manifest.get("files", {})
        missing = sorted(described.keys() - set(files_of(checkpoint)))
        if missing:
            problem = f"{missing[0]} is missing"
        for name in share(accelerator, list(described)):
            if problem is None and describe_file(checkpoint / name) != described[name]:
                problem = f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{MANIFEST} or run.json: {error}"
    return next((one for one in gather_object([problem]) if one is not None), None)


def read_checkpoint(checkpoint):
    """(manifest.json, run.json) of a checkpoint."""
    found = []
    for path in (checkpoint / MANIFEST, checkpoint / "run.json"):
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ValueError(f"{path.name} is no regular file")
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def load_training_state(accelerator: Accelerator, checkpoint: Path):
    """Load the optimizer and random states into what was prepared. Every process must call this.

    The model must have been built from `checkpoint` before. DeepSpeed and FSDP2 load its weights
    again, in parts. A file with anything but numbers is a UserError, and none of it is run.
    (DeepSpeed's are not looked at.)
    """
    hook = accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    try:
        accelerator.load_state(str(checkpoint / "training_state"))
    except UnpicklingError:
        raise UserError(
            f"{checkpoint}/training_state holds something else than numbers, and is not loaded"
        ) from None
    finally:
        hook.remove()
    # Of micro-batches, and used only modulo the accumulation, which may be another one now.
    accelerator.step = 0


def save_model(accelerator: Accelerator, model, folder: Path, state):
    """Save the model, its card and training_config.json. Every process must call this.

    They are written to a temporary folder, which is then renamed. Over an older model the files are
    replaced one by one, the weights last. Config and preprocessing do not change in a run, so at
    any moment the folder is a whole model, the old one or the new one.
    """
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    with writing(f"the model in {folder.name}/", folder.parent):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        write_model(accelerator, model, unfinished, state)
        if accelerator.is_main_process:
            for file in unfinished.iterdir():
                flush(file)
            if folder.exists():
                for file in sorted(
                    unfinished.iterdir(), key=lambda file: file.suffix == ".safetensors"
                ):
                    os.replace(file, folder / file.name)
                unfinished.rmdir()
            else:
                os.rename(unfinished, folder)
            flush(folder)
        accelerator.wait_for_everyone()


def write_model(accelerator, model, folder, state):
    # Every process takes part: under ZeRO-3 and FSDP2 each holds a part of the weights.
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:  # under ZeRO-3 the others have None
        # The names in a compiled model begin with this, and nothing could load them.
        state_dict = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        # ZeRO and FSDP2 give a copy for each name of a tied weight. It would be saved twice.
        first = {}
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            state_dict[name] = state_dict[first.setdefault(id(parameter), name)]
        plain.save_pretrained(folder, state_dict=state_dict)
        (folder / TRAINING_CONFIG).write_text(json.dumps(state.training_config, indent=2))
        write_card(folder, plain, state)


def read_training_config(model_dir: str, needed) -> dict:
    """What `write_model` saved beside the weights. needed: names it must have. Raises UserError."""
    path = Path(model_dir) / TRAINING_CONFIG
    with option_named(f"--model_dir {path}"):
        if not path.is_file():
            raise ValueError("it is not there; name a folder that train.py saved")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no options")
        missing = sorted({*needed, "mixed_precision"} - set(config))
    if missing:
        raise UserError(
            f"{path} has no {', '.join(missing)}: another version of this template saved it. "
            "Evaluate it there, or train on from it with --model_name_or_path"
        )
    return config


def hash_model(accelerator: Accelerator, model_name_or_path: str | None) -> str | None:
    """What tells one base model from another, weights and preprocessing. Every process must call
    it.

    A folder has the hash of its files, wherever it lies. A name on the hub has its commit. None
    where the model is not there any more; a run is then resumed from its checkpoint alone.
    """
    if model_name_or_path is None:
        return "untrained"
    folder = Path(model_name_or_path)
    if folder.is_dir():
        kinds = (".json", ".safetensors", ".txt", ".model")
        names = [path.name for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
        names = sorted(set(names) - {TRAINING_CONFIG, "run.json", MANIFEST})
        files = describe_files(accelerator, folder, names)
        return hashlib.blake2b(
            json.dumps(sorted(files.items())).encode(), digest_size=16
        ).hexdigest()
    try:
        return Path(str(cached_file(model_name_or_path, "config.json"))).parent.name
    except OSError:
        return None
