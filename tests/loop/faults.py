"""Faults that a loop can have and that its log does not show, each planted for one run.

Each is a function of the recorder that gives a context manager. What they patch are names of
train.py, evaluate.py and runtime/, so they can be planted in any task.
"""

import contextlib
import itertools
import math
import os
from unittest import mock

import torch
from accelerate import Accelerator
from torch.nn.modules.module import register_module_forward_hook

import evaluate
import train
from runtime import batches
from runtime.evaluation import gather


def planted(place, name):
    """A fault that stands for the function `name` of `place`, which it takes as the first."""

    def plant(function):
        original = getattr(place, name)

        def faulty(*arguments, **options):
            return function(original, *arguments, **options)

        return lambda recorder: mock.patch.object(place, name, faulty)

    return plant


@planted(Accelerator, "prepare")
def unprepared(prepare, accelerator, model, optimizer, dataloader):
    # As many updates as asked for, each process with the whole stream.
    length = len(dataloader) // accelerator.num_processes
    return *prepare(accelerator, model, optimizer), itertools.islice(dataloader, length)


@planted(train, "train_step")
def around_the_wrapper(train_step, accelerator, model, batch):
    return train_step(accelerator, accelerator.unwrap_model(model), batch)


@planted(train, "train_step")
def mean_of_batch_means(train_step, accelerator, model, batch):
    index, weight = batch.pop("index"), batch.pop("weight")
    losses = model(**batch)["losses"]
    accelerator.backward((losses * (index >= 0)).sum() / (index >= 0).sum().clamp(min=1))
    return index, weight, losses.detach()


@planted(Accelerator, "backward")
def divided_twice(backward, accelerator, loss):
    backward(accelerator, loss / accelerator.gradient_accumulation_steps)


@planted(evaluate, "predict")
def mean_of_batch_means_in_evaluation(predict, accelerator, model, dataloader, dataset):
    def repeated_mean(**batch):
        outputs = model(**batch)
        if "losses" in outputs:
            outputs["losses"] = outputs["losses"].mean().repeat(len(outputs["losses"]))
        return outputs

    return predict(accelerator, repeated_mean, dataloader, dataset)


@planted(evaluate, "gather_items")
def positional_join(gather_items, accelerator, indices, outputs, dataset):
    return {name: gather(accelerator, values)[: len(dataset)] for name, values in outputs.items()}


@planted(train, "learning_rate_at")
def once_per_process(learning_rate_at, step, num_updates, config):
    return learning_rate_at(step * int(os.environ["WORLD_SIZE"]), num_updates, config)


@planted(batches.TrainSampler, "__init__")
def reshuffled(init, sampler, item_weights, size, num_updates, seed, first_update=0):
    init(sampler, item_weights, size, num_updates, seed + (first_update > 0), first_update)


@planted(evaluate, "evaluation_mode")
@contextlib.contextmanager
def left_in_evaluation_mode(evaluation_mode, model):
    model.eval()
    with torch.no_grad():
        yield


@contextlib.contextmanager
def changed_outputs(change, recorder):
    """change(keys, outputs) does something to what the model returned for these keys."""

    def hook(module, arguments, options, outputs):
        found = recorder.keys_of([*arguments, *options.values()])
        if found is not None and module is recorder.inner and isinstance(outputs, dict):
            change(found[1], outputs, recorder.evaluation)

    handle = register_module_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def broken_loss(recorder):
    """The loss of item 7 is not a number from the second time on that training meets it."""

    def change(keys, outputs, evaluation):
        if evaluation is None and keys[0].epoch == 1:
            broken = torch.tensor([key.index == 7 and key.weight > 0 for key in keys])
            outputs["losses"] = outputs["losses"].masked_fill(broken, math.nan)

    return changed_outputs(change, recorder)


def broken_evaluation(recorder):
    def change(keys, outputs, evaluation):
        if evaluation is not None and "losses" in outputs:
            broken = torch.tensor([key.index == 7 and key.weight > 0 for key in keys])
            outputs["losses"] = outputs["losses"].masked_fill(broken, math.inf)

    return changed_outputs(change, recorder)


def uneven_widths(recorder):
    """Another output, as wide as the batch's first item says: each row has its own number in it."""

    def change(keys, outputs, evaluation):
        width = 1 + keys[0].index % 3
        items = torch.tensor([key.index for key in keys])
        outputs["uneven"] = items[:, None].repeat(1, width)

    recorder.adds_output = True
    return changed_outputs(change, recorder)


FAULTS = {
    "none": lambda recorder: contextlib.nullcontext(),
    "a DataLoader that is not prepared": unprepared,
    "a forward around the wrapper": around_the_wrapper,
    "a mean of batch means": mean_of_batch_means,
    "a gradient divided twice by the accumulation": divided_twice,
    "a mean of batch means in the evaluation": mean_of_batch_means_in_evaluation,
    "a positional join after the gather": positional_join,
    "a schedule stepped once per process": once_per_process,
    "rows reshuffled on resume": reshuffled,
    "a model left in evaluation mode": left_in_evaluation_mode,
    # Not faults of a loop: what it must say in one line, and what it must take.
    "a loss that is not finite": broken_loss,
    "an evaluation that is not finite": broken_evaluation,
    "outputs of uneven width": uneven_widths,
}
