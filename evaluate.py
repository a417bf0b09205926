"""The evaluations, inside training and as a command.

    accelerate launch evaluate.py --model_dir output/best --data_dir default_data

In the order of the calls. Each function names the method of Trainer that it stands for:

    maybe_log_save_evaluate            what is due after this update
      evaluate                         rows of the same kind as training's: eval/...
        get_eval_dataloader
        evaluation_loop -> compute_metrics
      _rerank_evaluate                 on a DataLoader of its own: rerank/...
        rerank_evaluate
          get_rerank_eval_dataloader
          rerank_evaluation_loop -> compute_metrics

N rows, C candidates, M items, B batch, D output width, W processes. Memory of a rerank evaluation
in bytes, on each process: 4 x M x D for the outputs and four times that while they are gathered;
at most 38 x N x C for scores and indices; 2**19 x D for the pairs being scored; one batch.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import Dataset
from tqdm import tqdm

import report
from config import Config, EvaluateConfig, read_options
from data import read_datasets
from metrics import compute_metrics
from model import load_model
from runtime import launch
from runtime.batches import evaluation_batches, make_dataloader
from runtime.checkpoint import read_training_config, save_checkpoint, save_model
from runtime.evaluation import (
    check_metrics,
    check_outputs,
    evaluation_mode,
    gather_items,
    make_prediction,
    mean_loss,
)
from runtime.resume import collect_losses, training_metrics
from runtime.tracking import show, write_report


class Evaluation(NamedTuple):
    run: Callable  # evaluate or _rerank_evaluate
    dataset: Dataset
    compute_metrics: Callable  # one for each evaluation: two CSVs are two sets of rows
    report: Callable | None = None  # (folder, dataset, prediction), on process 0


def make_evaluations(eval_dataset=None, rerank_dataset=None) -> dict[str, Evaluation]:
    """EDIT HERE to add an evaluation or to drop one. The names are the prefixes in the log."""
    return {
        "eval": Evaluation(evaluate, eval_dataset, compute_metrics),
        "rerank": Evaluation(_rerank_evaluate, rerank_dataset, compute_metrics, report.write),
    }


def maybe_log_save_evaluate(accelerator, model, state, config, evaluations):
    """Log, evaluate and save: the one place that decides what is due.

    Stands for Trainer._maybe_log_save_evaluate. Called after each update, and once before the
    first, so that the log starts with the untrained model. Every process must call it at the same
    step: alone, one would wait for the others for ever.
    """
    evaluate_due = state.step == 0 or state.is_due(config.eval_steps)
    log_due = evaluate_due or state.is_due(config.logging_steps)
    save_due = state.is_due(config.save_steps)
    values = {}
    if log_due or save_due:
        # First: weights that are not finite are neither evaluated nor saved.
        collect_losses(accelerator, state)
    if evaluate_due:
        for name, evaluation in evaluations.items():
            values |= run_evaluation(accelerator, model, name, evaluation, config, state.step)
        state.evaluations[state.step] = dict(values)
    if log_due:
        values |= training_metrics(state)
        accelerator.log(values, step=state.step)  # one line of the log, one point on the axis
        show(accelerator, state, values)
    if evaluate_due and is_best(state, values, config):
        save_model(accelerator, model, Path(config.output_dir, "best"), state.training_config)
    state.done = True
    if save_due:
        save_checkpoint(accelerator, model, state, config.output_dir, config.save_total_limit)
    if evaluate_due or save_due:
        state.window_began = time.perf_counter()  # samples_per_second is of training alone


def is_best(state, values, config) -> bool:
    """Whether this evaluation is the best until now. If so `state` remembers it. NaN never is."""
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
    """metric_for_best_model must be of an evaluation. Known before anything is read."""
    prefixes = [f"{evaluation}/" for evaluation in make_evaluations()]
    if not name.startswith(tuple(prefixes)):
        raise launch.UserError(
            f"--metric_for_best_model {name}: it must begin with one of {prefixes}"
        )


def run_evaluation(accelerator, model, name, evaluation, config, step=None):
    """One evaluation, and its report on process 0: {"name/metric": float}."""
    prediction, metrics = evaluation.run(accelerator, model, evaluation, config)
    if evaluation.report is not None and accelerator.is_main_process:
        write_report(accelerator, name, evaluation, prediction, Path(config.output_dir), step)
    return {f"{name}/{metric}": value for metric, value in metrics.items()}


def evaluate(accelerator, model, evaluation, config):
    """Loss and metrics on rows like training's. Stands for Trainer.evaluate.

    Returns (EvalPrediction, {metric: float}), on every process the same ones.
    """
    dataloader = get_eval_dataloader(accelerator, evaluation.dataset, config)
    with evaluation_mode(model):
        return evaluation_loop(accelerator, model, dataloader, evaluation)


def get_eval_dataloader(accelerator, dataset, config):
    """Each item once, dealt to the processes. Stands for Trainer.get_eval_dataloader."""
    batches = evaluation_batches(
        dataset.groups, config.per_device_eval_batch_size, accelerator.num_processes
    )
    dataloader = make_dataloader(
        accelerator, dataset, config.dataloader_num_workers, batch_sampler=batches
    )
    # Not accelerator.prepare, which would keep each DataLoader: one more at every evaluation.
    return prepare_data_loader(
        dataloader, device=accelerator.device, put_on_device=True, non_blocking=True
    )


def evaluation_loop(accelerator, model, dataloader, evaluation):
    """Predict, gather, compute the metrics. Stands for Trainer.evaluation_loop."""
    dataset = evaluation.dataset
    outputs = predict(accelerator, model, dataloader, dataset)  # {name: (N, ...)}
    loss = mean_loss(outputs.pop("losses"), dataset)
    prediction = make_prediction(outputs.values(), dataset)
    return prediction, check_metrics(evaluation.compute_metrics(prediction)) | {"loss": loss}


def _rerank_evaluate(accelerator, model, evaluation, config):
    """Metrics of ranked candidates. An addition to Trainer. Returns what `evaluate` returns."""
    with evaluation_mode(model):
        return rerank_evaluate(accelerator, model, evaluation, config)


def rerank_evaluate(accelerator, model, evaluation, config):
    """Get the DataLoader, run the loop. Stands for the addition of the same name."""
    dataloader = get_rerank_eval_dataloader(accelerator, evaluation.dataset, config)
    return rerank_evaluation_loop(accelerator, model, dataloader, evaluation)


def get_rerank_eval_dataloader(accelerator, dataset, config):
    """Each distinct input of the evaluation once. Stands for the addition of the same name."""
    return get_eval_dataloader(accelerator, dataset, config)


def rerank_evaluation_loop(accelerator, model, dataloader, evaluation):
    """Predict each distinct input, gather, score, compute the metrics.

    Stands for the addition of the same name. That one sends a query at a time through the model,
    and the images of its candidates again for each query and on each process.
    """
    outputs = predict(accelerator, model, dataloader, evaluation.dataset)  # {name: (M, ...)}
    scores = evaluation.dataset.score(outputs)  # (N, C)
    prediction = make_prediction([scores], evaluation.dataset)
    return prediction, check_metrics(evaluation.compute_metrics(prediction))


def predict(accelerator, model, dataloader, dataset):
    """Send every batch through the model and gather: {name: (M, ...)}, on every process.

    Row i is item i, by the index that came with it, whatever the order in which it arrived.
    """
    indices, outputs = [], defaultdict(list)
    quiet = not accelerator.is_main_process or None  # None: a bar on a screen, none in a file
    for batch in tqdm(dataloader, desc="evaluating", leave=False, disable=quiet):
        launch.stop_if_asked()  # an evaluation may outlast the time between SIGTERM and SIGKILL
        index = batch.pop("index")  # (B,), -1 for padding
        batch.pop("weight", None)
        indices.append(index)
        for name, values in check_outputs(model(**batch), len(index)).items():
            outputs[name].append(values)  # (B, ...)
    return gather_items(accelerator, indices, outputs, dataset)


def main():
    options = read_options(EvaluateConfig, sys.argv[1:])
    trained = read_training_config(options.model_dir, Config.__dataclass_fields__)
    given = {name: value for name, value in asdict(options).items() if value is not None}
    config = SimpleNamespace(**trained | given)
    accelerator = launch.make_accelerator(mixed_precision=config.mixed_precision)
    launch.refuse_divided_weights(accelerator)
    launch.make_writable(config.output_dir)
    with launch.option_named(f"--model_dir {config.model_dir}"):
        model = load_model(config.model_dir)
    evaluations = make_evaluations(*read_datasets(config, model, ("eval", "test_vocabulary")))
    # It moves the model to the device and sets the precision. There is nothing to synchronise.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for name, evaluation in evaluations.items():
        values = run_evaluation(accelerator, model, name, evaluation, config)
        for metric, value in values.items():
            accelerator.print(f"{metric:<24}{value:10.6f}")
    accelerator.print(f"the files of the evaluation are in {config.output_dir}/")
    launch.finish(accelerator)


if __name__ == "__main__":
    with launch.errors_in_one_line():
        main()
