"""Gather outputs of each dtype on two processes, where widths differ between and within them."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from runtime.evaluation import gather_items
from runtime.launch import errors_in_one_line, finish, make_accelerator

PADDING = {
    torch.float32: -math.inf,
    torch.bfloat16: -math.inf,
    torch.int64: -100,
    torch.uint8: 0,
    torch.bool: 0,
}


class Six:
    name_item = staticmethod("item {}".format)

    def __len__(self):
        return 6


def main():
    accelerator = make_accelerator()
    # Items of two batches of each process, and the width of each batch.
    batches = [[([3, 0], 1), ([1], 2)], [([5, 4, 2], 4), ([-1], 3)]][accelerator.process_index]
    widths = {3: 1, 0: 1, 1: 2, 5: 4, 4: 4, 2: 4}
    indices = [torch.tensor(items) for items, _ in batches]
    outputs = {}
    for dtype in PADDING:
        outputs[str(dtype)] = [
            (torch.tensor(items)[:, None].expand(-1, width) + 1).to(dtype)
            for items, width in batches
        ]
    outputs["one"] = [index * 10 for index in indices]
    gathered = gather_items(accelerator, indices, outputs, Six())
    assert gathered["one"].tolist() == [0, 10, 20, 30, 40, 50]
    for dtype, padding in PADDING.items():
        values = gathered[str(dtype)]
        assert values.dtype == dtype and values.shape == (6, 4), (dtype, values)
        for item, width in widths.items():
            expected = torch.full((4,), padding).to(dtype)
            expected[:width] = item + 1
            assert torch.equal(values[item], expected), (dtype, values)
    print("all dtypes are gathered", flush=True)
    finish(accelerator)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
