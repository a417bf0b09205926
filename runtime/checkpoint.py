"""Saving and loading: models, and checkpoints that are whole or absent.

    output_dir/checkpoints/step_00000100/
        config.json, model.safetensors, training_config.json      the model, as in output_dir/best
        training_state/     what accelerate saves besides: the optimizer and each process's random states, and under DeepSpeed and
                            FSDP2 their own parts of model and optimizer
        run.json            TrainState
        manifest.json       what the numbers depend on; size and hash of every file: the last file to be written

Loading runs no code that is in a file, except under DeepSpeed, whose parts are pickles: there the hashes say that nothing was
damaged, and whoever could write to the folder must be trusted.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from runtime.launch import UserError

TRAINING_CONFIG = "training_config.json"  # beside the weights: what evaluate.py needs to give the numbers of training again
MANIFEST = "manifest.json"


def save_checkpoint(accelerator: Accelerator, model, state, folder: Path, total_limit: int):
    """Write checkpoints/step_... to `folder`, then remove all but the newest `total_limit` (0: none).

    Every process must call it, with no losses left in state.window. A process that is killed, or a disk that is full, at any
    moment of it leaves the checkpoints that were there before; only one of this same step, which is replaced, may be lost to a
    kill between two renames. Raises UserError.
    """
    checkpoint = folder / f"step_{state.step:08d}"
    unfinished = folder / f".{checkpoint.name}-unfinished"
    try:
        if accelerator.is_main_process:
            for left in folder.glob(".*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write_model(accelerator, model, unfinished, state.training_config)
        # The weights stand beside it already, where accelerate would write them itself.
        hook = accelerator.register_save_state_pre_hook(
            lambda models, weights, path: weights.clear()
        )
        accelerator.save_state(str(unfinished / "training_state"))
        hook.remove()
        if accelerator.is_main_process:
            (unfinished / "run.json").write_text(json.dumps(state.to_save()), encoding="utf-8")
        accelerator.wait_for_everyone()
        files = {}
        for part in gather_object([describe_files(accelerator, unfinished)]):
            files |= part
        if accelerator.is_main_process:
            manifest = {"depends_on": state.depends_on, "versions": state.versions, "files": files}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (
                unfinished / MANIFEST,
                *(path for path in unfinished.glob("**") if path.is_dir()),
            ):
                flush(path)
            if (
                checkpoint.exists()
            ):  # damaged, and so passed over; or saved before its evaluation was done
                remove(checkpoint)
            os.rename(unfinished, checkpoint)
            flush(folder)
            for old in (
                sorted(folder.glob("step_*"), reverse=True)[total_limit:] if total_limit else []
            ):
                remove(old)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "file" not in str(
            error
        ):  # torch raises one for a disk that is full
            raise
        whole = sorted(path.name for path in folder.glob("step_*"))
        raise UserError(
            f"the checkpoint of update {state.step} could not be written to {folder}: {str(error).splitlines()[0]}. "
            f"Safe: {', '.join(whole) or 'none before it'}. Mend this, and the same command goes on from there"
        ) from None


def describe_files(accelerator, folder):
    """{name: [bytes, hash]} of this process's share of the files, flushed to the disk and read again."""
    share = checkpoint_files(folder)[accelerator.process_index :: accelerator.num_processes]
    for name in share:
        flush(folder / name)
    return {name: describe_file(folder / name) for name in share}


def checkpoint_files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.glob("**/*")
        if path.is_file() and path.name != MANIFEST
    )


def describe_file(path):
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()]


def flush(path):
    # Until then a file, or a name in a folder, may be in memory only, and a machine that loses power loses it.
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(checkpoint):
    # Renamed first: half of it may be gone when the process is killed, and half a checkpoint must not look like one.
    removed = checkpoint.with_name(f".{checkpoint.name}-removed")
    os.rename(checkpoint, removed)
    shutil.rmtree(removed)


def newest_checkpoint(accelerator: Accelerator, folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Says which are damaged. Every process must call it."""
    for checkpoint in sorted(folder.glob("step_*"), reverse=True):
        problem = check_checkpoint(accelerator, checkpoint)
        if problem is None:
            return checkpoint
        accelerator.print(f"{checkpoint} is damaged, so it is passed over: {problem}")
    return None


def check_checkpoint(accelerator: Accelerator, checkpoint: Path) -> str | None:
    """What is wrong with it, or None. Every process must call it: each checks its share of the files."""
    try:
        described = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = checkpoint_files(checkpoint)
        problem = next((f"{name} is missing" for name in described if name not in files), None)
        for name in list(described)[accelerator.process_index :: accelerator.num_processes]:
            if problem is None and describe_file(checkpoint / name) != described[name]:
                problem = f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{MANIFEST}: {error}"
    return next((found for found in gather_object([problem]) if found is not None), None)


def read_checkpoint(checkpoint):
    """(manifest.json, run.json) of a checkpoint that was checked."""
    return [
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for name in (MANIFEST, "run.json")
    ]


def load_training_state(accelerator: Accelerator, checkpoint: Path):
    """Optimizer and random states into what `accelerator` has prepared. Every process must call it.

    The model must have been built from `checkpoint` already; under DeepSpeed and FSDP2 its weights are loaded again, in parts.
    Raises UserError for a file with something else than numbers in it, of which nothing is run (DeepSpeed's are not looked at).
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
    accelerator.step = (
        0  # of micro-batches, only ever used modulo the accumulation, which may be another one now
    )


def save_model(accelerator: Accelerator, model, folder: Path, training_config: dict):
    """Write config.json, model.safetensors and training_config.json to `folder`. Every process must call it.

    It is written beside and renamed when whole. Over an older model the files are replaced one by one, the weights last: config
    and preprocessing do not change in a run, so at any moment the folder is a whole model, the old one or the new one.
    """
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_model(accelerator, model, unfinished, training_config)
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


def write_model(accelerator, model, folder, training_config):
    # Every process takes part: under ZeRO-3 and FSDP each holds a part of the weights.
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        (folder / TRAINING_CONFIG).write_text(
            json.dumps(training_config, indent=2), encoding="utf-8"
        )
