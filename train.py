"""The training loop: copy it, edit it. No Trainer and no callbacks: a step reads top to bottom.

    accelerate launch --config_file accelerate_config/cpu.yaml train.py      # all cores of a CPU
    accelerate launch --config_file accelerate_config/cpu_2_processes.yaml train.py
    accelerate launch --config_file accelerate_config/single_gpu.yaml train.py    # or multi_gpu
    accelerate launch train.py --config run.yaml --learning_rate 1e-3    # a YAML, flags over it

Reading order: main, train, train_step, and what they call. The options are in config.py, the
evaluations in evaluate.py. What a row, a score and the loss are is in data.py and model.py.

B micro-batch of one process. G global batch = B x processes x accumulation. An update is one step
of the optimizer.
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
from runtime.batches import make_train_dataloader
from runtime.checkpoint import hash_model, load_training_state, save_checkpoint
from runtime.evaluation import check_outputs
from runtime.resume import collect_losses, find_checkpoint, make_output_dir, make_state, resume
from runtime.tracking import closing_table, make_trackers, start_progress, start_trackers


def main():
    config = read_config(sys.argv[1:])
    check_metric_prefix(config.metric_for_best_model)
    accelerator = launch.make_accelerator(
        max_grad_norm=config.max_grad_norm,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=make_trackers(config.report_to, config.output_dir),
        project_dir=config.output_dir,
    )
    set_seed(config.seed)  # the same on every process: all start with the same weights
    make_output_dir(accelerator, config.output_dir, config.resume_from_checkpoint)
    if config.data_dir == Config.data_dir and importlib.util.find_spec("sample_data"):
        import sample_data  # here, so that the file can be deleted

        sample_data.build_once(accelerator, config.data_dir)

    # A resume needs its checkpoint alone: the model and its preprocessing come from there.
    checkpoint = find_checkpoint(accelerator, config.output_dir, config.resume_from_checkpoint)
    model_dir = checkpoint or config.model_name_or_path
    with launch.option_named(f"--model_name_or_path {model_dir}"):
        model = load_model(model_dir)
    accelerator.print(f"reading {config.data_dir}: all rows and images are checked before training")
    datasets = read_datasets(config, model, ("train", "eval", "test_vocabulary"))
    train_dataset, eval_dataset, rerank_dataset = datasets
    evaluations = make_evaluations(eval_dataset, rerank_dataset)
    depends_on = what_numbers_depend_on(config) | {
        "model": hash_model(accelerator, config.model_name_or_path),
        "data": fingerprint(datasets),
    }
    state = make_state(accelerator, config, train_dataset, depends_on)
    resume(accelerator, state, checkpoint, config.output_dir)
    if state.finished:
        accelerator.print(f"{config.output_dir} holds a run that is finished: it is left as it is")
        return launch.finish(accelerator)
    counts = {str(dataset.path): dataset.counts for dataset in datasets}
    start_trackers(accelerator, config, state, counts)
    status = train(accelerator, config, model, state, checkpoint, train_dataset, evaluations)
    launch.finish(accelerator)
    sys.exit(status)


def train(accelerator, config, model, state, checkpoint, train_dataset, evaluations) -> int:
    """Train `model` from `state` on. Everything that it leaves is in config.output_dir.

    checkpoint: the folder that `state` was read from, or None. Returns the exit status: 0, or that
    of a signal, after which everything is saved. Raises UserError.
    """
    train_dataloader = make_train_dataloader(accelerator, train_dataset, state, config)
    # eps: with 1e-8 a weight whose gradient is only rounding moves by a full step, and runs that
    # should agree drift apart. fused: a third of the time on a CPU, where it is not the default.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, eps=1e-6, fused=True
    )
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    set_seed(config.seed, device_specific=True)  # from here each process has dropout of its own
    if checkpoint is not None:
        load_training_state(accelerator, checkpoint)
    launch.watch_for_stop(accelerator)
    start_progress(accelerator, state)
    try:
        if not state.done:  # before the first update, or where an evaluation was interrupted
            maybe_log_save_evaluate(accelerator, model, state, config, evaluations)
        model.train()
        for batch in train_dataloader:  # a micro-batch
            # Gradients are all-reduced at the last micro-batch of an update. At the others
            # optimizer.step and zero_grad do nothing.
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
            f"\nstopped, as asked, after update {state.step}, which is saved in "
            f"{config.output_dir}/checkpoints: the same command resumes from there"
        )
        return stopped.status
    if accelerator.is_main_process:
        output_dir = Path(config.output_dir)
        report.draw_curves(output_dir / "curves.png", output_dir / "log.jsonl")
    accelerator.print(closing_table(state, config))
    return 0


def train_step(accelerator, model, batch):
    """Forward and backward of one micro-batch: its index, weight and losses, each (B,).

    They stay on the device, and nothing waits for it. The last global batch of an epoch is padded:
    padding has index -1 and weight 0, and the other items of that batch weigh more. In a full
    batch of rows all weigh 1.
    """
    index, weight = batch.pop("index"), batch.pop("weight")  # (B,), (B,)
    # Only through the wrapped model: DDP, DeepSpeed and FSDP2 hook nothing but its forward.
    losses = check_outputs(model(**batch), len(index), "losses")["losses"]  # (B,)
    # A mean over B, over the micro-batches in backward, over the processes in the all-reduce:
    # together the mean over the global batch.
    accelerator.backward((losses * weight).mean())
    return index, weight, losses.detach()


def learning_rate_at(step: int, num_updates: int, config: Config) -> float:
    """The rate of update `step`, from 0: linear to config.learning_rate, then half a cosine to 0.

    The first update has 1/warmup of the peak. EDIT HERE for another schedule. It is a function of
    the update alone, so it has no state. A resume does not notice that it was edited.
    """
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * num_updates
    warmup = max(1, round(warmup))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, num_updates - warmup)  # from 0 to pi
    return config.learning_rate * 0.5 * (1 + math.cos(angle))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay. Biases, norms and scales have fewer than two dimensions."""
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
