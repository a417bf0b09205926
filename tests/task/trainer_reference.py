"""The job of train.py done by a subclass of transformers.Trainer that overrides private methods: what train.py stands in for.

    accelerate launch --config_file accelerate_config/cpu.yaml tests/task/trainer_reference.py --data_dir default_data --max_steps 30

Flags, initial weights, rows, optimizer and learning rates are train.py's. The loop, clipping, logging and the shared evaluation
are Trainer's; the rerank evaluation is the usual one. Nothing of evaluate.py is used, so that the two can be held against each
other, in numbers and in time. The comments say what one has to know of Trainer's inside.

For one process, or several under DDP. --output_dir gets log.jsonl, under train.py's names, and model/; the folder that RECORD
names, if any, the rows that each process trained on and their losses.

N queries, C candidates (of the longest list), B batch, D embedding size, W processes.
"""

import json
import math
import os
import sys
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments

from config import read_config
from data import read_datasets
from metrics import compute_metrics
from model import load_model
from runtime.batches import Key, TrainSampler, updates_per_epoch, whole
from runtime.launch import finish
from train import learning_rate_at, parameter_groups


def main():
    config = read_config(sys.argv[1:])
    set_seed(
        config.seed
    )  # Trainer seeds only when it is built, and by then the model has its weights
    model = load_model(config.model_name_or_path)
    train_dataset, eval_dataset, rerank_dataset = read_datasets(
        config, model, ("train", "eval", "test_vocabulary")
    )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    global_batch_size = (
        config.per_device_train_batch_size * processes * config.gradient_accumulation_steps
    )
    num_updates = config.max_steps or config.num_train_epochs * updates_per_epoch(
        len(train_dataset), global_batch_size
    )
    trainer = make_trainer(config, model, train_dataset, eval_dataset, rerank_dataset, num_updates)
    trainer.train()
    trainer.save_model(f"{config.output_dir}/model")
    if trainer.is_world_process_zero():
        write_log(Path(config.output_dir) / "log.jsonl", trainer.state.log_history)
    if "RECORD" in os.environ:
        Path(os.environ["RECORD"], f"{trainer.args.process_index}.json").write_text(
            json.dumps(trainer.record)
        )
    finish(trainer.accelerator)


def make_trainer(
    config,
    model,
    train_dataset,
    eval_dataset,
    rerank_dataset,
    num_updates,
    data_collator=whole,
    **options,
):
    """options: of RerankTrainer, and of Trainer."""
    trainer = RerankTrainer(
        rerank_dataset,
        model=model,
        args=training_arguments(config, num_updates),
        data_collator=data_collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=compute_metrics,
        optimizers=optimizer_and_scheduler(config, model, num_updates),
        # Whatever the model returns would be gathered and go to compute_metrics: here losses (B,) and scores (B, 1 + k).
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(config, num_updates):
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=num_updates,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_on_start=True,
        eval_strategy="steps",  # after the last update too, whatever eval_steps is
        eval_steps=config.eval_steps or num_updates,
        logging_steps=config.logging_steps or num_updates,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # else `index` and `weight`, of which `forward` does not know, are dropped
        dataloader_num_workers=config.dataloader_num_workers,
        ddp_find_unused_parameters=False,  # True for a PreTrainedModel: DDP then walks the graph at every step
        use_cpu=not torch.accelerator.is_available(),  # else processes on a CPU do not find each other, and each trains alone
    )


def optimizer_and_scheduler(config, model, num_updates):
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=1.0, eps=1e-6, fused=True
    )
    # Trainer steps this scheduler itself, once an update. One that went through accelerate would step once for each process.
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, num_updates, config)
    )


class RerankTrainer(Trainer):
    def __init__(self, rerank_dataset, cache=True, **options):
        """cache: whether a process keeps an element's embedding for the later queries of the same evaluation."""
        super().__init__(**options)
        self.rerank_dataset, self.cache = rerank_dataset, cache
        self.record = {"trained": [], "losses": []}  # of each micro-batch, where it is asked for

    def _get_train_sampler(self, train_dataset=None):
        # The whole run in one: Trainer divides its length by the global batch, finds max_steps, and counts a single epoch.
        global_batch_size = self.get_total_train_batch_size(self.args)
        return TrainSampler(
            self.train_dataset.item_weights,
            global_batch_size,
            self.args.max_steps,
            self.args.seed,
        )

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if (
            self.state.global_step == 0
        ):  # eval_on_start comes straight here, past _maybe_log_save_evaluate
            self._rerank_evaluate()
        return metrics

    def _get_eval_sampler(self, eval_dataset):
        # eval/loss is Trainer's own: each batch's mean, once for each of its rows. On several processes accelerate fills the last
        # batch with the first rows, and they are in that mean.
        return [Key(index) for index in range(len(eval_dataset))]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # For evaluation too, by way of prediction_step. `inputs` is a copy, so pop takes nothing from the caller. As long as
        # `forward` has no **kwargs, num_items_in_batch is None and Trainer divides by the micro-batches; else it does not.
        index, weight = inputs.pop("index"), inputs.pop("weight")  # (B,), (B,)
        outputs = model(**inputs)
        losses = outputs["losses"]  # (B,)
        if "RECORD" in os.environ and model.training:
            self.record["trained"].append(index.tolist())
            self.record["losses"].append(losses.tolist())
        loss = (losses * weight).mean()
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys, start_time, learning_rate=None
    ):
        # Private: over the versions it had five arguments, six, seven, eight. It runs after global_step was counted, and once
        # more after the epoch, with nothing due. What is due stands in `control`, where super() clears it: so it is read before.
        due = self.control.should_evaluate
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys, start_time, learning_rate
        )
        if due:
            self._rerank_evaluate()

    def _rerank_evaluate(self):
        # Too late for the best model: super() chose by what _evaluate returned, and has saved.
        return self.rerank_evaluate()

    def rerank_evaluate(self):
        metrics = self.rerank_evaluation_loop(self.get_rerank_eval_dataloader())
        # log files it under global_step. wandb's callback, which knows only eval_ and test_, would make train/rerank_... of it.
        self.log({f"rerank_{name}": value for name, value in metrics.items()})
        return metrics

    def get_rerank_eval_dataloader(self):
        # Not by _get_dataloader, since Trainer has one data_collator for everything.
        options = {"batch_size": 1, "collate_fn": itemgetter(0)}
        options["num_workers"] = self.args.dataloader_num_workers
        options["pin_memory"] = self.args.dataloader_pin_memory
        dataloader = DataLoader(QueryDataset(self.rerank_dataset), **options)
        # Deals out the queries. It keeps every DataLoader until the run ends.
        return self.accelerator.prepare(dataloader)

    def rerank_evaluation_loop(self, dataloader):
        # Not set back, here as in evaluation_loop: training_step calls model.train() each time.
        self.model.eval()
        width = self.rerank_dataset.candidates.shape[1]  # C
        embeddings = {}  # element -> (D,)
        gathered = []
        for batch in dataloader:
            elements = batch["elements"]
            new = [column for column, element in enumerate(elements) if element not in embeddings]
            with torch.no_grad():
                # self.model is what DDP wraps: no process waits in it, so each may call it as often as its queries need.
                page = self.model(images=batch["page"])["outputs"]  # (1, D)
                if new:
                    outputs = self.model(images=batch["candidates"][new])["outputs"]  # (new, D)
                    embeddings |= {elements[i]: row for i, row in zip(new, outputs, strict=True)}
            candidates = torch.stack([embeddings[element] for element in elements])  # (its, D)
            scores = torch.full((1, width), -math.inf, device=page.device)  # (1, C)
            scores[0, : len(elements)] = (page * candidates).sum(1)
            # In the loop: only while it is at the last batch does it know which queries accelerate repeated, and drop them.
            found = self.accelerator.gather_for_metrics((batch["index"], scores))  # (W,), (W, C)
            gathered.append(found)
            if not self.cache:
                embeddings.clear()
        columns = zip(*gathered, strict=True)
        index, rows = (torch.cat(column).cpu() for column in columns)  # (N,), (N, C)
        scores = torch.full_like(rows, math.nan)
        scores[index] = rows
        labels = self.rerank_dataset.labels  # (N,)
        return self.compute_metrics(EvalPrediction(predictions=scores.numpy(), label_ids=labels))


class QueryDataset(Dataset):
    """One query an item, its page and all its candidates, over the rows of a RerankDataset."""

    def __init__(self, rerank_dataset):
        self.table = rerank_dataset.table
        self.pages, self.elements = rerank_dataset.pages, rerank_dataset.elements

    def __len__(self):
        return len(self.table.labels)

    def __getitem__(self, index):
        elements = self.table.candidates(index).tolist()
        return {
            "index": torch.tensor([index]),  # (1,)
            "page": self.pages.take(self.table.queries[[index]]),  # (1, 3, H, W) uint8
            "elements": elements,
            "candidates": self.elements.take(elements),  # (candidates of this query, 3, h, w) uint8
        }


def write_log(path, log_history):
    """A line a step, under train.py's names. Trainer has an entry for each call of `log`: three for a step that evaluates."""
    lines = defaultdict(dict)
    for entry in log_history:
        line = lines[entry["step"]]
        line.update(
            {
                f"train/{name}": entry[name]
                for name in ("loss", "grad_norm", "learning_rate")
                if name in entry
            }
        )
        line.update(
            {
                name.replace("_", "/", 1): entry[name]
                for name in entry
                if name.startswith(("eval_", "rerank_"))
            }
        )
    path.write_text(
        "".join(json.dumps({"step": step, **line}) + "\n" for step, line in lines.items()),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
