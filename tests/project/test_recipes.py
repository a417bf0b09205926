"""The recipes of docs/FROM_TRAINER.md, put into one copy where the page says, and run."""

import csv
import re
import shutil

import pytest
from conftest import REPOSITORY, column, launch, read_log
from page_data import make_backbone, write_data
from safetensors.torch import load_file

PAGE = (REPOSITORY / "docs" / "FROM_TRAINER.md").read_text(encoding="utf-8")
RATE, UPDATES, WARMUP = 1e-3, 6, 2


def recipe(name):
    """The blocks of code below its name."""
    text = re.search(rf"\*\*{name}.*?\*\*(.*?)(?=\n\*\*|\n## )", PAGE, re.DOTALL)[1]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def edit(path, *changes):
    text = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert text.count(before) == 1, (path, before)
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def put_in(copy):
    (metric,) = recipe("add a metric")
    edit(copy / "metrics.py", ("return recall | reciprocal\n", indented(metric, 4)[4:]))
    evaluation, train = (block.splitlines() for block in recipe("add an evaluation"))
    signature, entry, datasets = evaluation
    edit(
        copy / "evaluate.py",
        (old_line(copy / "evaluate.py", "def make_evaluations("), signature),
        (
            "compute_metrics, report.write),\n",
            f"compute_metrics, report.write),\n        {entry}\n",
        ),
        (old_line(copy / "evaluate.py", "    datasets = "), f"    {datasets}"),
    )
    edit(copy / "data.py", ('if split == "test_vocabulary"', train[3]))
    linear, _ = recipe("have another schedule")
    (weights,) = re.findall(r"`item_weights` of the data set: `(.*?)`", PAGE)
    assert weights == "np.where(rare, 2.0, 1.0)"
    rare = f"        rare = np.arange(len(self)) % 3 == 0\n        self.item_weights = {weights}"
    shared, rerank = (copy / "data.py").read_text(encoding="utf-8").split("class RerankDataset")
    shared = re.sub(r"        self\.item_weights = .*", rare, shared)
    (copy / "data.py").write_text(f"{shared}class RerankDataset{rerank}", encoding="utf-8")
    lora, frozen = recipe("train with LoRA")
    imported, field, *build = re.split(r"\n\n", lora)
    model = copy / "model.py"
    edit(
        model,
        ("import torch\nfrom torch import nn", f"import torch\n{imported}\nfrom torch import nn"),
        ("    feature_size: int = 646\n", f"    feature_size: int = 646\n    {field}\n"),
        (
            "        hidden_size = 2 * config.embedding_size\n",
            f"{indented(build[0], 8)}\n        hidden_size = 2 * config.embedding_size\n",
        ),
        (
            "        backbone_config=config,\n",
            "        backbone_config=config,\n        lora_rank=8,\n",
        ),
    )
    program = copy / "train.py"
    loading = "        model = load_model(model_dir, config)\n"
    edit(
        program,
        (loading, loading + indented(frozen, 4)),
        (old_line(program, "    datasets = "), f"    {train[0]}"),
        (old_line(program, "    train_dataset, eval_dataset"), f"    {train[1]}"),
        (old_line(program, "    evaluations = make_ev"), f"    {train[2]}"),
        (old_line(program, "    angle = "), ""),
        (old_line(program, "    return config.learning_rate * 0.5"), f"    {linear.strip()}"),
    )


def indented(block, spaces):
    return "".join(f"{' ' * spaces}{line}\n" for line in block.splitlines())


def old_line(path, begins):
    (line,) = [one for one in path.read_text().splitlines() if one.startswith(begins)]
    return line


@pytest.mark.slow
def test_the_recipes_make_what_they_say(tmp_path):
    copy, data, output = tmp_path / "copy", tmp_path / "data", tmp_path / "output"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "default_data*", "output*", "docs")
    shutil.copytree(REPOSITORY, copy, ignore=unwanted)
    put_in(copy)
    write_data(data)
    with open(data / "csv" / "test_vocabulary.csv", encoding="utf-8") as file:
        (data / "csv" / "hard.csv").write_text("".join(file.readlines()[:9]), encoding="utf-8")
    make_backbone(tmp_path / "vit", "vit")
    flags = ["--data_dir", data, "--model_name_or_path", tmp_path / "vit", "--output_dir", output]
    flags += ["--max_steps", UPDATES, "--warmup_steps", WARMUP, "--learning_rate", RATE]
    flags += ["--logging_steps", 1, "--report_to", "none", "--num_negatives", 3]
    launch(copy / "train.py", *flags)

    _, lines = read_log(output)
    assert 0 < column(lines, "hard/nDCG@10")[UPDATES] <= 1
    assert column(lines, "hard/nDCG@10") != column(lines, "rerank/nDCG@10")
    with open(output / "metric_hard.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8
    rates = [RATE / 2, RATE, *(RATE * (UPDATES - step) / 4 for step in range(2, UPDATES))]
    assert list(column(lines, "train/learning_rate").values()) == pytest.approx(rates)
    before = load_file(tmp_path / "vit" / "model.safetensors")
    after = load_file(output / "checkpoints" / f"step_{UPDATES:08d}" / "model.safetensors")
    assert sum("lora_B" in name and value.any().item() for name, value in after.items()) > 0
    after = {name.replace(".base_layer", ""): value for name, value in after.items()}
    assert all(after[f"backbone.{name}"].equal(value) for name, value in before.items())
