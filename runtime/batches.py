"""The order of the rows, global batches, padding. And the contract of a task, which is this:

N rows, M items, B batch, C candidates. train.py, evaluate.py and runtime/ hold for any task that
keeps what stands here.

A data set has
    len(dataset)        M items. In training and in the shared evaluation an item is a row.
    __getitems__(keys)  a whole batch, of Keys: what `index_and_weight` makes of them, and whatever
                        the model's `forward` takes.
    item_weights        float64 (M,), above 0: how much an item counts in a mean. Ones, or its
                        number of tokens.
    labels              (N, ...), the label_ids of compute_metrics.
    positions           int64 (N,), where the rows stand in pandas.read_csv of the file.
    groups              [(range of items, batch sizes in a batch)]: which may share a batch.
    name_item(i), name_row(i)  what messages call them: a file and a row.
    path, counts        its CSV, and {what became of the rows: how many}, for log and screen.
In an evaluation on a DataLoader of its own an item is what goes through the model once: an image
of several rows, or a prompt. Its data set also has
    score(outputs, rows)  {name: (M, ...)}, what `forward` returned, to the predictions of a slice
                        of the rows, (n, C): scores padded with -inf, or whole numbers.

A model has forward(**batch). It returns a dict of tensors, whose first axis is the items. For
training and the shared evaluation it has `losses`, float32 (B,): of each item the mean over what
its weight counts. The others may have any shape. Where widths differ between batches they are
padded: floats with -inf, whole numbers with -100. Its save_pretrained(folder, state_dict=...)
writes all that load_model needs: a tokenizer too.

compute_metrics(EvalPrediction) returns {name: number}, as for Trainer. `predictions` is what
`forward` returned besides `losses`, one array or a tuple, or what `score` made of it.
`label_ids` is `labels`, and `inputs` is `positions`: `frame.iloc[prediction.inputs]` are the rows.
It runs on every process, on the same arrays, and writes no file.
"""

import itertools
import math
import pickle
import signal
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from accelerate import skip_first_batches
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Sampler, get_worker_info

from runtime.launch import UserError, ask_to_stop, leave_signals_to_the_main_process


class Key(NamedTuple):
    """What a sampler asks of a data set. A weight of 0 is padding: the row makes a batch full and
    counts for nothing.
    """

    index: int
    epoch: int = 0
    weight: float = 1.0


def index_and_weight(keys: list[Key]) -> dict[str, torch.Tensor]:
    """Of a batch: `index` int64 (B,), -1 for padding, and `weight` float32 (B,)."""
    index = torch.tensor([key.index if key.weight > 0 else -1 for key in keys])
    return {"index": index, "weight": torch.tensor([key.weight for key in keys])}


NEEDED = "__len__ __getitems__ item_weights labels positions groups name_item name_row path counts"


def check_datasets(accelerator, datasets: list) -> list:
    """The data sets, if they keep the contract; prints their counts. Raises UserError."""
    for dataset in datasets:
        problems = [f"no {name}" for name in NEEDED.split() if not hasattr(dataset, name)]
        if not problems:
            weights = np.asarray(dataset.item_weights, dtype=np.float64)
            if weights.shape != (len(dataset),) or not ((weights > 0) & (weights < math.inf)).all():
                problems += [f"item_weights must be {len(dataset)} numbers above 0"]
            batch = dataset.__getitems__([Key(0)])
            given = batch if isinstance(batch, Mapping) else {}
            problems += [f"no {n} from __getitems__" for n in ("index", "weight") if n not in given]
        if problems:
            raise UserError(
                f"{type(dataset).__name__} of {getattr(dataset, 'path', 'no path')} breaks the "
                f"contract of a data set in runtime/batches.py: {', '.join(problems)}"
            )
        counts = (f"{number} {name.replace('_', ' ')}" for name, number in dataset.counts.items())
        accelerator.print(f"{dataset.path}: {', '.join(counts)}")
    return datasets


def make_train_dataloader(accelerator, dataset, state, config) -> DataLoader:
    """One for the whole run: its sampler knows epochs, and workers start once."""
    sampler = TrainSampler(
        dataset.item_weights, state.global_batch_size, state.num_updates, config.seed, state.step
    )
    batch_size = config.per_device_train_batch_size
    return make_dataloader(accelerator, dataset, config, sampler=sampler, batch_size=batch_size)


def make_dataloader(accelerator, dataset, config, **sampling) -> DataLoader:
    """A DataLoader over a data set of the contract. sampling: its sampler, or its batches."""
    return DataLoader(
        dataset,
        collate_fn=whole,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        # Else iterating draws from the random state that dropout uses, and a resumed run differs.
        generator=torch.Generator(),
        pin_memory=accelerator.device.type == "cuda",
        **sampling,
    )


def batches_of(dataloader: DataLoader):
    """Its batches. Where a worker is killed, the run ends after this update, which is saved.

    Until then new workers make the batches, so that no process waits for another one's.
    """
    done, batches = 0, iter(dataloader)
    try:
        while (batch := fetch(batches)) is not None:
            yield batch
            done += 1
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        print(
            f"{str(error).splitlines()[-1]} Out of memory? The run is saved, and ends", flush=True
        )
        ask_to_stop()
        yield from skip_first_batches(dataloader, done)


def fetch(batches):
    """The next batch, or None."""
    # When a worker dies, torch raises wherever its process is, in the middle of an update too. Here
    # it must: a worker may have sent half a batch, and the process would wait for the other half.
    signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
    try:
        _error_if_any_worker_fails()
        return next(batches, None)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def whole(batch):
    """The collate_fn: `__getitems__` makes a whole batch already."""
    return batch if get_worker_info() is None else AsBytes(batch)


class AsBytes:
    """How a worker sends a batch, which arrives as it was. torch alone would send its tensors
    through shared memory. Containers have 64 MB of that, and runs hang where it is full.
    """

    def __init__(self, batch):
        self.batch = batch

    def __reduce__(self):
        return pickle.loads, (pickle.dumps(self.batch),)


class TrainSampler(Sampler):
    """The Keys of training: a function of the seed and the update alone, whatever the launch.

    An epoch is one permutation of the items. It is cut into global batches of G. An item weighs G x
    w / (the sum of w over its global batch), so a plain mean over G is the mean by weight. The last
    batch of an epoch is padded to G.
    """

    def __init__(self, item_weights, global_batch_size, num_updates, seed, first_update=0):
        """item_weights: float64 (M,), above 0. first_update: how many updates are done already."""
        self.item_weights, self.global_batch_size = np.asarray(item_weights), global_batch_size
        self.num_updates, self.seed, self.first_update = num_updates, seed, first_update

    def __len__(self):
        return (self.num_updates - self.first_update) * self.global_batch_size

    def __iter__(self):
        per_epoch = updates_per_epoch(len(self.item_weights), self.global_batch_size)
        epoch, done = divmod(self.first_update, per_epoch)
        start = done * self.global_batch_size
        return itertools.islice(self.endless(epoch), start, start + len(self))

    def endless(self, first_epoch):
        size = self.global_batch_size
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.item_weights))
            for start in range(0, len(order), size):
                items = order[start : start + size]
                weights = self.item_weights[items]
                weights = size * weights / weights.sum()
                yield from map(Key, items.tolist(), itertools.repeat(epoch), weights.tolist())
                yield from [Key(int(items[0]), epoch, 0.0)] * (size - len(items))


def updates_per_epoch(num_items: int, global_batch_size: int) -> int:
    return math.ceil(num_items / global_batch_size)


class Batches(Sampler):
    """Lists of Keys, made as they are asked for: an item of millions would take 100 bytes."""

    def __init__(self, spans):
        # Of each batch: its items (range), the one that pads it, its length with padding, a weight.
        self.spans = spans

    def __len__(self):
        return len(self.spans)

    def __iter__(self):
        for items, padding, length, weight in self.spans:
            keys = [Key(item, weight=weight) for item in items]
            yield keys + [Key(padding, weight=0.0)] * (length - len(keys))


def evaluation_batches(groups: list[tuple[range, int]], batch_size: int, num_processes: int):
    """The Batches of an evaluation, as many for each process. groups: as in the contract.

    Batches are cut before they are dealt, and padded to whole batch sizes, none larger than its
    group. The last bits of an output can depend on the shape of its batch, so the same weights give
    the same bits on any number of processes, if these have as many threads: some attention kernels
    depend on that.
    """
    spans = []
    for items, multiple in groups:
        size = min(batch_size, len(items))
        for start in range(0, len(items), multiple * size):
            part = items[start : start + multiple * size]
            spans.append((part, items[0], size * math.ceil(len(part) / size), 1.0))
    # A process with a batch less than others gets one of padding, of a shape that is there already.
    padding = (*spans[-1][:3], 0.0)
    return Batches(spans + [padding] * (-len(spans) % num_processes))
