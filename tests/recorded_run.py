"""train.py with a record of what happens in it: a process writes, into the folder that RECORD names, the functions of the
evaluation sequence in the order of their calls, the rows it trained on, and the inputs it sent through the model."""

import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import metrics
import train
from launch import errors_in_one_line

calls, trained, predicted = [], [], []


def recorded(function):
    @functools.wraps(function)
    def wrapper(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)

    return wrapper


SEQUENCE = "evaluate get_eval_dataloader evaluation_loop "
SEQUENCE += "_rerank_evaluate rerank_evaluate get_rerank_eval_dataloader rerank_evaluation_loop"
for name in SEQUENCE.split():
    setattr(evaluate, name, recorded(getattr(evaluate, name)))
train.maybe_log_save_evaluate = recorded(evaluate.maybe_log_save_evaluate)
train.compute_metrics = recorded(metrics.compute_metrics)

train_step, predict = train.train_step, evaluate.predict


def recorded_train_step(accelerator, model, batch):
    trained.append(batch["index"].tolist())
    return train_step(accelerator, model, batch)


def recorded_predict(accelerator, model, dataloader, num_items):
    def watched():
        for batch in dataloader:
            predicted.append(batch["index"].tolist())
            yield batch

    return predict(accelerator, model, watched(), num_items)


train.train_step, evaluate.predict = recorded_train_step, recorded_predict

if __name__ == "__main__":
    with errors_in_one_line():
        train.main()
    record = {"calls": calls, "trained": trained, "predicted": predicted}
    rank = os.environ.get("RANK", "0")
    Path(os.environ["RECORD"], f"{rank}.json").write_text(json.dumps(record))
