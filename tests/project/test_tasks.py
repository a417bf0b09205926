"""The tasks that the diffs in docs/ make of a copy: each diff is small, and its copy trains. Its
numbers are those of plain transformers, one row at a time, or of Trainer. One launch for each."""

import ast
import csv
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, column, launch, read_log
from measures import Run, beyond_bounds, measure
from test_copies import TASKS, start_project
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

MAY_CHANGE = {"data.py", "model.py", "metrics.py", "config.py", "report.py"}
EPOCHS, GLOBAL_BATCH = 3, 8  # 41 rows: an epoch ends with a batch of one
LAUNCH = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4]  # x 2 processes
LAUNCH += ["--per_device_eval_batch_size", 4, "--num_train_epochs", EPOCHS, "--logging_steps", 1]
LAUNCH += ["--learning_rate", 5e-3, "--eval_steps", 0, "--report_to", "none"]
UNCLIPPED = ["--max_steps", 7, "--max_grad_norm", 0]
FAULTS = {  # {what is planted: the proof that finds it}, a part of those in tests/loop
    "a DataLoader that is not prepared": "rows",
    "a forward around the wrapper": "gradient",
    "a positional join after the gather": "first evaluation",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{task: a project that is started as the README says}"""
    made = {}
    for task in TASKS:
        made[task] = tmp_path_factory.mktemp(task) / "copy"
        start_project(made[task], task)
    return made


@pytest.fixture(scope="module")
def runs(folders):
    """The runs of a task by its name. Each launch is made once, of two processes."""
    made = {}

    def run_of(task):
        if task not in made:
            made[task] = run(task, folders[task])
        return made[task]

    return run_of


def run(task, copy):
    tiny = runpy.run_path(str(copy / "tests" / "tiny_task.py"))
    folder = copy.parent
    data, model, output = (folder / name for name in ("data", "model", "output"))
    tiny["make_data"](data)
    tiny["make_model"](model, 0.0)
    flags = ["--data_dir", data, "--model_name_or_path", model, *tiny["OPTIONS"], *LAUNCH]
    descriptions = []
    for name in ("output", "unclipped", *FAULTS):
        arguments = [*flags, "--output_dir", folder / name]
        arguments += UNCLIPPED if name != "output" else []
        description = {"name": name, "program": "train.py", "gradients": name != "output"}
        description |= {"fault": name} if name in FAULTS else {}
        descriptions.append(description | {"arguments": [str(word) for word in arguments]})
    launch(
        copy / "tests" / "loop" / "recorded_run.py",
        config="cpu_2_processes",
        cwd=copy,
        RUNS=json.dumps(descriptions),
        FOLDER=str(folder),
    )
    first, lines = read_log(output)
    last = output / "checkpoints" / f"step_{lines[-1]['step']:08d}"
    counts = {path.rpartition("/")[2]: count for path, count in first["data"].items()}
    return Namespace(
        recorded={each["name"]: Run(folder, each["name"], 2, 4) for each in descriptions},
        copy=copy,
        data=data,
        model=model,
        output=output,
        last=last,
        lines=lines,
        counts=counts,
        max_grad_norm=first["config"]["max_grad_norm"],
    )


def diff_of(task):
    return REPOSITORY / "docs" / f"{task}.diff"


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load(auto, folder):
    """The model, as plain transformers loads it, and its tokenizer."""
    return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("task", TASKS)
def test_a_diff_is_small_and_changes_what_a_task_is(folders, task):
    body = diff_of(task).read_text(encoding="utf-8").partition("\ndiff --git")[2].splitlines()
    assert sum(line.startswith("+") and not line.startswith("+++ ") for line in body) <= 120
    changed = {
        str(path.relative_to(folders[task]))
        for path in folders[task].glob("**/*.py")
        if path.read_bytes() != (REPOSITORY / path.relative_to(folders[task])).read_bytes()
    }
    assert changed - MAY_CHANGE <= {"train.py", "evaluate.py", "tests/tiny_task.py"}
    for name in ("train.py", "evaluate.py"):  # of these main, and the table of evaluations
        before, after = (functions(folder / name) for folder in (REPOSITORY, folders[task]))
        assert {f for f in before | after if before.get(f) != after.get(f)} <= {
            "main",
            "make_evaluations",
        }


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: ast.dump(node) for node in tree.body if hasattr(node, "name")}


@pytest.mark.parametrize("task", TASKS)
def test_the_files_of_a_copy_are_clean(folders, task):
    for command in ("check", "format --check"):
        command = [sys.executable, "-m", "ruff", *command.split(), "."]
        done = subprocess.run(command, cwd=folders[task], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("task", TASKS)
def test_a_tiny_task_is_as_small_as_a_copier_would_write_it(task):
    path = REPOSITORY / "tests" / "project" / "tiny_tasks" / f"{task}.py"
    assert 13 <= len(path.read_text(encoding="utf-8").splitlines()) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_three_proofs_hold_for_it(runs, task):
    """Rows, and the gradient, are what they are said to be; planted faults are found."""
    recorded = runs(task).recorded
    assert not beyond_bounds(measure(recorded["output"]))
    found = measure(recorded["unclipped"])
    assert found.keys() >= {"rows", "gradient", "items", "arrays"} and not beyond_bounds(found)
    for fault, proof in FAULTS.items():
        assert proof in beyond_bounds(measure(recorded[fault], recorded["unclipped"])), fault


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_it_learns_and_saves_what_plain_transformers_loads(runs, task):
    run = runs(task)
    assert run.counts["train.csv"]["used"] == 41 and run.counts["eval.csv"]["used"] > 10
    assert run.counts["train.csv"].keys() - {"used"}  # some are left out, and counted
    losses = column(run.lines, "eval/loss")
    assert losses[max(losses)] < 0.85 * losses[0]
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    for folder in (run.output / "best", run.last):
        (model, tokenizer), (_, before) = load(auto, folder), load(auto, run.model)
        assert tokenizer("abc한")["input_ids"] == before("abc한")["input_ids"]
        assert not list(folder.glob("*.bin"))
    assert (
        model.config.id2label
        == {
            "text_reranking": {0: "LABEL_0"},
            "text_classification": {0: "negative", 1: "positive"},
            "causal_lm": {0: "LABEL_0", 1: "LABEL_1"},
        }[task]
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_evaluate_on_one_process_gives_the_numbers_of_training(runs, task, tmp_path):
    run = runs(task)
    flags = ["--model_dir", run.last, "--output_dir", tmp_path]
    done = launch(run.copy / "evaluate.py", *flags, cwd=run.copy)
    printed = dict(re.findall(r"^(\w+/\S+) +(\S+)$", done.stdout, re.MULTILINE))
    logged = {name: value for name, value in run.lines[-1].items() if "/" in name}
    logged = {name: value for name, value in logged.items() if not name.startswith("train/")}
    assert printed == {name: f"{value:.6f}" for name, value in logged.items()}
    (table,) = tmp_path.glob("*.csv")
    assert table.read_bytes() == (run.output / table.name).read_bytes()


def train_one_row_at_a_time(run, model, rows, loss_of):
    """A plain loop over the same rows: [(loss, norm of the gradient) of each update].

    loss_of(row): the sum of the losses of what counts in a row, and how many these are.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=1e-6)
    rates = column(run.lines, "train/learning_rate")
    max_norm = float(run.max_grad_norm)
    updates = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng((0, epoch)).permutation(len(rows))
        for start in range(0, len(rows), GLOBAL_BATCH):
            total = count = 0
            for i in order[start : start + GLOBAL_BATCH]:
                loss, of = loss_of(rows[i])
                loss.backward()
                total, count = total + loss.item(), count + of
            for parameter in model.parameters():
                parameter.grad /= count
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
            updates.append((total / count, norm))
            for group in optimizer.param_groups:
                group["lr"] = rates[len(updates)]
            optimizer.step()
            optimizer.zero_grad()
    return updates


def assert_the_same_training(run, updates):
    # Not the weights at the end: where a gradient is 0 but for rounding, Adam moves by whole steps.
    names = ("train/loss", "train/grad_norm")
    logged = np.array([list(column(run.lines, name).values()) for name in names]).T
    assert len(updates) == EPOCHS * 6
    differences = np.abs(logged / updates - 1).max(0)
    print("largest relative difference of loss and of norm:", differences)
    assert differences.max() < 1e-5


@pytest.mark.slow
def test_a_language_model_is_trained_as_one_row_at_a_time_would(runs):
    """The loss is the mean over the tokens of the global batch, at an epoch's odd end too."""
    run = runs("causal_lm")
    model, tokenizer = load(AutoModelForCausalLM, run.model)
    texts = [row["text"] for row in read_csv(run.data / "csv" / "train.csv")]
    rows = [ids for ids in map(tokens_of(tokenizer), texts) if len(ids) > 1]
    assert len({len(ids) for ids in rows}) > 5 and max(map(len, rows)) == 12
    updates = train_one_row_at_a_time(run, model, rows, lambda ids: summed_loss(model, ids))
    assert_the_same_training(run, updates)


def tokens_of(tokenizer):
    return lambda text: tokenizer(text, truncation=True, max_length=12)["input_ids"]


def summed_loss(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    loss = functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    return loss, len(ids) - 1


@pytest.mark.slow
def test_perplexity_and_generation_of_one_row_at_a_time(runs):
    run = runs("causal_lm")
    model, tokenizer = load(AutoModelForCausalLM, run.last)
    texts = [row["text"] for row in read_csv(run.data / "csv" / "eval.csv")]
    with torch.no_grad():
        rows = [summed_loss(model, ids) for ids in map(tokens_of(tokenizer), texts) if len(ids) > 1]
    mean = sum(loss.item() for loss, _ in rows) / sum(count for _, count in rows)
    assert run.lines[-1]["eval/loss"] == pytest.approx(mean, rel=1e-6)
    assert run.lines[-1]["eval/perplexity"] == pytest.approx(np.exp(mean), rel=1e-6)

    matches, prompts = [], read_csv(run.output / "generated_generate.csv")
    for row in prompts:
        # The longest continuation has 3 tokens, which leaves 9 of max_length for the prompt.
        prompt = tokenizer(row["text"])["input_ids"][-9:]
        for _ in range(3):
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            prompt = [*prompt, logits.argmax().item()]
        assert row["generated"] == tokenizer.decode(prompt[-3:])
        expected = tokenizer(row["continuation"])["input_ids"]
        matches.append(prompt[-3:][: len(expected)] == expected)
    source = read_csv(run.data / "csv" / "generate.csv")
    assert [row["text"] for row in prompts] == [r["text"] for r in source if len(r["text"]) > 1]
    assert 0 < np.mean(matches) < 1
    assert run.lines[-1]["generate/exact_match"] == pytest.approx(np.mean(matches), abs=1e-12)


@pytest.mark.slow
def test_a_classifier_is_trained_as_one_row_at_a_time_would(runs):
    run = runs("text_classification")
    model, tokenizer = load(AutoModelForSequenceClassification, run.model)
    rows = [row for row in read_csv(run.data / "csv" / "train.csv") if row["text"]]

    def loss_of(row):
        tokens = tokenizer(row["text"], truncation=True, max_length=10, return_tensors="pt")
        label = torch.tensor([row["label"] == "positive"]).long()
        return functional.cross_entropy(model(**tokens).logits, label), 1

    updates = train_one_row_at_a_time(run, model, rows, loss_of)
    assert_the_same_training(run, updates)


@pytest.mark.slow
def test_the_numbers_of_a_classifier_are_those_of_trainer(runs, tmp_path):
    """The same weights and the same compute_metrics, given to Trainer."""
    run = runs("text_classification")
    model, tokenizer = load(AutoModelForSequenceClassification, run.last)
    rows = [row for row in read_csv(run.data / "csv" / "eval.csv") if row["text"]]
    dataset = [
        tokenizer(row["text"], truncation=True, max_length=10)
        | {"labels": model.config.label2id[row["label"]]}
        for row in rows
    ]
    options = {"per_device_eval_batch_size": 4, "use_cpu": True, "report_to": "none"}
    compute_metrics = runpy.run_path(str(run.copy / "metrics.py"))["compute_metrics"]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **options),
        data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=dataset,
        compute_metrics=compute_metrics,
    )
    expected = trainer.evaluate()
    for name in ("loss", "accuracy", "macro_f1"):
        difference = run.lines[-1][f"eval/{name}"] - expected[f"eval_{name}"]
        print(name, difference)
        assert abs(difference) < 1e-6, name

    # The metrics again, by the definition of F1, from what the report says was predicted.
    predicted = read_csv(run.output / "predictions_eval.csv")
    assert [row["text"] for row in predicted] == [row["text"] for row in rows]
    pairs = Counter((row["label"], row["predicted"]) for row in predicted)
    f1 = []
    for label in ("negative", "positive"):
        right = pairs[label, label]
        precision = right / sum(n for (_, said), n in pairs.items() if said == label)
        recall = right / sum(n for (true, _), n in pairs.items() if true == label)
        f1.append(2 * precision * recall / (precision + recall))
    assert run.lines[-1]["eval/macro_f1"] == pytest.approx(np.mean(f1), abs=1e-12)


@pytest.mark.slow
def test_ranks_of_texts_by_brute_force(runs):
    """A plain call of transformers for each pair, and a ranking that counts."""
    run = runs("text_reranking")
    model, tokenizer = load(AutoModelForSequenceClassification, run.last)
    texts = {row["resourceKey"]: row["text"] for row in read_csv(run.data / "texts.csv")}
    source = read_csv(run.data / "csv" / "test_vocabulary.csv")
    source = [row for row in source if row["candidate_resourceKey"] != "[]"]
    table, ranks = read_csv(run.output / "metric.csv"), []
    for written, row in zip(table, source, strict=True):
        keys = ast.literal_eval(row["candidate_resourceKey"])
        assert written["query"] == row["query"]
        assert json.loads(written["candidate_resourceKey"]) == keys
        scores = {}
        for key in keys:
            pair = tokenizer(row["query"], texts[key], truncation=True, max_length=8)
            pair = {name: torch.tensor([ids]) for name, ids in pair.items()}
            with torch.no_grad():
                scores[key] = model(**pair).logits.item()
        assert np.allclose(list(scores.values()), json.loads(written["score"]), atol=1e-5)
        relevant = scores.get(row["resourceKey"], -np.inf)
        rank = sum(score >= relevant - 1e-5 for score in scores.values())
        ranks.append(rank if row["resourceKey"] in scores else np.inf)
    assert np.isinf(ranks).any() and 1 in ranks
    expected = {"Recall@1": np.mean(np.array(ranks) == 1), "MRR@100": np.mean(1 / np.array(ranks))}
    for name, value in expected.items():
        assert run.lines[-1][f"rerank/{name}"] == pytest.approx(value, abs=1e-12)


@pytest.fixture
def texts(folders, monkeypatch):
    """The data.py of text re-ranking, beside that of the repository."""
    path = folders["text_reranking"] / "data.py"
    specification = importlib.util.spec_from_file_location("data_of_texts", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "data_of_texts", module)  # where its dataclass looks
    specification.loader.exec_module(module)
    return module


def read(texts, run, data=None):
    options = {"max_candidates": 400, "num_negatives": 3, "max_length": 8, "seed": 0}
    model = Namespace(tokenizer=AutoTokenizer.from_pretrained(run.last))
    config = Namespace(data_dir=data or run.data, **options)
    return texts.read_datasets(config, model, ("eval", "test_vocabulary"))


@pytest.mark.slow
def test_the_loss_of_texts_by_brute_force(texts, runs):
    """The cross-entropy of the relevant one among those that are drawn."""
    run = runs("text_reranking")
    model, tokenizer = load(AutoModelForSequenceClassification, run.last)
    dataset, rerank = read(texts, run)
    losses = []
    for row in range(len(dataset)):
        elements = dataset.draw(np.array([row]), 0)[0, : 1 + min(3, dataset.table.num_others[row])]
        query = dataset.pairs.queries[dataset.table.queries[row]]
        scores = []
        for element in elements:
            pair = tokenizer(query, dataset.pairs.texts[element], truncation=True, max_length=8)
            pair = {name: torch.tensor([ids]) for name, ids in pair.items()}
            with torch.no_grad():
                scores.append(model(**pair).logits[0, 0])
        losses.append(-torch.stack(scores).log_softmax(0)[0].item())
    assert run.lines[-1]["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    # A pair that is in several rows is scored once.
    rows = read_csv(run.output / "metric.csv")
    pairs = [
        (row["query"], key) for row in rows for key in json.loads(row["candidate_resourceKey"])
    ]
    assert len(rerank) == len(set(pairs)) < len(pairs)


@pytest.mark.slow
def test_texts_that_cannot_be_used(texts, runs, tmp_path):
    run = runs("text_reranking")
    shutil.copytree(run.data, tmp_path / "data")
    lines = (run.data / "texts.csv").read_text(encoding="utf-8").splitlines()
    for changed, message in (
        (lines[:-1], r"texts.csv: no '글27' \(named by .*csv, row \d+\)"),
        ([*lines, lines[7]], rf"texts.csv, row {len(lines) + 1}: '글6' is there already"),
        (["key,text", *lines[1:]], r"texts.csv: the columns \['resourceKey'\] are missing"),
    ):
        (tmp_path / "data" / "texts.csv").write_text("\n".join(changed), encoding="utf-8")
        texts.read_texts.cache_clear()
        with pytest.raises(texts.UserError, match=message):
            read(texts, run, tmp_path / "data")
