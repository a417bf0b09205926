"""The same numbers, however the run is launched: each way of running by a real launch, held against one process.

    python -m pytest tests/test_parity.py --write-table      # also writes the README's table anew

The runs are of 30 updates on a small cut of the default data, whose rows do not divide by the global batch. The learning rate
is low: rounding differences grow with it from update to update, and would hide what a test is to see.
"""

import json
import math
import re
import socket
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.utils import set_seed
from conftest import REPOSITORY, column, launch, read_log
from safetensors.torch import load_file

import evaluate
import metrics
import sample_data
import train
from data import read_datasets
from model import DualEncoder

ROWS = {"train": 149, "eval": 21, "test_vocabulary": 19}
GLOBAL_BATCH, UPDATES = 12, 30  # 149 rows: 13 updates an epoch, the last one with 5 rows
# Clipping is at work in some updates and not in others (the norm goes from 2 to 9), and 1.0, which DeepSpeed takes when it is
# told nothing, would be noticed.
OPTIONS = [
    "--max_steps",
    UPDATES,
    "--log_every",
    1,
    "--eval_every",
    0,
    "--learning_rate",
    3e-5,
    "--max_grad_norm",
    5,
]
OPTIONS += ["--per_device_eval_batch_size", 16]

WAYS = {  # name in the README's table -> (config, what the log calls the strategy, processes, accumulation)
    "1 process": ("cpu", "NO", 1, 1),
    "1 process, accumulation 2": ("cpu", "NO", 1, 2),
    "1 process, accumulation 4": ("cpu", "NO", 1, 4),
    "DDP × 2": ("cpu_2_processes", "MULTI_CPU", 2, 1),
    "DDP × 3": ("cpu_2_processes", "MULTI_CPU", 3, 1),
    "DDP × 4": ("cpu_2_processes", "MULTI_CPU", 4, 1),
    "DDP, 2 machines × 1": ("two_machines", "MULTI_CPU", 2, 1),
    "ZeRO-1 × 2": ("zero1", "DEEPSPEED", 2, 1),
    "ZeRO-2 × 2": ("zero2", "DEEPSPEED", 2, 1),
    "ZeRO-3 × 2": ("zero3", "DEEPSPEED", 2, 1),
    "ZeRO-3, 2 machines × 1, accumulation 2": ("two_machines_zero3", "DEEPSPEED", 2, 2),
    "FSDP2 × 2": ("fsdp2", "FSDP", 2, 1),
}
pytestmark = pytest.mark.slow
SHORT = (
    "1 process",
    "DDP × 2",
    "ZeRO-3, 2 machines × 1, accumulation 2",
    "FSDP2 × 2",
)  # the others with --all
EACH_WAY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in WAYS]
)
# What may differ from one process, at most. loss, learning_rate: relative, of any update; weights: the distance between the two
# ends as a share of the way from the beginning; the others count what is not equal to the bit, or not there exactly once.
BOUNDS = {"loss": 1e-5, "learning_rate": 0, "weights": 0.01}
BOUNDS |= {"metrics": 0, "metric_csv": 0, "rows": 0, "inputs": 0, "reevaluated": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_data, "PAGES", ROWS)
        sample_data.build(folder, progress=False)
    return folder


class Runs(dict):
    """Each way of running, launched when it is first asked for."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def __missing__(self, name):
        config, _, processes, accumulation = WAYS[name]
        folder = self.folder / re.sub(r"\W+", "_", name)
        folder.mkdir()
        batch = GLOBAL_BATCH // processes // accumulation
        arguments = ["--data_dir", self.data, "--output_dir", folder / "output", *OPTIONS]
        arguments += [
            "--per_device_batch_size",
            batch,
            "--gradient_accumulation_steps",
            accumulation,
        ]
        options = {
            "config": config,
            "processes": processes,
            "mixed_precision": "no",
            "RECORD": str(folder),
        }
        if config == "fsdp2":
            options["FSDP2_ON_CPU"] = "1"
        if config.startswith("two_machines"):
            launch_two_machines("tests/loop/recorded_run.py", *arguments, **options)
        else:
            launch("tests/loop/recorded_run.py", *arguments, **options)
        self[name] = read_run(folder, processes)
        return self[name]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return Runs(data, tmp_path_factory.mktemp("parity"))


def launch_two_machines(script, *arguments, **options):
    """Two launches at the same time, as on two machines; they meet at a port of this one."""
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    flags = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    with ThreadPoolExecutor() as pool:
        machines = [
            pool.submit(
                launch, script, *arguments, launch_flags=["--machine_rank", rank, *flags], **options
            )
            for rank in (0, 1)
        ]
    return [machine.result() for machine in machines]


def read_run(folder, processes):
    records = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    first, lines = read_log(folder / "output")
    (last,) = (folder / "output" / "checkpoints").iterdir()
    return Namespace(
        folder=folder, first=first, lines=lines, records=records, model_dir=last, differences=None
    )


def differences(run, one, data):
    """{what: how far `run` is from `one`, the run on one process}, in the units of BOUNDS."""
    if run.differences is None:
        run.differences = measure(run, one, data)
    return run.differences


def measure(run, one, data):
    weights, end = (load_file(each.model_dir / "model.safetensors") for each in (run, one))
    same_weights = {
        name: value for name, value in one.lines[0].items() if name.startswith(("eval/", "rerank/"))
    }
    assert "rerank/MRR@100" in same_weights and one.lines[0]["step"] == 0
    return {
        "loss": largest_difference(run, one, "train/loss"),
        "learning_rate": largest_difference(run, one, "train/learning_rate"),
        "weights": distance(weights, end) / distance(initial_weights(), end),
        "metrics": sum(run.lines[0].get(name) != value for name, value in same_weights.items()),
        "metric_csv": int(
            (run.folder / "metric_0.csv").read_bytes() != (one.folder / "metric_0.csv").read_bytes()
        ),
        "rows": rows_not_trained_once(run) + (stream(run) != stream(one)),
        "inputs": inputs_not_encoded_once(run, data),
        "reevaluated": numbers_that_one_process_does_not_give_again(run),
    }


def largest_difference(run, one, name):
    ours, theirs = column(run.lines, name), column(one.lines, name)
    return max(abs(ours.get(step, math.inf) - value) / abs(value) for step, value in theirs.items())


def distance(weights, others):
    assert weights.keys() == others.keys()
    return (
        torch.cat([(weights[name].double() - others[name]).flatten() for name in weights])
        .norm()
        .item()
    )


def initial_weights():
    set_seed(0)
    return train.load_model(None).state_dict()


def stream(run):
    """The rows of training in the order of the whole run, -1 for filling: each process has every W-th micro-batch."""
    together = zip(*(record["trained"] for record in run.records), strict=True)
    return [row for micro_batches in together for rows in micro_batches for row in rows]


def rows_not_trained_once(run):
    """How many rows were not seen exactly once in each whole epoch."""
    epoch = math.ceil(ROWS["train"] / GLOBAL_BATCH) * GLOBAL_BATCH
    rows = stream(run)
    epochs = [
        Counter(rows[start : start + epoch]) for start in range(0, len(rows) - epoch + 1, epoch)
    ]
    assert epochs
    return sum(seen[row] != 1 for seen in epochs for row in range(ROWS["train"]))


def inputs_not_encoded_once(run, data):
    """Of the two evaluations of a run, each over the rows of eval.csv and the distinct images of test_vocabulary.csv."""
    config = Namespace(**run.first["config"] | {"data_dir": data})
    rerank = read_datasets(config, train.load_model(None), ("eval", "test_vocabulary"))[1]
    times = Counter(
        index
        for record in run.records
        for batch in record["predicted"]
        for index in batch
        if index >= 0
    )
    return sum(times[index] != 2 * (1 + (index < ROWS["eval"])) for index in range(len(rerank))) + (
        len(times) != len(rerank)
    )


def numbers_that_one_process_does_not_give_again(run):
    """Of the last evaluation of training, metric.csv counting as one: evaluated again, from the saved weights, by one process."""
    config = json.loads((run.model_dir / "training_config.json").read_text())
    config = Namespace(**config | {"output_dir": run.folder})
    model = DualEncoder.from_pretrained(run.model_dir)
    shared, rerank = read_datasets(config, model, ("eval", "test_vocabulary"))
    accelerator = evaluate.make_accelerator()
    values = evaluate.evaluate(accelerator, model, shared, metrics.compute_metrics, config)
    values |= evaluate._rerank_evaluate(accelerator, model, rerank, metrics.compute_metrics, config)
    again, left = (
        (folder / "metric.csv").read_bytes() for folder in (run.folder, run.folder / "output")
    )
    return sum(run.lines[-1].get(name) != value for name, value in values.items()) + (again != left)


@EACH_WAY
def test_the_launch_is_the_one_that_was_asked_for(name, runs):
    _, strategy, processes, _ = WAYS[name]
    assert (runs[name].first["strategy"], runs[name].first["processes"]) == (strategy, processes)
    assert [line["step"] for line in runs[name].lines] == list(range(UPDATES + 1))


@EACH_WAY
def test_the_numbers_are_those_of_one_process(name, runs, data):
    found = differences(runs[name], runs["1 process"], data)
    assert found.keys() == BOUNDS.keys()
    assert not {what: value for what, value in found.items() if not value <= BOUNDS[what]}


def test_clipping_is_tested(runs):
    norms = column(runs["1 process"].lines, "train/grad_norm").values()
    assert min(norms) < 5 < max(norms)


@pytest.mark.long
def test_the_readme_has_the_table(runs, data, pytestconfig):
    """Figures below a bound vary with the processor, so they may differ; all else must be as it is measured here."""
    one = runs["1 process"]
    found = {name: differences(runs[name], one, data) for name in WAYS}
    path = REPOSITORY / "README.md"
    before, table, after = re.split(
        r"(?<=<!-- parity -->\n)(.*?)(?=\n\n)",
        path.read_text(encoding="utf-8"),
        maxsplit=1,
        flags=re.DOTALL,
    )
    measured = parity_table(found)
    if pytestconfig.getoption("--write-table"):
        path.write_text(before + measured + after, encoding="utf-8")
    else:
        figure = r"\d\.\de[-+]\d\d"
        assert re.sub(figure, "figure", table) == re.sub(figure, "figure", measured)


def parity_table(found):
    def equal(count):
        return "equal" if count == 0 else f"{count} differ"

    def once(count):
        return "each once" if count == 0 else f"{count} not once"

    lines = [
        "| | loss | learning rate | weights | metrics, metric.csv | rows trained | images encoded | `best/` on one process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found.items():
        figures = [
            f"{value:.1e}" if value else "0"
            for value in (run["loss"], run["learning_rate"], run["weights"])
        ]
        counts = [
            equal(run["metrics"] + run["metric_csv"]),
            once(run["rows"]),
            once(run["inputs"]),
            equal(run["reevaluated"]),
        ]
        lines.append(f"| {' | '.join([name, *figures, *counts])} |")
    return "\n".join(lines)


# ---- transformers.Trainer itself


@pytest.fixture(
    scope="module", params=["1 process", pytest.param("DDP × 2", marks=pytest.mark.long)]
)
def with_trainer(request, runs, data, tmp_path_factory):
    """(our run, the one of tests/task/trainer_reference.py), launched with the same flags."""
    config, _, processes, accumulation = WAYS[request.param]
    folder = tmp_path_factory.mktemp("trainer")
    batch = GLOBAL_BATCH // processes // accumulation
    launch(
        *(
            "tests/task/trainer_reference.py",
            "--data_dir",
            data,
            "--output_dir",
            folder / "output",
            *OPTIONS,
        ),
        *("--per_device_batch_size", batch, "--gradient_accumulation_steps", accumulation),
        config=config,
        processes=processes,
        RECORD=str(folder),
    )
    records = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    lines = [
        json.loads(line) for line in (folder / "output" / "log.jsonl").read_text().splitlines()
    ]
    trainer = Namespace(records=records, lines=lines, model_dir=folder / "output" / "model")
    return runs[request.param], trainer


def test_trainer_trains_to_the_same_bits(with_trainer):
    ours, trainer = with_trainer
    for name in ("trained", "losses"):  # of each row of each micro-batch
        assert [record[name] for record in ours.records] == [
            record[name] for record in trainer.records
        ]
    for name in ("train/learning_rate", "train/grad_norm"):
        assert column(ours.lines, name) == column(trainer.lines, name) != {}
    assert (
        distance(*(load_file(run.model_dir / "model.safetensors") for run in (ours, trainer))) == 0
    )
    # Trainer logs the mean in float32, of means of micro-batches; ours is of the same rows, in float64.
    assert largest_difference(ours, trainer, "train/loss") < 1e-6


def test_trainer_evaluates_to_the_same_metrics(with_trainer):
    ours, trainer = with_trainer
    for step in (0, UPDATES):
        for prefix in ("eval", "rerank"):
            (theirs,) = [line for line in trainer.lines if line["step"] == step]
            values = {
                name: theirs[name]
                for name in ours.lines[step]
                if re.match(rf"{prefix}/(Recall|MRR)@", name)
            }
            assert len(values) == 14 and values.items() <= ours.lines[step].items()
    if len(trainer.records) == 1:
        # On several processes Trainer's own eval/loss is wrong: it takes in the rows that fill the last batch.
        assert largest_difference(ours, trainer, "eval/loss") < 1e-6


# ---- faults, put in on purpose, and the check that finds each


FAULTS = {
    "a DataLoader left unprepared": "rows",
    "a forward that goes around the wrapper": "weights",
    "a mean of batch means": "loss",
    "a mean of batch means in the evaluation": "metrics",
    "a positional join after the gather": "metric_csv",
    "a scheduler stepped once per process": "learning_rate",
}


@pytest.fixture(scope="module")
def faulty_runs(data, tmp_path_factory):
    """{fault: its run on two processes}, "none" among them, and "one process", without a fault."""
    folder = tmp_path_factory.mktemp("faults")
    arguments = ["--data_dir", data, *OPTIONS]
    arguments += [
        "--max_steps",
        15,
        "--num_negatives",
        1,
    ]  # an epoch, its last batch with 5 rows, and 2 updates more
    for name, config, processes in (("one", "cpu", 1), ("two", "cpu_2_processes", 2)):
        faults = ["none", *FAULTS] if name == "two" else ["none"]
        batch = ["--per_device_batch_size", GLOBAL_BATCH // processes]
        launch(
            "tests/loop/faulty_run.py",
            *arguments,
            *batch,
            config=config,
            FAULTS=json.dumps(faults),
            FOLDER=str(folder / name),
        )
    two = {fault: read_run(folder / "two" / fault, 2) for fault in ["none", *FAULTS]}
    return two | {"one process": read_run(folder / "one" / "none", 1)}


def test_no_fault_is_found_where_there_is_none(faulty_runs, data):
    found = differences(faulty_runs["none"], faulty_runs["one process"], data)
    assert not {what: value for what, value in found.items() if not value <= BOUNDS[what]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, faulty_runs, data):
    found = differences(faulty_runs[fault], faulty_runs["one process"], data)
    assert found[FAULTS[fault]] > BOUNDS[FAULTS[fault]]
