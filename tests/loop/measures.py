"""What is measured of a recorded run: by itself, and against the run of one process."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import column, read_log
from safetensors.torch import load_file

# What is measured of a run, and how large it may be. Counts are of what is not as it should be.
BOUNDS = {
    # Forwards in the wrong mode, or around the wrapper.
    "forwards": 0,
    # Training items that an epoch did not see exactly once, and those of other updates than on one
    # process. Items that an evaluation did not see exactly once.
    "rows": 0,
    "rows of an update": 0,
    "items": 0,
    # The logged loss and the mean over the recorded losses, by weight: relative. float32 has 6e-8.
    "logged loss": 1e-6,
    "logged evaluation loss": 1e-6,
    # Processes that hold other weights, or that computed metrics of other arrays, than the first.
    "replicas": 0,
    "arrays": 0,
    # The gradient and the mean over its items' gradients: their distance, relative. A batch of one
    # takes other code paths than one of twelve, with other rounding.
    "gradient": 1e-4,
    # From here on against one process. Of a row and of an update: relative.
    "loss": 1e-5,
    "grad_norm": 1e-4,
    "learning_rate": 0,
    # The distance of the two ends, as a share of the way from the beginning. AdamW makes full steps
    # of a gradient that is only rounding.
    "weights": 0.01,
    # Arrays and metrics of the untrained model that are not equal to the bit.
    "first evaluation": 0,
}


class Run:
    """What a run left: its log, its record of each process, its last checkpoint."""

    def __init__(self, folder, name, processes, accumulation=1, first_update=0):
        self.output, self.processes, self.accumulation = folder / name, processes, accumulation
        self.first_update = first_update
        self.records = [
            torch.load(folder / f"{name}.{rank}.pt", weights_only=False)
            for rank in range(processes)
        ]
        self.error = self.records[0]["error"]
        self.first, self.lines = read_log(self.output)
        self.checkpoint = max((self.output / "checkpoints").glob("step_*"), default=None)
        self.training = [
            [forward for forward in record["forwards"] if forward["evaluation"] is None]
            for record in self.records
        ]
        number = next((forward["dataset"] for forward in self.training[0]), None)
        self.weights = self.records[0]["items"][number]["weights"] if number is not None else []
        self.names = self.records[0]["items"][number]["names"] if number is not None else []

    def rows_of(self, update):
        """[(epoch, item, loss)] of an update, of all processes, without padding."""
        start = (update - self.first_update) * self.accumulation
        return sorted(
            (forward["epoch"], item, loss)
            for training in self.training
            for forward in training[start : start + self.accumulation]
            for item, loss in zip(forward["index"], forward["losses"], strict=True)
            if item >= 0
        )

    @property
    def updates(self):
        return range(self.first_update, max(line["step"] for line in self.lines))

    def evaluations(self):
        """{(name, step): [(item, loss or None, data set)] of all processes, without padding}."""
        found = {}
        for record in self.records:
            for forward in record["forwards"]:
                if forward["evaluation"] is not None:
                    losses = forward["losses"] or [None] * len(forward["index"])
                    found.setdefault(forward["evaluation"], []).extend(
                        (item, loss, forward["dataset"])
                        for item, loss in zip(forward["index"], losses, strict=True)
                        if item >= 0
                    )
        return found


def first_or_worst(found, bound):
    """Of [(amount, where)] the first beyond the bound, or the largest. A NaN is beyond any."""
    beyond = [each for each in found if not each[0] <= bound]
    return beyond[0] if beyond else max(found, key=lambda each: each[0], default=(0, ""))


def relative(ours, theirs):
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


def weighted_mean(weights, losses):
    total = math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return total / math.fsum(weights) if weights else math.nan


def measure(run, one=None):
    """{what: (how much, where)}, of a run by itself and against one process."""
    steps = {line["step"]: line for line in run.lines}
    found = {"forwards": wrong_forwards(run), "rows": rows_not_once(run)}
    found["logged loss"] = [
        (relative(steps[update + 1]["train/loss"], mean_loss(run, update)), f"update {update + 1}")
        for update in run.updates
    ]
    found["items"], found["logged evaluation loss"] = [], []
    for (name, step), items in run.evaluations().items():
        known = run.records[0]["items"][items[0][2]]
        times = Counter(item for item, _, _ in items)
        wrong = sum(times[item] != 1 for item in range(len(known["weights"])))
        found["items"].append((wrong, f"{name} at {step}"))
        if items[0][1] is not None and f"{name}/loss" in steps[step]:
            weights = [known["weights"][item] for item, _, _ in items]
            mean = weighted_mean(weights, [loss for _, loss, _ in items])
            amount = relative(steps[step][f"{name}/loss"], mean)
            found["logged evaluation loss"].append((amount, f"{name} at {step}"))
    found["arrays"] = [
        (different_arrays(*pair), f"process {rank}")
        for rank in range(run.processes)
        for pair in zip(predictions(run, rank), predictions(run, 0), strict=True)
    ]
    recorded = [record["updates"] for record in run.records]
    found["replicas"], found["gradient"] = [], []
    for update, of_processes in zip(run.updates, zip(*recorded, strict=True), strict=False):
        total = sum(each["weight"] for each in of_processes)
        if total == 0:  # nothing but padding
            continue
        mean = sum(each["sum"] for each in of_processes) / total
        for rank, each in enumerate(of_processes):
            where = f"update {update + 1}, process {rank}"
            distance = (each["gradient"] - mean).norm() / mean.norm()
            found["gradient"].append((distance.item(), where))
            same = each["weights"].equal(of_processes[0]["weights"])
            found["replicas"].append((int(not same), where))
    if one is not None:
        found |= compare(run, one)
    return {what: first_or_worst(amounts, BOUNDS[what]) for what, amounts in found.items()}


def wrong_forwards(run):
    found = []
    for rank, record in enumerate(run.records):
        updates = 0
        for forward in record["forwards"]:
            trains = forward["evaluation"] is None
            right = forward["training"] == forward["gradient"] == trains
            right = right and forward["wrapped"] == (run.processes > 1)
            updates += trains
            update = 1 + run.first_update + (updates - 1) // run.accumulation
            where = f"update {update}" if trains else "{} at {}".format(*forward["evaluation"])
            found.append((int(not right), f"{where}, process {rank}"))
    return found


def rows_not_once(run):
    """Of each epoch that the run saw whole; in the others none may be there twice."""
    rows = [row for update in run.updates for row in run.rows_of(update)]
    epochs = sorted({epoch for epoch, _, _ in rows})
    found = []
    for epoch in epochs:
        times = Counter(item for each, item, _ in rows if each == epoch)
        begun = run.first_update == 0 or epoch > epochs[0]  # seen from its first row on
        allowed = {1} if begun and epoch < epochs[-1] else {0, 1}
        wrong = sum(times[item] not in allowed for item in range(len(run.weights)))
        found.append((wrong, f"epoch {epoch}"))
    return found


def mean_loss(run, update):
    rows = run.rows_of(update)
    return weighted_mean([run.weights[item] for _, item, _ in rows], [loss for *_, loss in rows])


def predictions(run, rank=0):
    """[(name, step, arrays)] of the evaluations of a process."""
    return run.records[rank]["predictions"]


def different_arrays(ours, theirs):
    same = ours[0] == theirs[0] and len(ours[2]) == len(theirs[2])
    pairs = zip(ours[2], theirs[2], strict=True) if same else []
    return sum(not np.array_equal(a, b) or a.dtype != b.dtype for a, b in pairs) + (not same)


def compare(run, one):
    found = {"rows of an update": [], "loss": []}
    for update in run.updates:
        ours, theirs = run.rows_of(update), one.rows_of(update)
        same = [row[:2] for row in ours] == [row[:2] for row in theirs]
        found["rows of an update"].append((int(not same), f"update {update + 1}"))
        if same:
            found["loss"] += [
                (relative(a[2], b[2]), f"update {update + 1}")
                for a, b in zip(ours, theirs, strict=True)
            ]
    for name in ("grad_norm", "learning_rate"):
        ours, theirs = (column(each.lines, f"train/{name}") for each in (run, one))
        found[name] = [(relative(ours[s], theirs[s]), f"update {s}") for s in ours]
    start = load_file(Path(run.first["config"]["model_name_or_path"], "model.safetensors"))
    ours, end = (load_file(each.checkpoint / "model.safetensors") for each in (run, one))
    found["weights"] = [(distance(ours, end) / distance(start, end), "the end")]
    if run.first_update == 0:
        names = [name for name in one.lines[0] if not name.startswith("train/")]
        found["first evaluation"] = [
            (int(run.lines[0].get(name) != one.lines[0][name]), name) for name in names
        ] + [
            (different_arrays(a, b), f"{a[0]} at {a[1]}")
            for a, b in zip(predictions(run), predictions(one), strict=False)
            if a[1] == 0
        ]
    return found


def distance(weights, others):
    assert weights.keys() == others.keys()
    return math.sqrt(
        sum((weights[name].double() - others[name]).square().sum().item() for name in others)
    )


def beyond_bounds(found):
    return {what: value for what, value in found.items() if not value[0] <= BOUNDS[what]}
