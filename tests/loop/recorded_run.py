"""train.py with a record of what happens in it: a process writes, into the folder that RECORD names, the functions of the
evaluation sequence in the order of their calls, the rows it trained on and their losses, and the inputs it sent through the
model; the main process keeps the metric.csv of each evaluation."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from fsdp2_on_cpu import fsdp2_on_cpu

import evaluate
import metrics
import train
from runtime.launch import errors_in_one_line

record = {"calls": [], "trained": [], "losses": [], "predicted": []}


def recorded(function):
    @functools.wraps(function)
    def wrapper(*arguments, **options):
        record["calls"].append(function.__name__)
        return function(*arguments, **options)

    return wrapper


SEQUENCE = "evaluate get_eval_dataloader evaluation_loop "
SEQUENCE += "_rerank_evaluate rerank_evaluate get_rerank_eval_dataloader rerank_evaluation_loop"
for name in SEQUENCE.split():
    setattr(evaluate, name, recorded(getattr(evaluate, name)))
train.maybe_log_save_evaluate = recorded(evaluate.maybe_log_save_evaluate)
train.compute_metrics = recorded(metrics.compute_metrics)

train_step, predict, write_metric_csv = (
    train.train_step,
    evaluate.predict,
    evaluate.write_metric_csv,
)


def recorded_train_step(accelerator, model, batch):
    index, weight, losses = train_step(accelerator, model, batch)
    record["trained"].append(index.tolist())
    record["losses"].append(losses.tolist())
    return index, weight, losses


def recorded_predict(accelerator, model, dataloader, num_items):
    def watched():
        for batch in dataloader:
            record["predicted"].append(batch["index"].tolist())
            yield batch

    return predict(accelerator, model, watched(), num_items)


def recorded_write_metric_csv(path, dataset, scores):
    write_metric_csv(path, dataset, scores)
    record_dir = Path(os.environ["RECORD"])
    shutil.copy(path, record_dir / f"metric_{len(list(record_dir.glob('metric_*.csv')))}.csv")


train.train_step, evaluate.predict, evaluate.write_metric_csv = (
    recorded_train_step,
    recorded_predict,
    recorded_write_metric_csv,
)


def write_record():
    Path(os.environ["RECORD"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    fsdp2_on_cpu()
    with errors_in_one_line():
        train.main()
    write_record()
