"""Real launches of train.py and evaluate.py, on one process and on two, and what they leave behind."""

import json
import math
import re
import struct
import sys
from argparse import Namespace

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as functional
from conftest import REPOSITORY, column, launch, read_log, refused, write_data
from PIL import Image
from wandb.proto import wandb_internal_pb2

import evaluate
import train
from data import Key, decode_image, read_datasets
from model import DualEncoder, DualEncoderConfig
from runtime.launch import UserError

OPTIONS = [
    "--num_epochs",
    2,
    "--log_every",
    2,
    "--eval_every",
    6,
    "--save_every",
    5,
    "--num_negatives",
    3,
]
# At the default rate rounding differences grow tenfold an update on noise, and would hide what a test is to see.
OPTIONS += ["--per_device_eval_batch_size", 4, "--learning_rate", 1e-4]
MODEL = Namespace(config=DualEncoderConfig())  # what the data sets ask of the default model
UPDATES = 12  # 41 rows in global batches of 8: 6 an epoch, the last one with a single row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("run") / "data")


def run(data, folder, batch, processes=1, **options):
    arguments = [
        "--data_dir",
        data,
        "--output_dir",
        folder,
        *OPTIONS,
        "--per_device_batch_size",
        batch,
    ]
    done = launch(
        "tests/loop/recorded_run.py",
        *arguments,
        processes=processes,
        RECORD=str(folder.parent),
        wandb=True,
        **options,
    )
    records = [
        json.loads((folder.parent / f"{rank}.json").read_text()) for rank in range(processes)
    ]
    return Namespace(folder=folder, text=done.stdout, log=read_log(folder), records=records)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("one") / "output", batch=8)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    return run(
        data,
        tmp_path_factory.mktemp("two") / "output",
        batch=4,
        config="cpu_2_processes",
        processes=2,
    )


@pytest.mark.slow
def test_what_a_run_leaves(one):
    files = {"log.jsonl", "metric.csv", "contact_sheet.png", "curves.png"}
    assert {path.name for path in one.folder.iterdir()} == files | {"best", "checkpoints", "wandb"}
    assert {path.name for path in (one.folder / "checkpoints").iterdir()} == {
        "step_00000010",
        "step_00000012",
    }
    model = {"config.json", "model.safetensors", "training_config.json"}
    assert {path.name for path in (one.folder / "best").iterdir()} == model
    checkpoint = one.folder / "checkpoints" / "step_00000012"
    assert {path.name for path in checkpoint.iterdir()} == model | {
        "training_state",
        "run.json",
        "manifest.json",
    }
    first, lines = one.log
    assert first["config"]["num_negatives"] == 3 and first["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", first["git_commit"])
    assert list(first["data"].values())[0] == {
        "used": 41,
        "no_candidates": 0,
        "too_many_candidates": 0,
    }
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12]  # each step once
    assert list(column(lines, "eval/loss")) == list(column(lines, "rerank/MRR@100")) == [0, 6, 12]
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/samples_per_second",
    ):
        assert list(column(lines, name)) == [2, 4, 6, 8, 10, 12]
    assert "12 updates of 8 rows" in one.text and str(one.folder) in one.text
    assert "wandb sync" in one.text


@pytest.mark.slow
def test_the_order_of_calls_is_the_documented_one(one, two):
    update = ["maybe_log_save_evaluate"]
    evaluation = [
        "evaluate",
        "get_eval_dataloader",
        "evaluation_loop",
        "compute_metrics",
        "_rerank_evaluate",
        "rerank_evaluate",
        "get_rerank_eval_dataloader",
        "get_eval_dataloader",
        "rerank_evaluation_loop",
        "compute_metrics",
    ]
    expected = [
        name
        for step in range(UPDATES + 1)
        for name in update + (evaluation if step in (0, 6, 12) else [])
    ]
    for record in one.records + two.records:
        assert record["calls"] == expected
    # The README's table names the functions of the rerank evaluation, in this order.
    section = (
        (REPOSITORY / "README.md")
        .read_text(encoding="utf-8")
        .split("## From override to function")[1]
        .split("##")[0]
    )
    table = re.findall(r"^\| `(\w+)`(?:, \d+)? \|", section, re.MULTILINE)
    assert table == [
        "_maybe_log_save_evaluate",
        *(name for name in evaluation[4:] if name != "get_eval_dataloader"),
    ]


@pytest.mark.slow
def test_two_processes_are_two(one, two):
    assert two.log[0]["processes"] == 2 and one.log[0]["processes"] == 1
    assert two.log[0]["strategy"] == "MULTI_CPU"
    for record in two.records:
        assert len(record["trained"]) == UPDATES and all(
            len(rows) == 4 for rows in record["trained"]
        )
    assert two.text.count("12 updates of 8 rows") == 1  # the main process alone prints


@pytest.mark.slow
def test_evaluate_gives_the_numbers_of_training(two, data, tmp_path):
    """On one process and on two, to the last bit, metric.csv and the pictures included."""
    model = two.folder / "checkpoints" / "step_00000012"
    logged = two.log[1][-1]
    texts, files = [], ["contact_sheet.png", "gallery.html", "metric.csv", "qrels", "run"]
    for config in ("cpu", "cpu_2_processes"):
        arguments = [
            "--model_dir",
            model,
            "--data_dir",
            data,
            "--output_dir",
            tmp_path / config,
            "--gallery",
        ]
        arguments += ["--trec_dir", tmp_path / config]
        done = launch("evaluate.py", *arguments, config=config)
        printed = dict(re.findall(r"^((?:eval|rerank)/\S+) +(\S+)$", done.stdout, re.MULTILINE))
        assert printed == {
            name: f"{value:.6f}"
            for name, value in logged.items()
            if name.startswith(("eval/", "rerank/"))
        }
        texts.append(printed)
        assert sorted(path.name for path in (tmp_path / config).iterdir()) == files
    assert texts[0] == texts[1]
    for name in files:
        one, two_processes = (
            (tmp_path / config / name).read_bytes() for config in ("cpu", "cpu_2_processes")
        )
        assert one == two_processes and (
            name in ("gallery.html", "qrels", "run") or one == (two.folder / name).read_bytes()
        )


@pytest.mark.slow
def test_the_shared_evaluation_by_brute_force(one, data):
    config = Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0)
    dataset, _ = read_datasets(config, MODEL, ("eval", "test_vocabulary"))
    model = DualEncoder.from_pretrained(one.folder / "checkpoints" / "step_00000012").eval()
    losses, hits = [], []
    with torch.no_grad():
        for row in range(len(dataset)):
            item = {name: values[0] for name, values in dataset.__getitems__([Key(row)]).items()}
            elements = model(images=item["candidates"][item["candidate_mask"]])["outputs"]
            scores = elements @ model(images=item["pages"][None])["outputs"][0]
            losses.append(
                functional.cross_entropy(scores * model.log_scale.exp(), torch.tensor(0)).item()
            )
            hits.append(bool((scores[1:] < scores[0]).all()))
    logged = one.log[1][-1]
    assert logged["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert logged["eval/Recall@1"] == np.mean(hits)


@pytest.mark.slow
def test_metric_csv(one, data):
    table = pandas.read_csv(one.folder / "metric.csv")
    source = pandas.read_csv(data / "csv" / "test_vocabulary.csv")
    for name in ("search_word", "template_idx", "page_num", "x_image_path", "resourceKey"):
        assert table[name].tolist() == source[name].tolist()
    assert list(table)[5:10] == [
        "candidate_resourceKey",
        "score",
        "sorted_score",
        "sorted_candidate_resourcekey",
        "rank",
    ]
    logged = one.log[1][-1]
    for k in (1, 4, 5, 10, 20, 50, 100):
        assert table[f"Recall@{k}"].mean() == logged[f"rerank/Recall@{k}"]
        assert table[f"MRR@{k}"].mean() == pytest.approx(logged[f"rerank/MRR@{k}"], abs=1e-15)
    model = DualEncoder.from_pretrained(one.folder / "checkpoints" / "step_00000012").eval()
    for _, row in table.iterrows():
        keys, scores = json.loads(row["candidate_resourceKey"]), json.loads(row["score"])
        ordered = json.loads(row["sorted_candidate_resourcekey"])
        assert json.loads(row["sorted_score"]) == sorted(scores, reverse=True) and sorted(
            ordered
        ) == sorted(keys)
        assert ordered[int(row["rank"]) - 1] == row["resourceKey"]
        page = decode_image(data / "images" / f"{row['x_image_path']}.png", MODEL.config.page_size)
        elements = torch.stack(
            [
                decode_image(data / "elements" / f"{key}.png", MODEL.config.element_size)
                for key in keys
            ]
        )
        with torch.no_grad():
            cosines = model(images=elements)["outputs"] @ model(images=page[None])["outputs"][0]
        assert np.allclose(cosines, scores, atol=1e-6)


def wandb_records(path):
    """The records of an offline run: a log of 32 KiB blocks, in the format of LevelDB, behind a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_wandb_offline_holds_what_log_jsonl_holds(two):
    (path,) = (two.folder / "wandb").glob(
        "offline-run-*/run-*.wandb"
    )  # one run, of the main process
    history, config = {}, {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history[values["_step"]] = {
                name: value for name, value in values.items() if not name.startswith("_")
            }
        for source in (record.config, record.run.config):
            config |= {item.key: json.loads(item.value_json) for item in source.update}
    first, lines = two.log
    for step in (0, 6, 12):  # the metrics and the picture of an evaluation are one point
        names = ("filenames", "_type", "format", "count", "width", "height")
        picture = {name: history[step].pop(f"rerank/contact_sheet.{name}") for name in names}
        (sent,) = [path.parent / "files" / name for name in picture["filenames"]]
        assert Image.open(sent).size == (picture["width"], picture["height"])
    assert sent.read_bytes() == (two.folder / "contact_sheet.png").read_bytes()  # the last one
    assert history == {
        line["step"]: {name: value for name, value in line.items() if name != "step"}
        for line in lines
    }
    for name in ("config", "versions", "git_commit", "processes"):
        assert config[name] == first[name]


# ---- what goes wrong


@pytest.mark.slow
def test_a_loss_that_is_not_finite(data, tmp_path):
    message = refused(
        "train.py",
        *(
            "--data_dir",
            data,
            "--output_dir",
            tmp_path / "output",
            *OPTIONS[:-1],
            1e30,
            "--max_grad_norm",
            0,
        ),
        *("--per_device_batch_size", 4),
        config="cpu_2_processes",
    )
    assert re.search(
        r"the loss of update \d+ is not finite \(learning rate \S+\), \d+ rows: .*train.csv, row \d+",
        message,
    )
    model = DualEncoder.from_pretrained(
        tmp_path / "output" / "best"
    )  # that of before training is still whole
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.slow
def test_bad_data_is_one_line_on_two_processes(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "elements" / "element_1.png").write_bytes(b"broken")
    message = refused(
        "train.py",
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "output",
        config="cpu_2_processes",
    )
    assert "element_1.png: cannot be read as an image" in message and "train.csv, row" in message


@pytest.mark.slow
def test_a_worker_meets_a_broken_image(tmp_path, monkeypatch):
    """Above the cache limit images are decoded by workers; what they raise is a line too."""
    data = write_data(tmp_path / "data")
    done = launch(
        *(
            "tests/task/without_cache.py",
            "--data_dir",
            data,
            "--output_dir",
            tmp_path / "output",
            *OPTIONS,
        ),
        *("--per_device_batch_size", 8, "--num_workers", 1),
        check=False,
        BREAK=str(data / "images" / "train 7.png"),
    )
    assert re.search(
        r"^error: .*train 7.png: cannot be read as an image", done.stdout, re.MULTILINE
    ), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "/nowhere"], "--data_dir /nowhere: there is no such folder"),
        (["--per_device_batch_size", 42], "a global batch of 42 rows is more than the 41 rows of"),
        (
            ["--output_dir", "/dev/null/output"],
            "--output_dir /dev/null/output: cannot be written: Not a directory",
        ),
        (["--best_metric", "max:rerank/Recall@3"], "no such metric; there are eval/Recall@1"),
    ],
)
def test_before_any_training(data, tmp_path, monkeypatch, tiny_model, arguments, message):
    always = [
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "output",
        "--model_name_or_path",
        tiny_model,
        "--report_to",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*always, *arguments])])
    monkeypatch.setattr(
        train, "watch_for_stop", lambda accelerator: None
    )  # else pytest no longer hears Ctrl+C
    with pytest.raises(UserError) as refusal:
        train.main()
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("output/checkpoints/*"))


@pytest.mark.slow
def test_what_is_refused_is_one_line(data, tmp_path):
    arguments = [
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "output",
        "--model_name_or_path",
        "/nowhere",
    ]
    assert "--model_name_or_path /nowhere: " in refused("train.py", *arguments)


@pytest.mark.slow
def test_bf16_and_no_config_file(data, tmp_path, tiny_model):
    launch(
        *(
            "train.py",
            "--data_dir",
            data,
            "--output_dir",
            tmp_path / "output",
            "--max_steps",
            2,
            "--per_device_batch_size",
            8,
        ),
        *("--model_name_or_path", tiny_model),
        config=None,
        mixed_precision="bf16",
    )
    first, lines = read_log(tmp_path / "output")
    assert first["mixed_precision"] == "bf16" and list(column(lines, "train/loss")) == [2]
    done = launch(
        "evaluate.py",
        "--model_dir",
        tmp_path / "output" / "best",
        "--output_dir",
        tmp_path / "evaluation",
    )
    printed = float(
        re.search(r"eval/loss +(\S+)", done.stdout)[1]
    )  # in the precision of the training, and on its data
    assert printed in [
        pytest.approx(value, abs=1e-6) for value in column(lines, "eval/loss").values()
    ]


# ---- functions


def test_learning_rate():
    config = Namespace(learning_rate=2.0, warmup_ratio=0.1)
    rates = [train.learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) * 0.2) and max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert train.learning_rate_at(0, 1, config) == 2.0


def test_weight_decay_groups():
    model = DualEncoder(train.load_model(None).config)
    decayed, others = train.parameter_groups(model, 0.1)
    assert {parameter.ndim for parameter in others["params"]} == {1} and others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_config_from_yaml_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-3\nnum_epochs: 7\noutput_dir: 출력\nmodel_name_or_path: null\n",
        encoding="utf-8",
    )
    config = train.read_config(["--config", str(tmp_path / "run.yaml"), "--num_epochs", "3"])
    assert (config.learning_rate, config.num_epochs, config.output_dir, config.seed) == (
        1e-3,
        3,
        "출력",
        0,
    )
    assert config.model_name_or_path is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--learning_rate", "-1", "--num_epochs", "0"],
            "--learning_rate is -1.0.*--num_epochs is 0",
        ),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--best_metric", "eval/loss"], "must be min: or max:"),
        (["--best_metric", "min:train/loss"], "begins with eval/ or rerank/"),
        (["--warmup_ratio", "10"], "--warmup_ratio is 10.0, it must be at most 1"),
        (["--seed", str(2**32)], "--seed is 4294967296, it must be below"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_config_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        train.read_config(arguments)


def test_a_run_in_the_working_directory_is_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        train.make_output_dir(None, train.read_config(["--output_dir", ".", "--resume", "never"]))


def test_help_has_each_option_with_its_default_under_a_heading(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    parts = re.split(r"^(\w.*):$", train.make_parser().format_help(), flags=re.MULTILINE)
    assert parts[3::2] == ["data", "model", "optimization", parts[9], "where to"] and parts[
        9
    ].startswith("logging, evaluating, saving")
    for name, each in train.Config.__dataclass_fields__.items():
        (part,) = [
            part for part in parts[4::2] if re.search(rf"^  --{name} [A-Z]", part, re.MULTILINE)
        ]
        assert f"(default: {each.default})" in " ".join(
            part.split(f"--{name} ")[1].split("  --")[0].split()
        )


def test_evaluate_refuses_an_empty_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--model_dir", str(tmp_path), "--per_device_batch_size", "0"]
    )
    with pytest.raises(UserError, match="--per_device_batch_size is 0, it must be at least 1"):
        evaluate.main()


def test_unknown_options_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-3\n")
    with pytest.raises(UserError, match="learning_rat"):
        train.read_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("best_metric", "series", "best"),
    [
        ("min:a", [3, 1, 2, 1], [True, True, False, False]),
        ("max:a", [3, 1, 4], [True, False, True]),
        ("min:a", [math.nan, 2, math.nan, -math.inf, 1], [False, True, False, False, True]),
        ("max:a", [math.nan, math.inf, 2, 3], [False, False, True, True]),
    ],
)
def test_best(best_metric, series, best):
    state = Namespace(step=0, best_value=None, best_step=None)
    assert [evaluate.is_best(state, {"a": value}, best_metric) for value in series] == best


def test_the_mode_is_restored_after_an_error():
    for training in (True, False):
        model = torch.nn.Dropout().train(training)
        with pytest.raises(ZeroDivisionError), evaluate.evaluation_mode(model):
            assert not model.training and not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert model.training is training and torch.is_grad_enabled()


def evaluated(data, compute_metrics, tmp_path, model=None):
    config = Namespace(
        data_dir=data,
        max_candidates=400,
        num_negatives=3,
        seed=0,
        num_workers=0,
        per_device_eval_batch_size=4,
        output_dir=tmp_path,
    )
    accelerator = evaluate.make_accelerator()
    shared, rerank = read_datasets(config, MODEL, ("eval", "test_vocabulary"))
    model = model or train.load_model(None)
    values = evaluate.evaluate(accelerator, model, shared, compute_metrics, config)
    return values | evaluate._rerank_evaluate(accelerator, model, rerank, compute_metrics, config)


def test_compute_metrics_is_an_argument(data, tmp_path):
    seen = []

    def mine(prediction):
        seen.append(prediction)
        return {"mine": np.float32(0.5)}

    values = evaluated(data, mine, tmp_path)
    assert (
        values.keys() == {"eval/mine", "eval/loss", "rerank/mine"} and values["rerank/mine"] == 0.5
    )
    for prediction, rows in zip(seen, (13, 17), strict=True):
        assert (
            prediction.predictions.shape[0] == rows and prediction.predictions.dtype == np.float32
        )
        assert prediction.label_ids.tolist() == [0] * rows and prediction.inputs.tolist() == list(
            range(rows)
        )


def test_scores_that_are_not_finite_are_named(data, tmp_path):
    model = train.load_model(None)
    torch.nn.init.constant_(model.head[0].bias, math.nan)
    with pytest.raises(UserError, match=r"not finite for 13 rows: .*eval.csv, row 2"):
        evaluated(data, lambda prediction: {}, tmp_path, model)


def test_rows_that_are_missing_or_there_twice_are_an_error():
    accelerator = Namespace(
        is_main_process=False,
        gather=lambda values: values,
        pad_across_processes=lambda values, pad_index: values,
    )

    def model(x):
        return {"outputs": x}

    def batches(index):
        return [{"index": torch.tensor(index), "x": torch.tensor(index) * 10}]

    assert evaluate.predict(accelerator, model, batches([2, 0, -1, 1]), 3)["outputs"].tolist() == [
        0,
        10,
        20,
    ]
    for index in ([0, 1], [0, 1, 2, 2], [0, 1, 3], [0, 1, 1]):
        with pytest.raises(RuntimeError, match="missing"):
            evaluate.predict(accelerator, model, batches(index), 3)


def test_filling_counts_for_nothing(data):
    """A last batch of three rows, filled up to eight: the gradient is that of the mean over the three."""
    dataset, _ = read_datasets(
        Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0),
        MODEL,
        ("train", "eval"),
    )
    keys = [Key(row, 0, 8 / 3) for row in range(3)] + [Key(0, 0, 0.0)] * 5
    model = train.load_model(None)
    gradients = []
    for batch in (keys, [Key(row) for row in range(3)]):
        model.zero_grad()
        accelerator = Namespace(backward=lambda loss: loss.backward())
        index, _, losses = train.train_step(accelerator, model, dataset.__getitems__(batch))
        assert index.tolist()[:3] == [0, 1, 2] and losses.shape == (len(batch),)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert gradients[0].allclose(gradients[1], atol=1e-6)
