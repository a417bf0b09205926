"""train.py and evaluate.py with a record of what torch saw: one run or several, in one launch.

RUNS: a JSON list of {"name", "program", "arguments", "fault"}. FOLDER: process R writes the record
of a run to FOLDER/{name}.{R}.pt. Nothing here knows the task: the hooks are torch's, and what is
asked of a data set is the contract in runtime/batches.py.
"""

import functools
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults import FAULTS
from fsdp2_on_cpu import fsdp2_on_cpu

import evaluate
import train
from runtime import launch
from runtime.batches import Key

WRAPPERS = ("DistributedDataParallel", "DeepSpeedEngine", "OptimizedModule")


class Recorder:
    """What a process saw of one run."""

    def __init__(self, gradients):
        self.gradients = gradients  # whether each item's gradient is computed again
        self.made = defaultdict(list)  # {hash of a batch: [(data set, keys)]}, not yet used
        self.datasets = {}  # {id of a data set: (its number, the data set)}, in order of use
        self.stack, self.inner, self.paused = [], None, False
        self.evaluation, self.since = None, []  # since: training batches since the last update
        self.forwards, self.predictions, self.updates = [], [], []
        self.adds_output, self.error = False, None

    def contents(self):
        items = {
            number: {
                "weights": [float(weight) for weight in dataset.item_weights],
                "names": [dataset.name_item(item) for item in range(len(dataset))],
            }
            for number, dataset in self.datasets.values()
        }
        names = ("forwards", "predictions", "updates", "error")
        return {name: getattr(self, name) for name in names} | {"items": items}

    def make_batch(self, dataset, keys):
        """Stands for dataset.__getitems__: remembers which keys a batch was made of."""
        batch = type(dataset).__getitems__(dataset, keys)
        values = [value for name, value in batch.items() if name not in ("index", "weight")]
        self.made[digest(values)].append((dataset, keys))
        return batch

    def keys_of(self, values):
        """(data set, keys) of what a module was called with, or None."""
        return next(iter(self.made.get(digest(values), [])), None)

    def before_forward(self, module, arguments):
        if not self.paused:
            if all(type(outer).__name__ in WRAPPERS for outer in self.stack):
                self.inner = module  # the model itself, once the wrappers are behind
            self.stack.append(module)

    def after_forward(self, module, arguments, options, outputs):
        if self.paused:
            return
        self.stack.pop()
        if self.stack:
            return
        found = self.keys_of([*arguments, *options.values()])
        if found is None:
            return
        self.made[digest([*arguments, *options.values()])].pop(0)
        dataset, keys = found
        number, _ = self.datasets.setdefault(id(dataset), (len(self.datasets), dataset))
        losses = outputs.get("losses") if isinstance(outputs, dict) else None
        classes = [each.__name__ for each in type(module).__mro__]
        self.forwards.append(
            {
                "dataset": number,
                "evaluation": self.evaluation,
                "index": [key.index if key.weight else -1 for key in keys],
                "epoch": keys[0].epoch,
                "training": module.training and self.inner.training,
                "gradient": torch.is_grad_enabled(),
                "wrapped": bool({*WRAPPERS, "FSDPModule"} & set(classes)),
                "losses": None if losses is None else losses.detach().float().tolist(),
            }
        )
        if self.evaluation is None:
            self.since.append(found)

    def before_update(self, optimizer, *_):
        """The gradient as it is, and what it should be: of each item alone, by its weight."""
        since, self.since = self.since, []
        if not self.gradients:
            return
        groups = optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        total, weight = 0.0, 0.0
        self.paused = True
        with torch.random.fork_rng():
            for dataset, keys in since:
                for key in keys:
                    if key.weight:
                        item_weight = float(dataset.item_weights[key.index])
                        gradient = item_gradient(self.inner, dataset, key, parameters)
                        total, weight = total + item_weight * gradient, weight + item_weight
        self.paused = False
        self.updates.append(
            {
                "rate": groups[0]["lr"],
                "gradient": flat(parameter.grad for parameter in parameters),
                "weights": flat(parameters),
                "sum": total,
                "weight": weight,
            }
        )


def digest(values):
    """Of the tensors among `values`: devices and wrappers may copy them, and give other names."""
    tensors = [value.contiguous().cpu() for value in values if torch.is_tensor(value)]
    hashes = [
        hash((v.dtype, v.shape, v.view(-1).view(torch.uint8).numpy().tobytes())) for v in tensors
    ]
    return tuple(sorted(hashes))


def item_gradient(model, dataset, key, parameters):
    batch = type(dataset).__getitems__(dataset, [Key(key.index, key.epoch)])
    batch = {name: values for name, values in batch.items() if name not in ("index", "weight")}
    loss = model(**batch)["losses"][0]
    # Not backward: it would add to the gradients that the optimizer is about to use.
    return flat(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def watch(recorder):
    """Hooks that stay for one run: {a function that takes them away}."""
    init, make_prediction = DataLoader.__init__, evaluate.make_prediction
    run_evaluation = evaluate.run_evaluation

    def watched_init(self, dataset, *arguments, **options):
        if hasattr(dataset, "item_weights"):
            dataset.__getitems__ = functools.partial(recorder.make_batch, dataset)
        init(self, dataset, *arguments, **options)

    def watched_evaluation(accelerator, model, name, evaluation, config, step=None):
        recorder.evaluation = (name, step)
        values = run_evaluation(accelerator, model, name, evaluation, config, step)
        recorder.evaluation = None
        return values

    def watched_prediction(predictions, dataset):
        prediction = make_prediction(predictions, dataset)
        arrays = prediction.predictions
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        recorder.predictions.append(
            (*recorder.evaluation, [*arrays, prediction.label_ids, prediction.inputs])
        )
        if recorder.adds_output and len(arrays) > 1:  # which compute_metrics does not expect
            prediction.predictions = arrays[0] if len(arrays) == 2 else arrays[:-1]
        return prediction

    DataLoader.__init__ = watched_init
    evaluate.run_evaluation, evaluate.make_prediction = watched_evaluation, watched_prediction
    handles = [
        register_module_forward_pre_hook(recorder.before_forward),
        register_module_forward_hook(recorder.after_forward, with_kwargs=True),
        register_optimizer_step_pre_hook(recorder.before_update),
    ]

    def stop():
        DataLoader.__init__ = init
        evaluate.run_evaluation, evaluate.make_prediction = run_evaluation, make_prediction
        for handle in handles:
            handle.remove()

    return stop


class OneLaunch:
    """One Accelerator for several runs: a process can join its group once only."""

    def __init__(self):
        self.make, self.finish, self.accelerator = launch.make_accelerator, launch.finish, None
        launch.make_accelerator = self.make_accelerator
        launch.finish = lambda accelerator: accelerator.wait_for_everyone()

    def make_accelerator(self, gradient_accumulation_steps=1, log_with=(), **options):
        if self.accelerator is None:
            self.accelerator = self.make(
                gradient_accumulation_steps=gradient_accumulation_steps, log_with=[], **options
            )
        self.accelerator.gradient_accumulation_steps = gradient_accumulation_steps
        self.accelerator.log_with = list(log_with)
        self.accelerator.trackers = []
        return self.accelerator


def main():
    one_launch = OneLaunch()
    folder, rank = Path(os.environ["FOLDER"]), os.environ.get("RANK", "0")
    for run in json.loads(os.environ["RUNS"]):
        sys.argv = [run["program"], *run["arguments"]]
        recorder = Recorder(gradients=run.get("gradients", False))
        stop_watching = watch(recorder)
        try:
            with FAULTS[run.get("fault", "none")](recorder):
                {"train.py": train, "evaluate.py": evaluate}[run["program"]].main()
        except SystemExit as ended:
            assert not ended.code
        except (launch.UserError, RuntimeError) as error:
            if "fault" not in run:
                raise
            recorder.error = str(error)
        finally:
            stop_watching()
        torch.save(recorder.contents(), folder / f"{run['name']}.{rank}.pt")
        one_launch.accelerator.free_memory()
        one_launch.accelerator.print(f"--- {run['name']} ends here")
    one_launch.finish(one_launch.accelerator)


if __name__ == "__main__":
    fsdp2_on_cpu()
    with launch.errors_in_one_line():
        main()
