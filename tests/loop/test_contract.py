"""The names of runtime/ that the top calls. A newer runtime/ in an older copy must have them."""

import ast
import importlib
import inspect
from argparse import Namespace

import numpy as np
import pytest
from conftest import REPOSITORY

from runtime.batches import Key, check_datasets, evaluation_batches
from runtime.launch import UserError
from runtime.resume import TrainState

SIGNATURES = """
launch.UserError
launch.make_accelerator(max_grad_norm=0.0, full_determinism=False, **kwargs)
launch.refuse_sharded_weights(accelerator)
launch.make_writable(folder)
launch.own(accelerator, folder)
launch.optional(what)
launch.option_named(option)
launch.watch_for_stop(accelerator)
launch.stop_if_asked()
launch.Stopped(signal_number)
launch.finish(accelerator)
launch.errors_in_one_line()
launch.refuse_hidden_library()
batches.Key(index, epoch=0, weight=1.0)
batches.index_and_weight(keys)
batches.check_datasets(accelerator, datasets)
batches.make_train_dataloader(accelerator, dataset, state, config)
batches.make_dataloader(accelerator, dataset, config, **sampling)
batches.batches_of(dataloader)
batches.evaluation_batches(groups, batch_size, num_processes)
cache.Texts(encoded, starts)
cache.hash_files(keys, stat)
cache.items(folder, kind, key, shape, dtype, make, named_by)
cache.kept(folder, kind, key, make)
cache.in_workers(function, starts, least, title)
checkpoint.hash_model(accelerator, model_name_or_path)
checkpoint.load_training_state(accelerator, checkpoint)
checkpoint.save_checkpoint(accelerator, model, state, output_dir, total_limit)
checkpoint.save_model(accelerator, model, folder, state)
checkpoint.read_training_config(model_dir, needed)
evaluation.check_outputs(outputs, num_items, *needed)
evaluation.check_metrics(metrics)
evaluation.evaluation_mode(model)
evaluation.gather_items(accelerator, indices, outputs, dataset)
evaluation.make_prediction(predictions, dataset)
evaluation.mean_loss(losses, dataset)
evaluation.score_rows(accelerator, dataset, outputs)
resume.collect_losses(accelerator, state)
resume.find_checkpoint(accelerator, output_dir, resume_from_checkpoint)
resume.make_output_dir(accelerator, output_dir, resume_from_checkpoint)
resume.make_state(accelerator, config, train_dataset, depends_on)
resume.resume(accelerator, state, checkpoint, output_dir)
resume.training_metrics(state)
trial.make_trainable(accelerator, model, dataset, gradient_checkpointing)
tracking.make_trackers(report_to, output_dir, project=None)
tracking.start_trackers(accelerator, config, state, datasets)
tracking.start_progress(accelerator, state)
tracking.show(accelerator, state, values)
tracking.write_report(accelerator, name, evaluation, prediction, folder, step)
tracking.closing_table(state, config)
options.option(default, text, *, heading='', at_least=0, check=None, changes_no_number=False)
options.setting(default, text, *, heading='', at_least=0, check=None, changes_no_number=True)
options.read_options(kind, arguments)
""".strip().splitlines()
STATE = "step done num_updates finished is_due evaluations best_step best_value window grad_norm"
STATE += " learning_rate progress training_config window_began evaluations_since_best"


def find(dotted):
    module, name = dotted.split(".")
    return getattr(importlib.import_module(f"runtime.{module}"), name)


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.partition("(")[0])
def test_a_name_that_the_top_calls(line):
    name, bracket, _ = line.partition("(")
    found = find(name)
    if bracket:
        signature = inspect.signature(found)
        parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        plain = signature.replace(parameters=parameters, return_annotation=signature.empty)
        assert f"{name}{plain}" == line


def test_the_state_that_the_top_reads():
    fields = {*TrainState.__dataclass_fields__, *vars(TrainState)}
    assert set(STATE.split()) <= fields


@pytest.mark.parametrize("file", ["train.py", "evaluate.py"])
def test_the_top_calls_no_other_name(file):
    used = set()
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("runtime."):
            used |= {f"{node.module.removeprefix('runtime.')}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {f"launch.{node.attr}"} if node.value.id == "launch" else set()
            if node.value.id == "state":
                assert node.attr in STATE.split()
    assert used and used <= {line.partition("(")[0] for line in SIGNATURES}


# ---- what a data set must have


class Three:
    path, counts = "three.csv", {"used": 3, "too_short": 1}
    item_weights = np.array([1.0, 2.0, 0.5])
    labels = positions = np.arange(3)
    groups = [(range(3), 1)]

    def __len__(self):
        return 3

    def __getitems__(self, keys):
        return {"index": [key.index for key in keys], "weight": [1.0] * len(keys)}

    def name_item(self, item):
        return f"row {item}"

    name_row = name_item


def check(kind):
    check_datasets(Namespace(print=print), [Three(), kind()])


def test_data_sets_that_keep_the_contract_are_counted_on_the_screen(capsys):
    check(Three)
    assert capsys.readouterr().out == "three.csv: 3 used, 1 too short\n" * 2


NEEDED = ["__len__", "__getitems__", "item_weights", "labels", "positions", "groups"]
NEEDED += ["name_item", "name_row", "path", "counts"]


@pytest.mark.parametrize("name", NEEDED)
def test_what_a_data_set_lacks_is_named(name):
    lacking = type("Lacking", (), {key: value for key, value in vars(Three).items() if key != name})
    with pytest.raises(UserError, match=f"^Lacking of .* in runtime/batches.py: no {name}$"):
        check(lacking)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"item_weights": np.ones(2)}, "item_weights must be 3 numbers above 0"),
        ({"item_weights": np.array([1, 0, 1])}, "item_weights must be 3 numbers"),
        ({"item_weights": [1, -1, 1]}, "item_weights must be 3 numbers"),
        ({"item_weights": [1, np.nan, 1]}, "item_weights must be 3 numbers"),
        ({"item_weights": [1, np.inf, 1]}, "item_weights must be 3 numbers"),
        ({"item_weights": None}, "item_weights must be 3 numbers"),
        ({"__getitems__": lambda self, keys: {"index": 1}}, "no weight from __getitems__"),
        ({"__getitems__": lambda self, keys: {"weight": 1}}, "no index from __getitems__"),
        ({"__getitems__": lambda self, keys: [{"index": 1}]}, "no index from __getitems__, no wei"),
    ],
)
def test_a_data_set_that_breaks_the_contract(changed, message):
    with pytest.raises(UserError) as error:
        check(type("Broken", (Three,), changed))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert "Broken of three.csv breaks the contract" in str(error.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_of_an_evaluation_is_no_larger_than_its_group(processes):
    batches = list(evaluation_batches([(range(10), 3), (range(10, 33), 1)], 10_000_000, processes))
    assert batches[:2] == [list(map(Key, range(10))), list(map(Key, range(10, 33)))]
    assert len(batches) == 2
