"""The evaluations, inside training and as a command.

    accelerate launch evaluate.py --model_dir output/best --data_dir default_data

In the order of the calls. Each function names the method of Trainer that it stands for, and that one had to override:

    maybe_log_save_evaluate            what is due at this step
      evaluate                         on the DataLoader that training shares: eval/...
        get_eval_dataloader
        evaluation_loop -> compute_metrics
      _rerank_evaluate                 on a DataLoader of its own: rerank/...
        rerank_evaluate
          get_rerank_eval_dataloader
          rerank_evaluation_loop -> compute_metrics

N queries, C candidates, M distinct inputs, B batch, D output width, W processes. Memory of a rerank evaluation, in bytes, on
each process: 4 x M x D for the outputs (four times that while they are put in place), at most 38 x N x C for scores and indices,
2**19 x D for the pairs being scored, and one batch of inputs; nothing grows with images (tests/benchmarks/rerank_evaluation.py).
"""

import argparse
import csv
import json
import math
import re
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

import metrics
import report
from data import batches_in_groups, read_datasets, whole
from model import load_model, rerank_scores
from runtime.checkpoint import TRAINING_CONFIG, save_checkpoint, save_model
from runtime.launch import (
    UserError,
    errors_in_one_line,
    finish,
    leave_signals_to_the_main_process,
    make_accelerator,
    make_writable,
    stop_if_asked,
)
from runtime.tracking import log_picture, open_whole


def maybe_log_save_evaluate(
    accelerator, model, state, config, eval_dataset, rerank_dataset, compute_metrics
):
    """Log, evaluate in both ways, and save, whatever is due at this step: the one place that decides it.

    Stands for Trainer._maybe_log_save_evaluate. Called after each update, and once before the first (step 0), so that the
    log begins with what the untrained model can do. Every process must call it at the same step: the evaluations, the
    gathering of losses and the saving are done together, and one process alone would wait for the others for ever.
    Returns what was logged.
    """
    log_due, evaluate_due, save_due = (
        state.step > 0
        and (state.step == state.num_updates or (every > 0 and state.step % every == 0))
        for every in (config.log_every, config.eval_every, config.save_every)
    )
    evaluate_due = evaluate_due or state.step == 0
    output_dir = Path(config.output_dir)
    values = {}
    if log_due or evaluate_due or save_due:
        collect_losses(
            accelerator, state
        )  # before anything else: weights that are not finite are neither evaluated nor saved
    if evaluate_due:
        evaluated = evaluate(accelerator, model, eval_dataset, compute_metrics, config)
        evaluated |= _rerank_evaluate(accelerator, model, rerank_dataset, compute_metrics, config)
        state.evaluations[state.step] = evaluated
        values |= evaluated
    if state.losses and (log_due or evaluate_due):
        values |= training_metrics(state, config)
    if values:
        accelerator.log(
            values, step=state.step
        )  # all of a step at once: one line, one point on the axis
    if evaluate_due:
        log_picture(
            accelerator, "rerank/contact_sheet", output_dir / "contact_sheet.png", state.step
        )
    if evaluate_due and is_best(state, values, config.best_metric):
        save_model(accelerator, model, output_dir / "best", state.training_config)
    state.done = True
    if save_due:
        save_checkpoint(
            accelerator, model, state, output_dir / "checkpoints", config.save_total_limit
        )
    if evaluate_due or save_due:
        state.window_began = time.perf_counter()  # samples_per_second is of training alone
    return values


def collect_losses(accelerator, state):
    """Move the losses of every row of every process since the last call into `state`, as numbers.

    The one place where training waits for the device. Raises UserError if a loss or the gradients are not finite.
    """
    if not state.window:
        return
    steps, learning_rates, *columns = zip(
        *state.window, strict=True
    )  # each a list, one entry a micro-batch of this process
    shape = (accelerator.num_processes, *torch.stack(columns[0]).shape)  # (W, micro-batches, B)
    index, weight, losses = (
        accelerator.gather(torch.stack(column)).cpu().view(shape) for column in columns
    )
    state.grad_norm = float(state.grad_norm)
    state.seconds += time.perf_counter() - state.window_began
    state.window_began = time.perf_counter()
    state.window.clear()

    broken = ~losses.isfinite() & (index >= 0)  # filling repeats a row of the same update
    if broken.any():
        first = (
            broken.any(2).any(0).nonzero()[0].item()
        )  # the first micro-batch in which one of any process is
        rows = sorted({state.name_row(row) for row in index[:, first][broken[:, first]].tolist()})
        raise UserError(
            f"the loss of update {steps[first] + 1} is not finite (learning rate {learning_rates[first]:.3g}), {len(rows)} rows: "
            f"{'; '.join(rows[:5])}: lower --learning_rate, or look at these rows. What was saved before is safe"
        )
    if (
        not math.isfinite(state.grad_norm) and accelerator.mixed_precision != "fp16"
    ):  # fp16 skips such an update by itself
        raise UserError(
            f"the gradient of update {state.step} is not finite (learning rate {learning_rates[-1]:.3g}); lower it"
        )
    state.losses += (weight * losses).double().flatten().tolist()
    state.rows += (index >= 0).sum().item()


def training_metrics(state, config):
    """{"train/...": float} of the updates since the last call; the loss is the mean of the updates' losses, each the
    mean over the rows of its global batch."""
    values = {
        # Summed exactly, whatever the order: an interruption or another number of processes does not change the last bit.
        "train/loss": math.fsum(state.losses) / len(state.losses),
        "train/grad_norm": state.grad_norm,
        "train/learning_rate": state.learning_rate,
        "train/samples_per_second": state.rows / state.seconds,
    }
    state.losses, state.rows, state.seconds = [], 0, 0.0
    return values


def is_best(state, values, best_metric):
    """Whether this evaluation is the best until now, which `state` then remembers. best_metric: "min:NAME" or "max:NAME"."""
    direction, _, name = best_metric.partition(":")
    if name not in values:
        raise UserError(
            f"--best_metric {best_metric}: no such metric; there are {', '.join(values)}"
        )
    value = values[name]
    before = state.best_value
    # A comparison with NaN is never true; the first value has nothing to be compared with, hence the test.
    if math.isfinite(value) and (
        before is None or (value < before if direction == "min" else value > before)
    ):
        state.best_value, state.best_step = value, state.step
        return True
    return False


def evaluate(accelerator, model, dataset, compute_metrics, config):
    """{"eval/...": float}: loss and metrics on a data set of the kind that training uses. Stands for Trainer.evaluate."""
    dataloader = get_eval_dataloader(accelerator, dataset, config)
    with evaluation_mode(model):
        output = evaluation_loop(accelerator, model, dataloader, dataset, compute_metrics)
    return prefixed("eval", output.metrics)


def get_eval_dataloader(accelerator, dataset, config):
    """Batches dealt to the processes, each item once. Stands for Trainer.get_eval_dataloader, for either kind of data set."""
    dataloader = DataLoader(
        dataset,
        batch_sampler=batches_in_groups(
            dataset.groups, config.per_device_eval_batch_size, accelerator.num_processes
        ),
        collate_fn=whole,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else iterating draws from the state that dropout uses
        pin_memory=accelerator.device.type == "cuda",
    )
    # Not accelerator.prepare: it would keep every DataLoader that it is given, one more at each evaluation.
    return prepare_data_loader(
        dataloader, device=accelerator.device, put_on_device=True, non_blocking=True
    )


def evaluation_loop(accelerator, model, dataloader, dataset, compute_metrics):
    """Predict, gather, compute the metrics: EvalLoopOutput(scores (N, C), labels (N,), metrics, N).

    Stands for Trainer.evaluation_loop.
    """
    gathered = predict(accelerator, model, dataloader, len(dataset))
    losses, scores = gathered["losses"].double(), gathered["scores"].float()  # (N,), (N, C)
    require_finite(
        losses.isfinite() & ~(scores.isnan() | (scores == math.inf)).any(1),
        dataset,
        "the loss or a score",
    )
    output = with_metrics(scores, dataset, compute_metrics)
    output.metrics["loss"] = losses.mean().item()  # pyrefly: ignore[unsupported-operation]
    return output


def _rerank_evaluate(accelerator, model, dataset, compute_metrics, config):
    """The rerank evaluation with the model in evaluation mode, restored even on an error: {"rerank/...": float}.

    Stands for the override Trainer._rerank_evaluate. What it returns goes to the log and to the tracking of the best model.
    """
    with evaluation_mode(model):
        return rerank_evaluate(accelerator, model, dataset, compute_metrics, config)


def rerank_evaluate(accelerator, model, dataset, compute_metrics, config):
    """Get the DataLoader, run the loop, write metric.csv and draw it: {"rerank/...": float}.

    Stands for the override Trainer.rerank_evaluate, which also logs; here maybe_log_save_evaluate does, so that a step is one
    line of the log.
    """
    dataloader = get_rerank_eval_dataloader(accelerator, dataset, config)
    output = rerank_evaluation_loop(accelerator, model, dataloader, dataset, compute_metrics)
    if accelerator.is_main_process:
        write_metric_csv(Path(config.output_dir) / "metric.csv", dataset, output.predictions)
        report.draw(config, dataset, output.predictions)
        if getattr(config, "trec_dir", None):  # training has no such option
            write_trec(config.trec_dir, dataset, output.predictions)
    return prefixed("rerank", output.metrics)


def get_rerank_eval_dataloader(accelerator, dataset, config):
    """A DataLoader over the distinct inputs of the evaluation, each once in total. Stands for the override of the same name."""
    return get_eval_dataloader(accelerator, dataset, config)


def rerank_evaluation_loop(accelerator, model, dataloader, dataset, compute_metrics):
    """Predict each distinct input, gather, score, compute the metrics: EvalLoopOutput(scores (N, C), labels (N,), metrics, N).

    Stands for the override of the same name, which sends one query a batch through the model, and the images of its
    candidates again for each query and on each process.
    """
    outputs = predict(accelerator, model, dataloader, len(dataset))["outputs"]  # (M, D)
    candidates = dataset.candidates.to(outputs.device)  # (N, C)
    scores = rerank_scores(
        outputs, dataset.queries.to(outputs.device), candidates
    ).float()  # (N, C)
    require_finite((scores.isfinite() | (candidates < 0)).all(1), dataset, "a score")
    return with_metrics(scores, dataset, compute_metrics)


def predict(accelerator, model, dataloader, num_items):
    """Send every batch through the model, on every process, and gather: {name: (num_items, ...)}, row i being item i.

    Rows are put in their place by the index that travelled with them, never by the order in which they arrive.
    Raises RuntimeError unless each item is there exactly once.
    """
    columns = defaultdict(list)
    for batch in tqdm(
        dataloader, desc="evaluating", leave=False, disable=not accelerator.is_main_process or None
    ):
        stop_if_asked()  # in time, should the evaluation take longer than whoever asks waits
        columns["index"].append(batch.pop("index"))  # (B,)
        batch.pop("weight", None)
        for name, values in model(**batch).items():
            columns[name].append(values)  # (B, ...)
    gathered = {}
    for name, values in columns.items():
        # Processes may have more or fewer items than others, and a gather takes from each as many: index -1 is filling.
        gathered[name] = accelerator.gather(
            accelerator.pad_across_processes(torch.cat(values), pad_index=-1)
        )  # (W x most, ...)
    index = gathered.pop("index")
    real = index >= 0
    index = index[real]
    times = torch.bincount(index.cpu(), minlength=num_items)
    if len(times) != num_items or (times != 1).any():
        raise RuntimeError(
            f"of {num_items} items, {(times == 0).sum()} are missing, {torch.nonzero(times == 0)[:5, 0].tolist()} "
            f"first, and {(times > 1).sum()} came more than once: is the DataLoader prepared?"
        )
    return {
        name: torch.empty_like(values[real]).index_copy_(0, index, values[real])
        for name, values in gathered.items()
    }


def with_metrics(scores, dataset, compute_metrics):
    # Every process computes them, on the same gathered rows, so none has to be told what the others found.
    predictions, labels = scores.cpu().numpy(), dataset.labels.numpy()  # float32 (N, C), int64 (N,)
    values = compute_metrics(
        EvalPrediction(predictions=predictions, label_ids=labels, inputs=np.arange(len(labels)))
    )
    return EvalLoopOutput(
        predictions, labels, {name: float(value) for name, value in values.items()}, len(labels)
    )


def require_finite(finite, dataset, what):
    if not finite.all():
        rows = torch.nonzero(~finite)[:, 0].tolist()
        raise UserError(
            f"{what} is not finite for {len(rows)} rows: {'; '.join(map(dataset.rows.name, rows[:5]))}"
        )


def prefixed(prefix, values):
    return {f"{prefix}/{name}": value for name, value in values.items()}


@contextmanager
def evaluation_mode(model):
    """No dropout and no gradients inside; the mode that the model had, after, even on an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def write_metric_csv(path, dataset, scores):
    """One line a query: its columns of the CSV, its scores, the candidates in order, rank, and each metric. Whole or not at all.

    Lists are JSON. Among equal scores the relevant candidate comes last, so that it stands at its rank.
    """
    ranks = metrics.ranks_of_relevant(scores, dataset.labels.numpy())  # (N,)
    columns = {
        name: [f(k, ranks) for k in metrics.TOP_K]
        for name, f in (("Recall", metrics.recall_at), ("MRR", metrics.reciprocal_rank_at))
    }
    header = [
        *dataset.rows.columns,
        "candidate_resourceKey",
        "score",
        "sorted_score",
        "sorted_candidate_resourcekey",
        "rank",
    ]
    header += [f"{name}@{k}" for name in columns for k in metrics.TOP_K]
    listed = dataset.rows.candidates
    quoted = [
        json.dumps(key, ensure_ascii=False) for key in listed.keys
    ]  # once, and not in each of the lists that have it
    with open_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row, label in enumerate(dataset.labels.tolist()):
            keys = [quoted[place] for place in listed.places_of(row).tolist()]
            score = scores[row, : len(keys)]
            text = [
                str(value) for value in score
            ]  # the shortest decimals that read back as the same float32
            order = metrics.best_first(score, label).tolist()
            lists = (keys, text, [text[i] for i in order], [keys[i] for i in order])
            writer.writerow(
                [values[row] for values in dataset.rows.columns.values()]
                + [f"[{', '.join(values)}]" for values in lists]
                + [
                    f"{ranks[row]:g}",
                    *(f"{values[row]:.17g}" for values in chain(*columns.values())),
                ]
            )


def write_trec(folder: Path, dataset, scores):
    """`run` and `qrels` in the format of trec_eval. A query is the number of its row in the CSV; keys have no white space there.

    https://github.com/usnistgov/trec_eval
    """
    ranked, relevant = [], []
    for row, (keys, label) in enumerate(
        zip(dataset.rows.candidates, dataset.labels.tolist(), strict=True)
    ):
        names = [
            re.sub(r"[\s%]", lambda found: quote(found[0]), key)
            for key in (*keys, dataset.rows.columns["resourceKey"][row])
        ]
        query, above = dataset.rows.numbers[row], np.float32(np.inf)
        for rank, column in enumerate(metrics.best_first(scores[row, : len(keys)], label), start=1):
            # Such tools order by score, and among equals in ways of their own: here the next lower number parts them.
            above = min(scores[row, column], np.nextafter(above, np.float32(-np.inf)))
            ranked.append(f"{query} Q0 {names[column]} {rank} {above} train.py\n")
        relevant.append(f"{query} 0 {names[-1]} 1\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("run", ranked), ("qrels", relevant)):
        with open_whole(folder / name) as file:
            file.writelines(lines)


def main():
    parser = argparse.ArgumentParser(
        usage="accelerate launch --config_file accelerate_config/cpu.yaml evaluate.py --model_dir FOLDER [--OPTION VALUE ...]",
        description="Evaluate a model that train.py saved, in both ways: the numbers that training logged for these weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model_dir",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="a folder that train.py saved: output/best, or one of output/checkpoints",
    )
    parser.add_argument(
        "--data_dir",
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="the data folder (default: the one of the training)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="where metric.csv goes",
    )
    parser.add_argument(
        "--per_device_batch_size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="INT",
        help="rows or pages in a batch, on a process (default: that of the training's evaluations)",
    )
    parser.add_argument(
        "--trec_dir",
        type=Path,
        help="also write `run` and `qrels` there, for trec_eval and its like",
    )
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="also write gallery.html, all queries as pictures, for a browser",
    )
    arguments = parser.parse_args()
    if getattr(arguments, "per_device_batch_size", 1) < 1:
        raise UserError(
            f"--per_device_batch_size is {arguments.per_device_batch_size}, it must be at least 1"
        )
    if not (arguments.model_dir / TRAINING_CONFIG).is_file():
        raise UserError(
            f"--model_dir {arguments.model_dir}: there is no {TRAINING_CONFIG} in it; name a folder that train.py saved"
        )
    config = json.loads((arguments.model_dir / TRAINING_CONFIG).read_text(encoding="utf-8"))
    config = argparse.Namespace(**config | vars(arguments))
    config.per_device_eval_batch_size = getattr(
        arguments, "per_device_batch_size", config.per_device_eval_batch_size
    )

    accelerator = make_accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise UserError(
            "DeepSpeed and FSDP2 divide what training needs; to evaluate launch with cpu, single_gpu or multi_gpu.yaml"
        )
    make_writable(config.output_dir)
    try:
        model = load_model(config.model_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_dir {config.model_dir}: {' '.join(str(error).split())}") from None
    eval_dataset, rerank_dataset = read_datasets(config, model, ("eval", "test_vocabulary"))
    model = accelerator.prepare_model(
        model, evaluation_mode=True
    )  # the device and the precision; nothing to synchronise
    values = evaluate(accelerator, model, eval_dataset, metrics.compute_metrics, config)
    values |= _rerank_evaluate(accelerator, model, rerank_dataset, metrics.compute_metrics, config)
    for name, value in values.items():
        accelerator.print(f"{name:<20}{value:10.6f}")
    accelerator.print(
        f"{config.output_dir / 'metric.csv'} has a line for each of the {len(rerank_dataset.labels)} queries"
    )
    if config.gallery:
        accelerator.print(f"{config.output_dir / 'gallery.html'} shows them all in a browser")
    finish(accelerator)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
