"""The training loop: copy it, edit it. No Trainer and no callbacks: read it top to bottom.

    accelerate launch --config_file accelerate_config/cpu.yaml train.py      # all cores of a CPU
    accelerate launch --config_file accelerate_config/cpu_2_processes.yaml train.py
    accelerate launch --config_file accelerate_config/single_gpu.yaml train.py    # or multi_gpu
    accelerate launch --mixed_precision bf16 train.py --config run.yaml --learning_rate 1e-3

Precision, processes and strategy are the launch's. Options are in config.py, evaluations in
evaluate.py, rows in data.py. The loss is `losses` of the model's forward, in model.py.

B: rows in a process's micro-batch. Global batch: B x processes x accumulation.
"""

import importlib.util
import math
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed

import report
from config import Config, read_config, what_numbers_depend_on
from data import fingerprint, read_datasets
from evaluate import check_metric_prefix, make_evaluations, maybe_log_save_evaluate
from model import load_model
from runtime import launch
from runtime.batches import batches_of, check_datasets, make_train_dataloader
from runtime.checkpoint import hash_model, load_training_state, save_checkpoint
from runtime.evaluation import check_outputs
from runtime.resume import collect_losses, find_checkpoint, make_output_dir, make_state, resume
from runtime.tracking import closing_table, make_trackers, start_progress, start_trackers
from runtime.trial import make_trainable


def main():
    config = read_config(sys.argv[1:])
    check_metric_prefix(config.metric_for_best_model)
    accelerator = launch.make_accelerator(
        max_grad_norm=config.max_grad_norm,
        full_determinism=config.full_determinism,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=make_trackers(config.report_to, config.output_dir, config.project),
        project_dir=config.output_dir,
    )
    set_seed(config.seed)  # the same on every process: all start with the same weights
    make_output_dir(accelerator, config.output_dir, config.resume_from_checkpoint)
    if config.data_dir == Config.data_dir and importlib.util.find_spec("sample_data"):
        import sample_data  # here, so that sample_data.py may be deleted

        sample_data.build_once(accelerator, config.data_dir)

    # A checkpoint holds the model, `state` with `depends_on`, the optimizer and random states.
    # A resume: find it, load the model, read the data, compare `depends_on`, restore `state`. Then
    # `train` loads the optimizer and random states. To delete resuming: find_checkpoint, resume,
    # load_training_state and `checkpoint`; make_output_dir gets "never".
    checkpoint = find_checkpoint(accelerator, config.output_dir, config.resume_from_checkpoint)
    model_dir = checkpoint or config.model_name_or_path
    with launch.option_named(f"--model_name_or_path {model_dir}"):
        model = load_model(model_dir, config)
    accelerator.print(f"reading {config.data_dir}: all of it is checked before training")
    datasets = read_datasets(config, model, ("train", "eval", "test_vocabulary"))
    train_dataset, eval_dataset, rerank_dataset = check_datasets(accelerator, datasets)
    with launch.option_named(f"--model_name_or_path {model_dir}"):
        make_trainable(accelerator, model, train_dataset, config.gradient_checkpointing)
    evaluations = make_evaluations(eval_dataset, rerank_dataset)
    depends_on = what_numbers_depend_on(config) | {
        "model": hash_model(accelerator, config.model_name_or_path),
        "data": fingerprint(datasets),
    }
    state = make_state(accelerator, config, train_dataset, depends_on)
    resume(accelerator, state, checkpoint, config.output_dir)
    if state.finished:
        accelerator.print(f"{config.output_dir} holds a finished run: there is nothing to do")
        return launch.finish(accelerator)
    start_trackers(accelerator, config, state, datasets)
    status = train(accelerator, config, model, state, checkpoint, train_dataset, evaluations)
    launch.finish(accelerator)
    sys.exit(status)


def train(accelerator, config, model, state, checkpoint, train_dataset, evaluations) -> int:
    """Train `model`, starting at `state`. All output goes to config.output_dir.

    checkpoint: the folder that `state` was read from, or None. Returns the exit status: 0, or that
    of the signal that stopped it, once a checkpoint is saved.
    """
    train_dataloader = make_train_dataloader(accelerator, train_dataset, state, config)
    # eps: with 1e-8 a weight whose gradient is rounding error takes a full step, and equal runs
    # drift apart. fused: this step is three times as fast on a CPU, where it is not the default.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, eps=1e-6, fused=True
    )
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    set_seed(config.seed, device_specific=True)  # from here each process has its own dropout
    if checkpoint is not None:
        load_training_state(accelerator, checkpoint)
    launch.watch_for_stop(accelerator)  # Ctrl+C, SIGTERM, SIGHUP
    start_progress(accelerator, state)
    try:
        if not state.done:  # before the first update, or to redo an interrupted evaluation
            maybe_log_save_evaluate(accelerator, model, state, config, evaluations)
        model.train()
        for batch in batches_of(train_dataloader):  # the micro-batches of all epochs
            if state.finished:  # stopped early, or its last evaluation was redone
                break
            # `backward` all-reduces gradients at an update's last micro-batch: `accumulate` sees to
            # it. At the others optimizer.step and zero_grad do nothing.
            with accelerator.accumulate(model):
                state.learning_rate = learning_rate_at(state.step, state.num_updates, config)
                for group in optimizer.param_groups:
                    group["lr"] = state.learning_rate
                losses = train_step(accelerator, model, batch)
                state.window.append((state.step, state.learning_rate, *losses))
                if accelerator.sync_gradients:
                    max_norm = config.max_grad_norm or math.inf
                    state.grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                state.step += 1
                state.done = False
                state.progress.update()
                maybe_log_save_evaluate(accelerator, model, state, config, evaluations)
                if state.step < state.num_updates:
                    launch.stop_if_asked()
    except launch.Stopped as stopped:
        collect_losses(accelerator, state)
        save_checkpoint(accelerator, model, state, config.output_dir, config.save_total_limit)
        accelerator.print(
            f"\nstopped after update {state.step}, which is saved in "
            f"{config.output_dir}/checkpoints: the same command resumes from there"
        )
        return stopped.status
    if accelerator.is_main_process:
        output_dir = Path(config.output_dir)
        with launch.optional("curves.png"):
            report.draw_curves(output_dir / "curves.png", output_dir / "log.jsonl")
    accelerator.print(closing_table(state, config))
    return 0


def train_step(accelerator, model, batch):
    """Forward and backward of a micro-batch. Returns its index, weight and losses, each (B,).

    They stay on the device: no synchronisation here. An epoch's last global batch is padded to
    its full size on all processes. Padding has index -1 and weight 0. The real rows weigh more
    by as much, so the batch's mean is over them alone. In a full batch every row weighs 1.
    """
    index, weight = batch.pop("index"), batch.pop("weight")  # (B,), (B,)
    # Not model.module(...): without the wrapper's forward no gradients are synchronised.
    losses = check_outputs(model(**batch), len(index), "losses")["losses"]  # (B,)
    # A mean over B here, over micro-batches in backward, over processes in the all-reduce: in all
    # the mean over the global batch.
    accelerator.backward((losses * weight).mean())
    return index, weight, losses.detach()


def learning_rate_at(step: int, num_updates: int, config: Config) -> float:
    """The rate of update `step`, counted from 0: linear warmup, then half a cosine to 0.

    The first update has 1/warmup of the peak. EDIT HERE for another schedule. It depends on `step`
    alone, so nothing is saved. A resume does not notice an edit.
    """
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * num_updates
    warmup = max(1, round(warmup))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, num_updates - warmup)  # from 0 to pi
    return config.learning_rate * 0.5 * (1 + math.cos(angle))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for tensors of two dimensions or more: not for biases, norms and scales."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    with launch.errors_in_one_line():
        main()
