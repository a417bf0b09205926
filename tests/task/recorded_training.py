"""train.py, which writes what each process trained on, in the form of trainer_reference.py.

The folder that RECORD names gets {process}.json: the rows of each micro-batch and their losses.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from runtime.launch import errors_in_one_line

record = {"trained": [], "losses": []}
train_step = train.train_step


def recorded_train_step(accelerator, model, batch):
    index, weight, losses = train_step(accelerator, model, batch)
    record["trained"].append(index.tolist())
    record["losses"].append(losses.tolist())
    return index, weight, losses


train.train_step = recorded_train_step

if __name__ == "__main__":
    with errors_in_one_line():
        try:
            train.main()
        finally:
            path = Path(os.environ["RECORD"], f"{os.environ.get('RANK', '0')}.json")
            path.write_text(json.dumps(record))
