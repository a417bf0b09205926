"""The evaluations: rows in their order, any output, the best model, and what is said of mistakes."""

import ast
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import launch
from page_data import make_tiny_model, read_csv, write_data
from torch.nn import functional

import evaluate
import runtime.evaluation
from data import decode_image, read_datasets
from metrics import compute_metrics
from model import load_model
from runtime.batches import Key
from runtime.evaluation import (
    check_metrics,
    check_outputs,
    evaluation_mode,
    make_prediction,
    mean_loss,
)
from runtime.launch import UserError


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- the best model


@pytest.mark.parametrize(
    ("greater_is_better", "series", "best"),
    [
        (False, [3, 1, 2, 1], [True, True, False, False]),
        (True, [3, 1, 4], [True, False, True]),
        (False, [math.nan, 2, math.nan, -math.inf, 1], [False, True, False, False, True]),
        (True, [math.nan, math.inf, 2, 3], [False, False, True, True]),
    ],
)
def test_best(greater_is_better, series, best):
    config = Namespace(metric_for_best_model="eval/a", greater_is_better=greater_is_better)
    state = Namespace(step=0, best_value=None, best_step=None)
    for value, expected in zip(series, best, strict=True):
        assert evaluate.is_best(state, {"eval/a": value, "eval/b": 0}, config) is expected
        assert (state.best_step == state.step) is expected
        # Done again, as after an interruption, it is what it was.
        assert evaluate.is_best(state, {"eval/a": value}, config) is expected
        state.step += 1
    assert state.best_value == series[state.best_step]


def test_a_metric_that_is_not_there():
    config = Namespace(metric_for_best_model="eval/Recall@3", greater_is_better=True)
    state = Namespace(step=0, best_value=None, best_step=None)
    message = refusal(evaluate.is_best, state, {"eval/loss": 1.0, "rerank/MRR@4": 0.0}, config)
    assert "--metric_for_best_model eval/Recall@3: no such metric" in message
    assert "there are eval/loss, rerank/MRR@4" in message


def test_the_prefix_of_the_metric_is_of_an_evaluation(monkeypatch):
    for name in ("eval/loss", "eval/mine", "rerank/MRR@10"):
        evaluate.check_metric_prefix(name)
    for name in ("train/loss", "evaluation/loss", "loss"):
        message = refusal(evaluate.check_metric_prefix, name)
        assert f"--metric_for_best_model {name}: " in message and "['eval/', 'rerank/']" in message
    monkeypatch.setattr(evaluate, "make_evaluations", lambda *datasets: {"mine": None})
    evaluate.check_metric_prefix("mine/loss")
    assert "['mine/']" in refusal(evaluate.check_metric_prefix, "eval/loss")


# ---- predicting and gathering


def test_the_mode_is_restored_after_an_error():
    for training in (True, False):
        model = torch.nn.Dropout().train(training)
        with pytest.raises(ZeroDivisionError), evaluation_mode(model):
            assert not model.training and not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert model.training is training and torch.is_grad_enabled()


class Five:
    """A data set of five items, to name them."""

    item_weights = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    labels, positions = np.arange(5), np.array([0, 2, 3, 5, 9])
    name_item = staticmethod("item {}".format)
    name_row = staticmethod("row {}".format)

    def __len__(self):
        return 5


def predict(model, batches):
    batches = [{"index": torch.tensor(index), "weight": None} for index in batches]
    for batch in batches:
        batch["x"] = batch["index"]
    return evaluate.predict(Accelerator(cpu=True), model, batches, Five())


def test_items_stand_in_their_order_whatever_the_batches():
    for batches in (
        [[2, 0, -1, 1], [4, 3]],
        [[4], [3], [2], [1], [0]],
        [[-1, -1], [0, 1, 2, 3, 4]],
    ):
        outputs = predict(lambda x: {"a": x * 10, "b": torch.stack([x, -x], 1)}, batches)
        assert outputs["a"].tolist() == [0, 10, 20, 30, 40]
        assert outputs["b"].tolist() == [[item, -item] for item in range(5)]


@pytest.mark.parametrize(
    "batches", [[[0, 1, 2, 3]], [[0, 1, 2, 3, 4], [4]], [[0, 1, 2, 3, 4, 5]], [[0, 1, 1, 3, 4]]]
)
def test_items_that_are_missing_or_there_twice_are_an_error(batches):
    with pytest.raises(RuntimeError, match="missing, or are there more than once") as caught:
        predict(lambda x: {"a": x}, batches)
    seen = [item for batch in batches for item in batch]
    for item in range(5):
        assert (f"item {item}" in str(caught.value)) == (seen.count(item) != 1)


DTYPES = {  # what pads where widths differ
    torch.float32: -math.inf,
    torch.bfloat16: -math.inf,
    torch.int64: -100,
    torch.int32: -100,
    torch.uint8: 0,
    torch.bool: 0,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_other_widths_are_padded(dtype):
    """A batch is as wide as its longest item: item i is of length i + 1, in two axes."""

    def model(x):
        longest = x.max().item() + 1
        values = torch.ones(len(x), longest, 2 * longest, dtype=dtype)
        values *= (x[:, None, None] + 1).to(dtype)
        return {"values": values, "one": (x % 2).to(dtype)}

    outputs = predict(model, [[1, 0], [4, -1], [3, 2]])
    assert outputs["values"].dtype == outputs["one"].dtype == dtype
    assert outputs["values"].shape == (5, 5, 10)
    for item, width in enumerate([2, 2, 4, 4, 5]):  # the width of its batch
        expected = torch.full((5, 10), DTYPES[dtype]).to(dtype)
        expected[:width, : 2 * width] = item + 1
        assert torch.equal(outputs["values"][item], expected)
    assert outputs["one"].tolist() == [0, 1, 0, 1, 0]
    array = make_prediction([outputs["values"]], Five()).predictions
    assert array.dtype == (np.float32 if dtype == torch.bfloat16 else np.dtype(str(dtype)[6:]))


@pytest.mark.slow
def test_processes_of_other_widths_are_padded():
    """The same on two processes, where one has wider batches than the other."""
    done = launch("tests/task/gather_on_two.py", config="cpu_2_processes")
    assert done.stdout.count("all dtypes are gathered") == 2


def test_the_predictions_are_one_array_or_a_tuple():
    scores, others = torch.rand(5, 3), torch.arange(5)
    prediction = make_prediction([scores], Five())
    assert np.array_equal(prediction.predictions, scores.numpy())
    assert prediction.label_ids is Five.labels and prediction.inputs is Five.positions
    several = make_prediction([scores, others], Five()).predictions
    assert isinstance(several, tuple) and several[1].tolist() == [0, 1, 2, 3, 4]
    scores[3, 1] = -math.inf  # padding
    make_prediction([scores], Five())
    for value in (math.nan, math.inf):
        scores[3, 1] = value
        assert refusal(make_prediction, [scores], Five()) == (
            "a score is not finite for 1 rows: row 3"
        )


def test_the_loss_is_the_mean_by_weight_in_float64():
    losses = torch.tensor([1e8, 1.0, 2.0, 3.0, 4.0])
    expected = (1e8 + 2 * 1 + 3 * 2 + 4 * 3 + 10 * 4) / 20
    assert mean_loss(losses, Five()) == pytest.approx(expected, rel=1e-15)
    for value in (math.nan, math.inf, -math.inf):
        losses[1] = value
        assert refusal(mean_loss, losses, Five()) == "the loss is not finite for 1 rows: row 1"


# ---- what the task returned


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"loss": torch.tensor(1.0)}, "forward must return 'losses'; it returned loss"),
        ({"losses": torch.tensor(1.0)}, r"'losses' of shape () for a batch of 3 items"),
        ({"losses": torch.ones(3), "scores": torch.ones(4, 3)}, "'scores' of shape (4, 3)"),
        ({"losses": torch.ones(3), "past": None}, "'past' of shape ()"),
        ({}, "forward must return 'losses'; it returned "),
        ({"scores": torch.ones(3)}, "forward must return 'losses'; it returned scores"),
        (torch.ones(3), "must return a dict of tensors, not Tensor"),
        ((torch.ones(3),), "must return a dict of tensors, not tuple"),
    ],
)
def test_outputs_that_break_the_contract(outputs, message):
    assert message in refusal(check_outputs, outputs, 3, "losses")


def test_outputs_that_keep_the_contract():
    outputs = {"losses": torch.ones(3), "scores": torch.ones(3, 2, 2)}
    assert check_outputs(outputs, 3, "losses", "scores") is outputs
    assert check_outputs({}, 3) == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "must return a dict, not NoneType"),
        (0.5, "must return a dict, not float"),
        ({"a": 1.0, "b": None}, "'b' must be a number, and is None"),
        ({"b": "0.5"}, "'b' must be a number, and is '0.5'"),
        ({"b": np.str_("0.5")}, "'b' must be a number, and is "),
        ({"b": {"c": 1.0}}, "'b' must be a number, and is {'c': 1.0}"),
        ({"b": [0.5]}, "'b' must be a number, and is [0.5]"),
        ({"b": [[0.5], [1, 2]]}, "'b' must be a number, and is [[0.5], [1, 2]]"),
        ({"b": np.ones(1)}, "'b' must be a number, and is array([1.])"),
        ({"b": np.ones((100, 100))}, "'b' must be a number, and is array("),
        ({"b": torch.ones(2)}, "'b' must be a number, and is tensor([1., 1.])"),
        ({"loss": 1.0}, "'loss', which is the name of the mean loss"),
    ],
)
def test_metrics_that_break_the_contract(metrics, message):
    refused = refusal(check_metrics, metrics)
    assert message in refused and len(refused) < 200


def test_metrics_that_keep_the_contract():
    values = {"a": 1, "b": 0.5, "c": np.float32(0.5), "d": torch.tensor(2), "e": True}
    checked = check_metrics(values | {"f": np.int64(3), "g": np.bool_(True)})
    assert checked == {"a": 1, "b": 0.5, "c": 0.5, "d": 2, "e": 1, "f": 3, "g": 1}
    assert {type(value) for value in checked.values()} == {float}
    assert math.isnan(check_metrics({"a": math.nan})["a"])


# ---- both evaluations of our task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("evaluation") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_tiny_model(tmp_path_factory.mktemp("evaluation") / "model"))


def evaluated(data, compute_metrics, model):
    """({"eval/...": value}, the table of evaluations, {name: its EvalPrediction})"""
    config = Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0)
    config.dataloader_num_workers, config.per_device_eval_batch_size = 0, 4
    datasets = read_datasets(config, model, ("eval", "test_vocabulary"))
    evaluations, predictions, values = evaluate.make_evaluations(*datasets), {}, {}
    for name, evaluation in evaluations.items():
        evaluation = evaluation._replace(compute_metrics=compute_metrics)
        predictions[name], metrics = evaluation.run(
            Accelerator(cpu=True), model, evaluation, config
        )
        values |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    return values, evaluations, predictions


def test_compute_metrics_is_an_argument(data, model):
    seen = []

    def mine(prediction):
        seen.append(prediction)
        return {"mine": np.float32(0.5)}

    values, _, predictions = evaluated(data, mine, model)
    assert values.keys() == {"eval/mine", "eval/loss", "rerank/mine"}
    assert values["rerank/mine"] == 0.5 and seen == list(predictions.values())
    for prediction, rows in zip(seen, (13, 17), strict=True):
        assert prediction.predictions.shape[0] == rows
        assert prediction.predictions.dtype == np.float32
        assert prediction.label_ids.tolist() == [0] * rows
        assert prediction.inputs.tolist() == list(range(rows))


def test_no_dataloader_is_left_behind(data, model):
    """accelerate keeps what goes through `prepare`: each evaluation would leave one more."""
    accelerator, (_, evaluations, _) = Accelerator(cpu=True), evaluated(data, lambda _: {}, model)
    config = Namespace(dataloader_num_workers=0, per_device_eval_batch_size=4)
    for evaluation in evaluations.values():
        evaluate.get_eval_dataloader(accelerator, evaluation.dataset, config)
    assert accelerator._dataloaders == []


def test_both_evaluations_by_brute_force(data, model):
    """Each row alone, through the model by its embeddings, against `forward` of whole batches."""
    values, evaluations, predictions = evaluated(data, compute_metrics, model)
    model.eval()

    def embed(kind, key):
        path = data / kind / f"{key}.png"
        with torch.no_grad():
            return model(images=decode_image(path, 16)[None])["outputs"][0]

    losses, hits, shared = [], [], evaluations["eval"].dataset
    rows = read_csv(shared.path)
    for i, row in enumerate(rows):
        (drawn,) = shared.draw(np.array([i]), 0)
        keys = [shared.elements.keys[element] for element in drawn]
        keys = list(
            dict.fromkeys(keys)
        )  # a row with few candidates is padded with the relevant one
        assert keys[0] == row["resourceKey"]
        page = embed("images", row["x_image_path"])
        scores = torch.stack([page @ embed("elements", key) for key in keys])
        logits = scores * model.log_scale.detach().exp()
        losses.append(functional.cross_entropy(logits, torch.tensor(0)).item())
        hits.append(bool((scores[1:] < scores[0]).all()))
    assert values["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert values["eval/Recall@1"] == np.mean(hits)

    for i, row in enumerate(read_csv(evaluations["rerank"].dataset.path)):
        page = embed("images", row["x_image_path"])
        keys = ast.literal_eval(row["candidate_resourceKey"])
        expected = torch.stack([page @ embed("elements", key) for key in keys])
        scores = predictions["rerank"].predictions[i]
        assert scores[: len(keys)] == pytest.approx(expected.numpy(), abs=1e-6)
        assert (scores[len(keys) :] == -np.inf).all()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_process_scores_a_share_of_the_rows(processes, monkeypatch):
    """None gets no row: a `score` of one's own may not expect it."""
    monkeypatch.setattr(runtime.evaluation, "gather", lambda accelerator, batches: batches[0])
    dataset = Namespace(labels=np.zeros(5), score=lambda outputs, rows: outputs["outputs"][rows])
    outputs, share = {"outputs": torch.arange(5)}, -(-5 // processes)
    scored = []
    for rank in range(processes):
        process = Namespace(num_processes=processes, process_index=rank)
        part = runtime.evaluation.score_rows(process, dataset, outputs)
        assert 1 <= len(part) <= share
        scored += [*part.tolist(), *[None] * (share - len(part))]  # as a gather pads
    assert scored[:5] == [0, 1, 2, 3, 4]


def test_scores_that_are_not_finite_are_named(data, tmp_path):
    model = load_model(make_tiny_model(tmp_path / "model"))
    torch.nn.init.constant_(model.head[0].bias, math.nan)
    with pytest.raises(UserError, match=r"not finite for 13 rows: .*eval.csv, row 2"):
        evaluated(data, lambda prediction: {}, model)


def test_padding_counts_for_nothing(data, model):
    """A last batch of three rows, padded to eight: the gradient is that of the mean over three."""
    import train  # here, since it takes a second

    config = Namespace(data_dir=data, max_candidates=400, num_negatives=3, seed=0)
    (dataset,) = read_datasets(config, model, ["train"])
    keys = [Key(row, 0, 8 / 3) for row in range(3)] + [Key(0, 0, 0.0)] * 5
    gradients = []
    for batch in (keys, [Key(row) for row in range(3)]):
        model.eval()  # no dropout
        model.zero_grad()
        accelerator = Namespace(backward=lambda loss: loss.backward())
        index, _, losses = train.train_step(accelerator, model, dataset.__getitems__(batch))
        assert index.tolist()[:3] == [0, 1, 2] and losses.shape == (len(batch),)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    print(difference)
    assert difference < 1e-6
