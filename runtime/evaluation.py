"""What evaluations do for any task: gather items in order, and check what the task returned."""

import math
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import torch
from transformers import EvalPrediction

from runtime.launch import UserError


@contextmanager
def evaluation_mode(model):
    """No dropout and no gradients inside. Afterwards the mode that the model had."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def gather_items(accelerator, indices, outputs, dataset):
    """The outputs of all items on every process, in their order: {name: (M, ...)}.

    indices: the index (B,) of each batch of this process, -1 for padding. outputs: {name: the
    values (B, ...) of each batch}. Raises RuntimeError unless each item is there exactly once.
    """
    index = gather(accelerator, indices)  # (W x the most items of a process,), -1 for padding
    places = torch.nonzero(index >= 0)[:, 0]
    index = index[places]
    times = torch.bincount(index.cpu(), minlength=len(dataset))
    wrong = torch.nonzero((times != 1) | (torch.arange(len(times)) >= len(dataset)))[:, 0].tolist()
    if wrong:
        names = [dataset.name_item(item) for item in wrong[:5] if item < len(dataset)]
        raise RuntimeError(
            f"{len(wrong)} items are missing, or are there more than once: {'; '.join(names)}. "
            "Is the DataLoader prepared?"
        )
    places = torch.empty_like(places).index_copy_(0, index, places)  # (M,), where each item is
    # One output after the other, and freed where it was, so that few are there at a time.
    return {name: gather(accelerator, outputs.pop(name))[places] for name in list(outputs)}


def score_rows(accelerator, dataset, outputs):
    """What `score` of the data set makes of the outputs, (N, ...). Each process scores a share."""
    num_rows = len(dataset.labels)
    share = math.ceil(num_rows / accelerator.num_processes)
    first = min(share * accelerator.process_index, num_rows - 1)  # else `score` might get no row
    scores = [dataset.score(outputs, slice(first, first + share))]
    return gather(accelerator, scores)[:num_rows]


def gather(accelerator, batches):
    """(B, ...) of each batch of each process to (all, ...), padded where their widths differ."""
    first = batches[0]
    if first.dtype == torch.bool:  # accelerate would make whole numbers of it where it pads
        return gather(accelerator, [values.to(torch.uint8) for values in batches]).bool()
    padding = -math.inf if first.is_floating_point() else -100 if first.dtype.is_signed else 0
    widths = [max(sizes) for sizes in zip(*(values.shape[1:] for values in batches), strict=True)]
    together = first.new_full((sum(map(len, batches)), *widths), padding)
    start = 0
    for values in batches:
        together[(slice(start, start + len(values)), *map(slice, values.shape[1:]))] = values
        start += len(values)
    del batches[:], values, first
    for axis in range(together.ndim):  # a gather needs equal sizes
        together = accelerator.pad_across_processes(together, dim=axis, pad_index=padding)
    return accelerator.gather(together)


def check_outputs(outputs, num_items: int, *needed: str):
    """What `forward` returned for a batch, if it keeps the contract. Raises UserError."""
    if not isinstance(outputs, Mapping):
        raise UserError(f"forward must return a dict of tensors, not {type(outputs).__name__}")
    for name in needed:
        if name not in outputs:
            raise UserError(f"forward must return {name!r}; it returned {', '.join(outputs)}")
    for name, values in outputs.items():
        shape = tuple(getattr(values, "shape", ()))
        if shape[:1] != (num_items,):
            raise UserError(
                f"forward returned {name!r} of shape {shape} for a batch of {num_items} items: "
                "the first axis must be the items; for a loss return `losses`, one of each item"
            )
    return outputs


def check_metrics(metrics) -> dict[str, float]:
    """What compute_metrics returned, if it keeps the contract. Raises UserError."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"compute_metrics must return a dict, not {type(metrics).__name__}")
    if "loss" in metrics:
        raise UserError("compute_metrics returned 'loss', which is the name of the mean loss")
    for name, value in metrics.items():
        numbers = (int, float, np.number, np.bool_, torch.Tensor)
        if not isinstance(value, numbers) or np.ndim(value) > 0:
            said = " ".join(repr(value).split())
            raise UserError(f"compute_metrics: {name!r} must be a number, and is {said:.80}")
    return {name: float(value) for name, value in metrics.items()}


def mean_loss(losses: torch.Tensor, dataset) -> float:
    """The mean of losses (N,) by the data set's item_weights, in float64. Raises UserError."""
    require_finite(losses, dataset, "the loss")
    losses = losses.cpu().double()
    weights = torch.tensor(dataset.item_weights, dtype=torch.float64)  # (N,)
    return ((weights * losses).sum() / weights.sum()).item()


def make_prediction(predictions, dataset) -> EvalPrediction:
    """What compute_metrics takes, of tensors (N, ...), one or several. Raises UserError."""
    arrays = []
    for values in predictions:
        if values.is_floating_point():
            padding = values == -math.inf
            require_finite(values.masked_fill(padding, 0), dataset, "a score")
            # At least float32: NumPy has no bfloat16.
            values = values.to(torch.promote_types(values.dtype, torch.float32))
        arrays.append(values.cpu().numpy())
    return EvalPrediction(
        predictions=arrays[0] if len(arrays) == 1 else tuple(arrays),
        label_ids=dataset.labels,
        inputs=dataset.positions,
    )


def require_finite(values: torch.Tensor, dataset, what: str):
    """Raise a UserError that names the rows of `values`, (N, ...), that are NaN or infinite."""
    rows = torch.nonzero(~values.isfinite().reshape(len(values), -1).all(1))[:, 0].tolist()
    if rows:
        names = "; ".join(dataset.name_row(row) for row in rows[:5])
        raise UserError(f"{what} is not finite for {len(rows)} rows: {names}")
