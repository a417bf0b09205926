"""The options: what flags and a YAML mean, and that all else is refused in one line."""

import json
import re
from dataclasses import MISSING, FrozenInstanceError, asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import transformers
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import config
from config import Config, EvaluateConfig, read_config, what_numbers_depend_on
from runtime.options import INSTEAD, WrongOption, make_parser, option, read_options

EXAMPLES = settings(
    max_examples=100, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck)
)
NAMES = [each.name for each in fields(Config)]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def refused(*arguments, kind=Config):
    """The message, which must be one line."""
    with pytest.raises(WrongOption) as caught:
        read_options(kind, [str(word) for word in arguments])
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and caught.value.status == 2
    return message


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "run.yaml"

    return write


# ---- what is taken


def test_without_arguments_all_are_defaults():
    assert read_config([]) == Config()
    with pytest.raises(FrozenInstanceError):
        Config().seed = 1  # pyrefly: ignore[read-only]


def test_each_default_may_be_said():
    for kind, required in ((Config, []), (EvaluateConfig, ["--model_dir", "output/best"])):
        default = read_options(kind, required)
        said = [f"--{n}={value}" for n, value in asdict(default).items() if value is not None]
        assert read_options(kind, said) == default and len(said) >= 2


def test_flags_go_over_the_yaml(write):
    file = write(
        "learning_rate: 1e-3\nnum_train_epochs: 7\noutput_dir: 출력\nmodel_name_or_path: null\n"
        "weight-decay: 1_0.5 # a comment\nseed:\nproject: ~\nsave_steps: '9'\n"
    )
    found = read_config(["--config", str(file), "--num_train_epochs", "3"])
    expected = {"learning_rate": 1e-3, "num_train_epochs": 3, "output_dir": "출력"}
    assert found == Config(**expected, weight_decay=10.5, save_steps=9)
    # The flag counts, wherever it stands.
    found = read_config(["--learning_rate", "1e-2", "--config", str(file)])
    assert found.learning_rate == 1e-2 and found.num_train_epochs == 7


def test_what_a_run_writes_can_be_read_again(write):
    run = Config(
        learning_rate=1e-5, greater_is_better=True, project="null", output_dir="007", seed=2**31 - 1
    )
    assert read_config(["--config", str(write(yaml.safe_dump(asdict(run))))]) == run
    assert read_config(["--config", str(write(json.dumps(asdict(run))))]) == run


@pytest.mark.parametrize("text", ["3", "3.0", " 3 ", "30e-1", "+3"])
def test_whole_numbers(text):
    found = read_config(["--num_train_epochs", text]).num_train_epochs
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [True, False])
def test_booleans(write, value):
    for text in ("true", "yes", "1", "True", "YES") if value else ("false", "no", "0", "False"):
        assert read_config(["--greater_is_better", text]).greater_is_better is value
        assert read_config([f"--greater-is-better={text}"]).greater_is_better is value
        file = write(f"greater_is_better: {text}")
        assert read_config(["--config", str(file)]).greater_is_better is value
    assert read_config(["--greater_is_better"]).greater_is_better is True
    assert read_config(["--greater_is_better", "--seed", "3"]) == Config(
        greater_is_better=True, seed=3
    )


def test_dashes_stand_for_underscores_in_names_alone():
    found = read_config(["--output-dir", "my-folder", "--save-total_limit=3", "--project=--a-b"])
    assert found == Config(output_dir="my-folder", save_total_limit=3, project="--a-b")
    assert read_config(["--project", "--a-b c"]).project == "--a-b c"  # words with a space


def test_max_steps_has_one_value_for_as_the_epochs_say():
    assert read_config(["--max_steps", "-1"]) == read_config(["--max_steps", "0"]) == Config()
    assert read_config(["--max_steps", "20"]).max_steps == 20


def test_the_home_folder(monkeypatch, tmp_path, write):
    write("data_dir: ~/data\nproject: a~\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read_config(["--config", "~/run.yaml", "--output_dir=~/out"])
    data_dir, output_dir = (str(tmp_path / name) for name in ("data", "out"))
    assert found == Config(data_dir=data_dir, output_dir=output_dir, project="a~")


def test_the_last_flag_counts():
    # A sweep's flags follow those of its command.
    assert read_config(["--seed", "1", "--seed", "2"]).seed == 2


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--learning_rate", -1, "--num_train_epochs", "0"],
            "--num_train_epochs is '0', it must be a whole number, at least 1 and below 2**31; "
            "--learning_rate is '-1', it must be a number, at least 0 and below 2**31",
        ),
        (["--learning_rate", "nan"], "--learning_rate is 'nan', it must be a number"),
        (["--learning_rate", "inf"], "--learning_rate is 'inf'"),
        (["--max_grad_norm=-inf"], "--max_grad_norm is '-inf'"),
        (["--learning_rate", "1e-"], "--learning_rate is '1e-', it must be a number"),
        (["--num_train_epochs", "3.5"], "--num_train_epochs is '3.5', it must be a whole number"),
        (["--max_steps", "-2"], "--max_steps is '-2', it must be a whole number, at least -1"),
        (["--max_steps", "9" * 31], "below 2**31"),
        (["--max_steps", "9" * 5000], "below 2**31"),
        (["--seed", 2**31], "--seed is '2147483648'"),
        (["--warmup_steps", "1.5"], "it must be a whole number or a share below 1, at least 0"),
        (["--warmup_steps", "-0.1"], "--warmup_steps is '-0.1'"),
        (["--metric_for_best_model", "loss"], "it must be a name like eval/loss"),
        (["--metric_for_best_model", "min:eval"], "it must be a name like eval/loss"),
        (["--greater_is_better", "maybe"], "'maybe', it must be true or false"),
        (["--output_dir", ""], "--output_dir is '', it must be a line of text"),
        (["--output_dir", " "], "--output_dir is ' '"),
        (["--output_dir", "a\nb"], r"--output_dir is 'a\nb'"),
        (["--output_dir", "a\0"], r"--output_dir is 'a\x00'"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "1", "2"], "2: there is no such option"),
        (["-seed", "1"], "-seed: there is no such option, is it --seed?"),
        (
            ["--learning_rat", "1"],
            "--learning_rat: there is no such option, is it --learning_rate?",
        ),
        (["seed", "1"], "seed: there is no such option, is it --seed?"),
        (["--learn=1"], "--learn: there is no such option"),
        (["--xyzzy"], "--xyzzy: there is no such option"),
        (["--xyzzy", "1", "--seed", "x"], "--xyzzy: there is no such option; --seed is 'x'"),
        (["--help=1"], "ignored explicit argument"),
    ],
)
def test_wrong_arguments(arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("value", ["0", "0.5", "1", "1.0", "300"])
def test_warmup_is_a_share_or_a_whole_number(value):
    assert read_config(["--warmup_steps", value]).warmup_steps == float(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "learning_rat: there is no such option, is it --learning_rate?"),
        ("learning_rat:", "learning_rat: there is no such option"),
        ("bf16: true", "bf16: use accelerate launch --mixed_precision"),
        ("seed: 1\nseed: 1", "seed is there twice"),
        ("save-steps: 1\nsave_steps: 2", "save_steps is there twice"),
        ("report_to: [wandb]", "report_to must have one value"),
        ("seed:\n  a: 1", "seed must have one value"),
        ("seed: x\nlearning_rate: -1", "seed is 'x'"),
        ("output_dir: ''", "output_dir is ''"),
        ("output_dir: |\n  a\n  b", r"output_dir is 'a\nb"),
        ("metric_for_best_model: 'null'", "metric_for_best_model is 'null'"),
        ("", "lines of the form `option: value`"),
        ("# seed: 1", "lines of the form"),
        ("seed", "lines of the form"),
        ("learning_rate:1e-3", "lines of the form"),
        ("- seed: 1", "lines of the form"),
        ("? [seed]\n: 1", "lines of the form"),
        ("seed: 1\n---\nseed: 2", "another document"),
        ("seed: 'a", "while scanning"),
        ("[" * 1000, "recursion"),
        ("seed: \0", "special characters are not allowed"),
    ],
)
def test_wrong_yaml(write, text, message):
    found = refused("--config", write(text))
    assert f"--config {write(text)}: " in found and message in found


def test_all_of_a_yaml_and_the_flags_are_told_at_once(write):
    file = write("seed: x\nnum_epochs: 3")
    assert refused("--config", file, "--tf32", "--max_steps", "a") == (
        f"--tf32: a Trainer option that is not here: edit the loop; "
        f"--config {file}: num_epochs: now --num_train_epochs; "
        "--max_steps is 'a', it must be a whole number, at least -1 and below 2**31; "
        f"--config {file}: seed is 'x', it must be a whole number, at least 0 and below 2**31"
    )


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("output_dir: é".encode("latin-1"))
    for file, message in (
        (tmp_path / "latin.yaml", "'utf-8' codec"),
        (tmp_path / "absent.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        ("a\0b", "null byte"),
        ("", ""),
    ):
        found = refused("--config", file)
        assert found.startswith(f"--config {file}:") and message in found


# ---- what to do instead


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf16", "--mixed_precision bf16"),
        ("fp16", "--mixed_precision bf16 (or fp16)"),
        ("deepspeed", "accelerate_config/zero2.yaml"),
        ("fsdp", "accelerate_config/fsdp2.yaml"),
        ("optim", "one line in `train`"),
        ("lr_scheduler_type", "learning_rate_at"),
        ("lr-scheduler-type", "learning_rate_at"),
        ("push_to_hub", "hf upload"),
        ("eval_strategy", "--eval_steps"),
        ("evaluation_strategy", "--eval_steps"),
        ("save_strategy", "--save_steps"),
        ("logging_strategy", "--logging_steps"),
        ("warmup_ratio", "--warmup_steps: below 1"),
        ("use_cpu", "cpu.yaml"),
        ("load_best_model_at_end", "best/"),
        ("num_epochs", "--num_train_epochs"),
        ("per_device_batch_size", "--per_device_train_batch_size"),
        ("log_every", "--logging_steps"),
        ("eval_every", "--eval_steps"),
        ("save_every", "--save_steps"),
        ("resume", "--resume_from_checkpoint"),
        ("num_workers", "--dataloader_num_workers"),
        ("best_metric", "--metric_for_best_model and --greater_is_better"),
    ],
)
def test_names_that_have_another_place(name, message):
    for arguments in ([f"--{name}"], [f"--{name}", "3"], [f"--{name}=3"]):
        found = refused(*arguments)
        assert found.startswith(f"--{name.replace('-', '_')}: ") and message in found
        assert "there is no such option" not in found


def test_each_option_of_trainer_is_there_or_refused_as_its_own():
    for each in fields(transformers.TrainingArguments):
        if each.name in NAMES:
            continue
        assert "there is no such option" not in refused(f"--{each.name}", 1), each.name
    assert refused("--torch_compile").endswith("a Trainer option that is not here: edit the loop")


def test_what_is_said_instead_is_there():
    here = Path(config.__file__).parent
    ours = {*NAMES, *(each.name for each in fields(EvaluateConfig))}
    assert not ours & {name for names in INSTEAD for name in names.split()}
    others = {"mixed_precision", "config_file"}  # of accelerate launch
    for text in INSTEAD.values():
        assert set(re.findall(r"--(\w+)", text)) <= ours | others, text
        for file in re.findall(r"accelerate_config/\w+\.yaml", text):
            assert (here / file).is_file()


# ---- evaluate.py


def test_the_options_of_evaluate():
    found = read_options(EvaluateConfig, ["--model-dir", "output/best"])
    assert found == EvaluateConfig("output/best") and found.per_device_eval_batch_size is None
    found = read_options(
        EvaluateConfig, ["--model_dir=m", "--data_dir", "d", "--per_device_eval_batch_size", "4.0"]
    )
    assert found == EvaluateConfig("m", data_dir="d", per_device_eval_batch_size=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_dir is missing: a folder that train.py saved"),
        (["--model_dir", ""], "--model_dir is ''"),
        (["--model_dir", "m", "--per_device_eval_batch_size", "0"], "at least 1"),
        (["--model_dir", "m", "--per_device_batch_size", "1"], "--per_device_eval_batch_size"),
        (["--model_dir", "m", "--gallery"], "tools/gallery.py"),
        (["--modeldir", "m"], "is it --model_dir?; --model_dir is missing"),
    ],
)
def test_wrong_arguments_of_evaluate(arguments, message):
    assert message in refused(*arguments, kind=EvaluateConfig)


def test_a_required_option_may_stand_in_a_yaml(write):
    assert read_options(EvaluateConfig, ["--config", str(write("model_dir: m"))]).model_dir == "m"
    found = refused("--config", write("model_dir:"), kind=EvaluateConfig)
    assert "model_dir is missing: a folder" in found


# ---- what is said at the fields


@pytest.mark.parametrize("kind", [Config, EvaluateConfig])
def test_help_has_each_option_with_its_default(monkeypatch, capsys, kind):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        read_options(kind, ["--help"])
    text = capsys.readouterr().out
    assert not caught.value.code and text == make_parser(kind).format_help()
    assert text.startswith("usage: accelerate launch --config_file accelerate_config/cpu.yaml ")
    for each in fields(kind):
        (part,) = re.findall(
            rf"^  --{each.name} \[?[A-Z]+\]?(.*?)(?=^\S|^$|^  -)", text, re.M | re.S
        )
        default = "required" if each.default is MISSING else f"default: {each.default}"
        assert f"({default}" in " ".join(part.split())
        assert each.metadata["text"] and not each.metadata["text"].endswith(".")


def test_options_of_ones_own():
    @dataclass(frozen=True)
    class Mine:
        """Mine."""

        usage: ClassVar = "mine.py"
        share: float = option(50.0, "in %", at_least=1)

    assert read_options(Mine, ["--share", "60"]) == Mine(60.0)
    assert "in % (default: 50.0; at least 1)" in make_parser(Mine).format_help()


def test_help_has_headings():
    text = make_parser(Config).format_help()
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert [heading.split(",")[0] for heading in headings] == [
        "options",
        "data",
        "model",
        "optimization",
        "logging",
        "where to",
    ]


def test_what_numbers_depend_on():
    depends = what_numbers_depend_on(Config(learning_rate=1.0))
    assert depends["learning_rate"] == 1.0 and depends.keys() < set(NAMES)
    assert json.loads(json.dumps(depends)) == depends
    # Changes of these are what makes another run of it; changes of those do not.
    counted = {"seed", "num_negatives", "max_steps", "eval_steps", "metric_for_best_model"}
    free = {"data_dir", "model_name_or_path", "save_steps", "per_device_train_batch_size"}
    assert counted < depends.keys() and not free & depends.keys()
    assert what_numbers_depend_on(Config(max_steps=-1)) == what_numbers_depend_on(Config())


# ---- generated


@EXAMPLES
@given(
    st.sampled_from([*NAMES, "nothing", "bf16"]),
    st.booleans() | st.integers() | st.floats() | TEXT,
)
@example("output_dir", "a\u2028b")
def test_any_value(tmp_path_factory, name, value):
    """A flag and a YAML agree: the same Config, or one line that names the option."""
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    text = value if isinstance(value, str) else json.dumps(value)
    file.write_text(yaml.safe_dump({name: value}, allow_unicode=True), encoding="utf-8")
    outcomes = []
    for arguments in (["--config", str(file)], [f"--{name}={text}"]):
        try:
            found = read_config(arguments)
            assert replace(found, **{name: getattr(Config(), name)}) == Config()
            outcomes.append(found)
        except WrongOption as error:
            assert len(str(error).splitlines()) == 1 and name in str(error)
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@EXAMPLES
@given(st.lists(st.sampled_from([f"--{name}" for name in NAMES]) | TEXT, max_size=6))
def test_any_words(words):
    words = [word for word in words if word not in ("-h", "--help")]
    try:
        assert isinstance(read_config(words), Config)
    except WrongOption as error:
        assert len(str(error).splitlines()) == 1


@EXAMPLES
@given(st.binary(max_size=200) | TEXT.map(str.encode))
def test_any_file(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_bytes(content)
    assert str(file) in refused("--config", file)
