"""train.train with faults put in on purpose, one run for each in one launch: what one would not see in the log.

FAULTS: a JSON list of their names. FOLDER: each run's record and output go to FOLDER/name.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from unittest import mock

import recorded_run
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import train
from data import read_datasets
from metrics import compute_metrics
from runtime.launch import errors_in_one_line, finish, make_accelerator
from runtime.tracking import JsonlTracker


def main():
    config = train.read_config(sys.argv[1:])
    accelerator = make_accelerator(max_grad_norm=config.max_grad_norm)
    datasets = read_datasets(config, train.load_model(None), ("train", "eval", "test_vocabulary"))
    for fault in json.loads(os.environ["FAULTS"]):
        folder = Path(os.environ["FOLDER"], fault)
        os.environ["RECORD"] = str(folder)
        for values in recorded_run.record.values():
            values.clear()
        faulty = dataclasses.replace(config, output_dir=str(folder / "output"))
        train.make_output_dir(accelerator, faulty)
        accelerator.trackers = [JsonlTracker(folder / "output" / "log.jsonl")]
        if accelerator.is_main_process:
            accelerator.trackers[0].store_init_configuration({"config": dataclasses.asdict(faulty)})
        set_seed(config.seed)
        with FAULTS[fault]():
            state = train.make_state(accelerator, faulty, datasets)
            train.train(
                accelerator, faulty, train.load_model(None), state, None, *datasets, compute_metrics
            )
        accelerator.free_memory()
        recorded_run.write_record()
    finish(accelerator)


def unprepared():
    prepare = Accelerator.prepare

    def faulty_prepare(self, model, optimizer, dataloader):
        # As many updates as asked for, each process with the whole stream.
        return *prepare(self, model, optimizer), itertools.islice(
            dataloader, len(dataloader) // self.num_processes
        )

    return mock.patch.object(Accelerator, "prepare", faulty_prepare)


def around_the_wrapper():
    train_step = recorded_run.train_step

    def faulty_train_step(accelerator, model, batch):
        return train_step(accelerator, accelerator.unwrap_model(model), batch)

    return mock.patch.object(recorded_run, "train_step", faulty_train_step)


def mean_of_batch_means():
    def faulty_train_step(accelerator, model, batch):
        index, weight = batch.pop("index"), batch.pop("weight")
        losses = model(**batch)["losses"]
        accelerator.backward((losses * (weight > 0)).sum() / (weight > 0).sum().clamp(min=1))
        return index, weight, losses.detach()

    return mock.patch.object(recorded_run, "train_step", faulty_train_step)


def mean_of_batch_means_in_the_evaluation():
    predict = recorded_run.predict

    def faulty_predict(accelerator, model, dataloader, num_items):
        def repeated_mean(**batch):
            outputs = model(**batch)
            if "losses" in outputs:
                outputs["losses"] = outputs["losses"].mean().repeat(len(outputs["losses"]))
            return outputs

        return predict(accelerator, repeated_mean, dataloader, num_items)

    return mock.patch.object(recorded_run, "predict", faulty_predict)


def positional_join():
    def faulty_predict(accelerator, model, dataloader, num_items):
        batches = [
            (batch.pop("index"), batch.pop("weight", None), model(**batch)) for batch in dataloader
        ]
        columns = {
            name: torch.cat([outputs[name] for _, _, outputs in batches]) for name in batches[0][2]
        }
        padded = {
            name: accelerator.pad_across_processes(values) for name, values in columns.items()
        }
        return {name: accelerator.gather(values)[:num_items] for name, values in padded.items()}

    return mock.patch.object(recorded_run, "predict", faulty_predict)


def scheduler_once_per_process():
    learning_rate_at = train.learning_rate_at

    def faulty_learning_rate_at(step, num_updates, config):
        return learning_rate_at(step * int(os.environ["WORLD_SIZE"]), num_updates, config)

    return mock.patch.object(train, "learning_rate_at", faulty_learning_rate_at)


FAULTS = {
    "none": contextlib.nullcontext,
    "a DataLoader left unprepared": unprepared,
    "a forward that goes around the wrapper": around_the_wrapper,
    "a mean of batch means": mean_of_batch_means,
    "a mean of batch means in the evaluation": mean_of_batch_means_in_the_evaluation,
    "a positional join after the gather": positional_join,
    "a scheduler stepped once per process": scheduler_once_per_process,
}


if __name__ == "__main__":
    with errors_in_one_line():
        main()
