"""Saving models: each folder is whole or absent, a plain `save_pretrained` folder whatever the strategy."""

import json
import os
import shutil

TRAINING_CONFIG = "training_config.json"  # beside the weights: what evaluate.py needs to give the numbers of training again


def save_model(accelerator, model, folder, training_config):
    """Write config.json, model.safetensors and training_config.json to `folder`. Every process must call it.

    It is written beside and renamed when whole. Over an older model the files are replaced one by one, the weights last: config
    and preprocessing do not change in a run, so at any moment the folder is a whole model, the old one or the new one.
    """
    # Every process takes part: under ZeRO-3 and FSDP each holds a part of the weights.
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unfinished = folder.with_name(f".{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(unfinished, state_dict=state_dict)
        (unfinished / TRAINING_CONFIG).write_text(json.dumps(training_config, indent=2), encoding="utf-8")
        if folder.exists():
            for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                os.replace(file, folder / file.name)
            unfinished.rmdir()
        else:
            os.rename(unfinished, folder)
    accelerator.wait_for_everyone()
