"""The evaluations, inside training and as a command.

    accelerate launch evaluate.py --model_dir output/best --data_dir default_data

In the order of the calls. Teams that use Trainer override the first, and add the four with rerank:

    maybe_log_save_evaluate            what is due after this update
      evaluate                         loss and metrics of eval.csv: eval/...
        get_eval_dataloader
        evaluation_loop                predict, then compute_metrics
      _rerank_evaluate                 on a DataLoader of its own: rerank/...
        rerank_evaluate
          get_rerank_eval_dataloader
          rerank_evaluation_loop       predict, then compute_metrics

N rows, C candidates, M items (distinct inputs), B batch, D output width. Memory of a rerank
evaluation in bytes on each process: 4 x M x D for the outputs, and while they are gathered twice
that, or three times by gloo; at most 38 x N x C for scores and indices; 2**19 x D for pairs being
scored; one batch.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import Dataset
from tqdm import tqdm

from runtime import launch

__getattr__ = launch.refuse_hidden_library()  # `import evaluate` finds this file

import report
from config import Config, EvaluateConfig, read_options
from data import read_datasets
from metrics import compute_metrics
from model import load_model
from runtime.batches import batches_of, check_datasets, evaluation_batches, make_dataloader
from runtime.checkpoint import read_training_config, save_checkpoint, save_model
from runtime.evaluation import (
    check_metrics,
    check_outputs,
    evaluation_mode,
    gather_items,
    make_prediction,
    mean_loss,
    score_rows,
)
from runtime.resume import collect_losses, training_metrics
from runtime.tracking import show, write_report


class Evaluation(NamedTuple):
    run: Callable  # evaluate or _rerank_evaluate
    dataset: Dataset | None  # None where only the names are asked for
    compute_metrics: Callable  # of this evaluation: it runs on every process, and writes no file
    report: Callable | None = None  # (folder, dataset, prediction), on process 0


def make_evaluations(eval_dataset=None, rerank_dataset=None) -> dict[str, Evaluation]:
    """EDIT HERE to add or drop evaluations. Without any there is no best/. Names are log prefixes.

    A second one: also its CSV in both main functions and in read_datasets. Its report writes
    metric_{name}.csv. Without "eval" set metric_for_best_model.
    """
    return {
        "eval": Evaluation(evaluate, eval_dataset, compute_metrics),
        "rerank": Evaluation(_rerank_evaluate, rerank_dataset, compute_metrics, report.write),
    }


def maybe_log_save_evaluate(accelerator, model, state, config, evaluations):
    """Log, evaluate and save: the one place that decides what is due.

    Replaces Trainer._maybe_log_save_evaluate. Called after each update, and once before the first,
    so that the log starts with the untrained model. Every process must call it, or the run hangs.
    """
    evaluate_due = len(evaluations) > 0 and (state.step == 0 or state.is_due(config.eval_steps))
    log_due = evaluate_due or state.is_due(config.logging_steps)
    values = {}
    if log_due or state.is_due(config.save_steps):
        collect_losses(accelerator, state)  # first: it raises on NaN, so no such weights are saved
    if evaluate_due:
        for name, evaluation in evaluations.items():
            values |= run_evaluation(accelerator, model, name, evaluation, config, state.step)
        state.evaluations[state.step] = dict(values)
    if log_due:
        values |= training_metrics(state)
        accelerator.log(values, step=state.step)  # one call, so one line a step
        show(accelerator, state, values)
    if evaluate_due and is_best(state, values, config):
        save_model(accelerator, model, Path(config.output_dir, "best"), state)
    if evaluate_due and 0 < config.early_stopping_patience <= state.evaluations_since_best:
        state.num_updates = state.step  # this was the last update: save what is due then
    state.done = True
    save_due = state.is_due(config.save_steps)
    if save_due:
        save_checkpoint(accelerator, model, state, config.output_dir, config.save_total_limit)
    if evaluate_due or save_due:
        state.window_began = time.perf_counter()  # samples_per_second is of training alone


def is_best(state, values, config) -> bool:
    """Whether this evaluation is the best so far. Then `state` remembers it. NaN never is."""
    name = config.metric_for_best_model
    if name not in values:
        raise launch.UserError(
            f"--metric_for_best_model {name}: no such metric; there are {', '.join(values)}"
        )
    value, best = values[name], state.best_value
    better = best is None or (value > best if config.greater_is_better else value < best)
    if math.isfinite(value) and better:
        state.best_value, state.best_step = value, state.step
    return state.best_step == state.step


def check_metric_prefix(name: str):
    """Raise early if metric_for_best_model has no evaluation's prefix."""
    prefixes = [f"{evaluation}/" for evaluation in make_evaluations()]
    if prefixes and not name.startswith(tuple(prefixes)):
        raise launch.UserError(f"--metric_for_best_model {name}: it begins with none of {prefixes}")


def run_evaluation(accelerator, model, name, evaluation, config, step=None):
    """Evaluate, and report on process 0. Returns {"name/metric": float}."""
    prediction, metrics = evaluation.run(accelerator, model, evaluation, config)
    if evaluation.report is not None and accelerator.is_main_process:
        write_report(accelerator, name, evaluation, prediction, Path(config.output_dir), step)
    return {f"{name}/{metric}": value for metric, value in metrics.items()}


def evaluate(accelerator, model, evaluation, config):
    """Loss and metrics of eval.csv. Replaces Trainer.evaluate.

    Returns (EvalPrediction, {metric: float}), computed on every process, equal on all.
    """
    dataloader = get_eval_dataloader(accelerator, evaluation.dataset, config)
    with evaluation_mode(model):
        return evaluation_loop(accelerator, model, dataloader, evaluation)


def get_eval_dataloader(accelerator, dataset, config):
    """Each item once, split over the processes. Replaces Trainer.get_eval_dataloader."""
    batches = evaluation_batches(
        dataset.groups, config.per_device_eval_batch_size, accelerator.num_processes
    )
    dataloader = make_dataloader(accelerator, dataset, config, batch_sampler=batches)
    # Not accelerator.prepare: it keeps a reference, so each evaluation would leak a DataLoader.
    return prepare_data_loader(
        dataloader, accelerator.device, put_on_device=True, non_blocking=True
    )


def evaluation_loop(accelerator, model, dataloader, evaluation):
    """Predict, gather, compute the metrics. Replaces Trainer.evaluation_loop."""
    dataset = evaluation.dataset
    outputs = predict(accelerator, model, dataloader, dataset, "losses")  # {name: (N, ...)}
    loss = mean_loss(outputs.pop("losses"), dataset)
    prediction = make_prediction(outputs.values(), dataset)  # a tuple if several, as in Trainer
    return prediction, check_metrics(evaluation.compute_metrics(prediction)) | {"loss": loss}


def _rerank_evaluate(accelerator, model, evaluation, config):
    """Metrics of ranked candidates, in evaluation mode. Returns what `evaluate` returns."""
    with evaluation_mode(model):
        return rerank_evaluate(accelerator, model, evaluation, config)


def rerank_evaluate(accelerator, model, evaluation, config):
    """Get the DataLoader, run the loop."""
    dataloader = get_rerank_eval_dataloader(accelerator, evaluation.dataset, config)
    return rerank_evaluation_loop(accelerator, model, dataloader, evaluation)


def get_rerank_eval_dataloader(accelerator, dataset, config):
    """Each item once. The items are the distinct inputs of the evaluation, here images."""
    return get_eval_dataloader(accelerator, dataset, config)


def rerank_evaluation_loop(accelerator, model, dataloader, evaluation):
    """Predict each item, gather, score, compute the metrics.

    An image goes through the model once, and not once for each query and process.
    """
    outputs = predict(accelerator, model, dataloader, evaluation.dataset)  # {name: (M, ...)}
    scores = score_rows(accelerator, evaluation.dataset, outputs)  # (N, C)
    prediction = make_prediction([scores], evaluation.dataset)
    return prediction, check_metrics(evaluation.compute_metrics(prediction))


def predict(accelerator, model, dataloader, dataset, *needed):
    """Send every batch through the model and gather: {name: (M, ...)}, on every process.

    Row i is item i: each item comes with its index. needed: names that `forward` must return.
    """
    indices, outputs = [], defaultdict(list)
    disable = not accelerator.is_main_process or None  # None: a bar only on a terminal
    batches = batches_of(dataloader)
    for batch in tqdm(batches, "evaluating", len(dataloader), leave=False, disable=disable):
        launch.stop_if_asked()  # Ctrl+C in training; a resume redoes this update's evaluations
        index = batch.pop("index")  # (B,), -1 for padding
        batch.pop("weight", None)
        indices.append(index)
        for name, values in check_outputs(model(**batch), len(index), *needed).items():
            outputs[name].append(values)  # (B, ...)
    return gather_items(accelerator, indices, outputs, dataset)


def main():
    options = read_options(EvaluateConfig, sys.argv[1:])
    trained = read_training_config(options.model_dir, [each.name for each in fields(Config)])
    given = {name: value for name, value in asdict(options).items() if value is not None}
    config = SimpleNamespace(**trained | given)
    accelerator = launch.make_accelerator(
        full_determinism=config.full_determinism, mixed_precision=config.mixed_precision
    )
    launch.refuse_sharded_weights(accelerator)
    launch.make_writable(config.output_dir)
    launch.own(accelerator, config.output_dir)
    with launch.option_named(f"--model_dir {config.model_dir}"):
        model = load_model(config.model_dir)
    datasets = read_datasets(config, model, ("eval", "test_vocabulary"))
    evaluations = make_evaluations(*check_datasets(accelerator, datasets))
    # To the device, in the precision of the training. There are no gradients, so no DDP.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for name, evaluation in evaluations.items():
        values = run_evaluation(accelerator, model, name, evaluation, config)
        for metric, value in values.items():
            accelerator.print(f"{metric:<24}{value:10.6f}")
    accelerator.print(f"the reports are in {config.output_dir}/")
    launch.finish(accelerator)


if __name__ == "__main__":
    with launch.errors_in_one_line():
        main()
