"""Backbones of any family under any launch: trained, stopped, resumed, evaluated; or refused."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, compile_regions
from conftest import column, launch, read_log
from measures import BOUNDS, distance, relative
from page_data import FAMILIES, make_backbone, make_tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import runtime.checkpoint
import runtime.launch
import runtime.trial
import train
from model import DualEncoder, DualEncoderConfig, load_model
from runtime.checkpoint import write_model
from runtime.launch import UserError, make_accelerator, option_named, watch_for_stop
from runtime.trial import make_trainable
from train import train_step

BATCH_NORM = ("resnet",)  # their numbers depend on the micro-batch
WAYS = {  # {name: (config, processes, flags of the launch)}
    "1 process": ("cpu", 1, ()),
    "DDP × 2": ("cpu_2_processes", 2, ()),
    "ZeRO-3 × 2": ("zero3", 2, ()),
    "FSDP2 × 2": ("fsdp2", 2, ()),
    # Not inductor: it compiles for minutes a family. tests/loop has a run with it.
    "compiled": ("cpu", 1, ("--dynamo_backend", "aot_eager")),
}
# BatchNorm is for DDP alone.
CELLS = [
    (w, k) for w in WAYS for k in FAMILIES if not (k in BATCH_NORM and w[:4] in ("ZeRO", "FSDP"))
]
SIZES = SimpleNamespace(page_size=32, element_size=32)
LAST = "checkpoints/step_00000006"


# ---- weights that do not fit


def other_weights(change):
    def apply(folder):
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def without(*names):
    return other_weights(lambda weights: {n: v for n, v in weights.items() if n not in names})


def other_bytes(change):
    def apply(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def other_json(file, **values):
    def apply(folder):
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    return apply


REFUSED = {  # {what: (ours or the kind of a backbone, what is done to it, what the line says)}
    "a key less": ("ours", without("head.0.weight"), "1 of its .* missing .*: head.0.weight"),
    "a key more": ("ours", other_weights(lambda w: w | {"x": torch.ones(1)}), "1 are unknown: x"),
    "another shape": (
        *("ours", other_weights(lambda w: w | {"head.0.weight": torch.ones(3)})),
        "do not fit, .*: head.0.weight",
    ),
    "names of a compiled model": (
        *("ours", other_weights(lambda w: {f"_orig_mod.{n}": v for n, v in w.items()})),
        "29 of its 29 weights are missing or do not fit, 29 are unknown",
    ),
    "cut short": ("ours", other_bytes(lambda b: b[:999]), "a file is cut short, or of git-lfs"),
    "a pointer": ("vit", other_bytes(lambda b: b"version https://git-lfs"), "or of git-lfs"),
    "no mean": ("ours", other_json("config.json", image_mean=None), "three numbers, not None"),
    "mean": ("vit", other_json("preprocessor_config.json", image_mean=0.5), "numbers, not 0.5"),
    "no config": (
        "ours",
        lambda folder: (folder / "config.json").write_text("5"),
        "model.py, line",
    ),
    "deviation": ("ours", other_json("config.json", image_std=[1, 0, 1]), "three numbers above 0"),
    "NaN": ("ours", other_json("config.json", image_mean=[1, math.nan, 1]), "three numbers, not"),
    "no pixels": ("ours", other_json("config.json", page_size=0), "page_size must be a whole"),
    "text for a size": ("ours", other_json("config.json", element_size="x"), "a whole .* not 'x'"),
    "another kind": ("vit", other_json("config.json", hidden_size="x"), "Error: .*model.py, line"),
    "no dict": (
        "vit",
        lambda f: (f / "preprocessor_config.json").write_text("5"),
        "model.py, line",
    ),
    "another size": ("vit", other_json("config.json", hidden_size=64), "3. of its 40 weights"),
    "text": ("bert", lambda folder: None, "bert gives no features of images"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_weights_that_do_not_fit(what, tmp_path):
    kind, change, message = REFUSED[what]
    make = make_tiny_model if kind == "ours" else make_backbone
    make(tmp_path, *[kind] * (kind != "ours"))
    change(tmp_path)
    with (
        pytest.raises(UserError, match="^--model_dir x: .*" + message),
        option_named("--model_dir x"),
    ):
        load_model(tmp_path)


def test_what_starts_random_is_said_once(tmp_path, capsys, monkeypatch):
    without("pooler.dense.weight")(make_backbone(tmp_path, "vit"))
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        load_model(tmp_path)
        line = "1 of its 40 weights are missing or do not fit, 0 are unknown: pooler.dense.weight"
        assert capsys.readouterr().out.count(line) == said


def test_pickled_weights_are_not_read(tmp_path):
    make_backbone(tmp_path, "vit")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(tmp_path)


def test_code_beside_a_model_is_not_run(tmp_path):
    text = f"from pathlib import Path\nPath({str(tmp_path / 'it ran')!r}).touch()\n"
    text += "from transformers import ViTConfig\nclass C(ViTConfig):\n    model_type = 'theirs'\n"
    make_backbone(tmp_path, "vit")
    (tmp_path / "theirs.py").write_text(text)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "theirs.C"}}
    path.write_text(json.dumps(config | {"model_type": "theirs"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path)
    assert not (tmp_path / "it ran").exists()


# ---- what a trial of one item says


class Rows:
    """One row, as a data set gives it."""

    def __init__(self, config):
        random = torch.Generator().manual_seed(0)
        size, small = config.page_size, config.element_size
        self.batch = {
            "pages": torch.randint(0, 256, (1, 3, size, size), generator=random),
            "candidates": torch.randint(0, 256, (1, 4, 3, small, small), generator=random),
            "candidate_mask": torch.ones(1, 4, dtype=torch.bool),
            "labels": torch.zeros(1, dtype=torch.int64),
        }

    def __len__(self):
        return 1

    def __getitems__(self, keys):
        return self.batch | {"index": torch.zeros(1), "weight": torch.ones(1)}


def trial(model, gradient_checkpointing=False, processes=1, strategy=DistributedType.NO):
    """What it says of the model."""
    said = []
    launched = {"num_processes": processes, "distributed_type": strategy}
    accelerator = SimpleNamespace(is_main_process=True, print=said.append, **launched)
    make_trainable(accelerator, model, Rows(model.config), gradient_checkpointing)
    return said


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_gets_no_gradient_is_frozen(kind, tmp_path):
    model = load_model(make_backbone(tmp_path, kind), SIZES)
    said = " ".join(trial(model))
    assert ("frozen" in said) == ("mask_token" in said) == ("dinov" in kind)
    assert ("BatchNorm" in said) == (kind in BATCH_NORM)
    model(**Rows(model.config).batch)["losses"].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_random_in_evaluation_mode_is_refused(tmp_path):
    model = load_model(make_backbone(tmp_path, "vit_mae"))
    with pytest.raises(UserError, match="in evaluation mode its 'losses' are random"):
        trial(model)


def test_every_process_freezes_what_the_first_one_found(tmp_path, monkeypatch):
    model = load_model(make_backbone(tmp_path, "dinov2"), SIZES)
    name = "backbone.embeddings.mask_token"

    def told(found):
        found[0] = [name]

    monkeypatch.setattr(runtime.trial, "unused_parameters", None)  # the first process alone tries
    monkeypatch.setattr(runtime.trial, "broadcast_object_list", told)
    accelerator = SimpleNamespace(is_main_process=False, num_processes=2, print=print)
    make_trainable(accelerator, model, Rows(model.config), False)
    assert not model.get_parameter(name).requires_grad


def test_batch_norm_is_for_ddp_alone(tmp_path):
    model = load_model(make_backbone(tmp_path, "resnet"))
    assert "BatchNorm" in trial(model, processes=2, strategy=DistributedType.MULTI_GPU)[-1]
    with pytest.raises(UserError, match="its BatchNorm has other means on each process"):
        trial(model, processes=2, strategy=DistributedType.FSDP)


def test_fsdp2_divides_at_layers_that_are_there(tmp_path):
    """Of CLIP the whole family's are named, and accelerate looks for each in the vision model."""
    model = load_model(make_backbone(tmp_path, "clip_vision_model"))
    assert "CLIPTextEmbeddings" in model._no_split_modules
    trial(model)
    assert model._no_split_modules == {"CLIPEncoderLayer", "CLIPVisionEmbeddings"}


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    found, kept = [], []  # kept: for backward
    for checkpointing in (False, True):
        kept.clear()
        torch.manual_seed(0)
        model = load_model(make_backbone(tmp_path / "vit", "vit", hidden_dropout_prob=0.5)).train()
        trial(model, checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            torch.manual_seed(1)
            losses = model(**Rows(model.config).batch)["losses"]
        losses.sum().backward()
        found.append((len(kept), [p.grad for p in model.parameters()]))
    (many, plain), (few, again) = found
    assert few < many / 2 and all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


def test_a_backbone_without_gradient_checkpointing():
    with pytest.raises(ValueError, match="checkpointing"):
        trial(DualEncoder(DualEncoderConfig()), True)


# ---- what a launch and a device ask


class Waits(TorchDispatchMode):
    """What makes a host wait for its device: values that it reads, and copies of lists."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = [i for i in arguments[1] if i is not None] if name.startswith("index") else []
        masks = [i for i in masks if torch.is_tensor(i) and i.dtype == torch.bool]
        if name in self.READS or masks:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["the default", "ours", "vit"])
def test_sizes_of_the_command_replace_those_of_a_model(kind, tmp_path):
    folder = None if kind == "the default" else tmp_path
    if folder:
        make_tiny_model(folder) if kind == "ours" else make_backbone(folder, kind)
    config = load_model(folder, SimpleNamespace(page_size=48, element_size=24)).config
    assert (config.page_size, config.element_size) == (48, 24)
    config = load_model(folder, SimpleNamespace(page_size=None, element_size=None)).config
    own = {"the default": (96, 32), "ours": (16, 16), "vit": (32, 32)}[kind]
    assert (config.page_size, config.element_size) == own


@pytest.mark.parametrize("kind", ["bit", "resnet", "convnext"])
def test_channels_last_is_for_bit_alone(kind, tmp_path):
    """Tiny ResNets end in a segmentation fault with it on some CPUs."""
    model, given = load_model(make_backbone(tmp_path, kind), SIZES), []
    model.backbone.register_forward_pre_hook(lambda _, images: given.extend(images))
    model(**Rows(model.config).batch)
    last = [images.is_contiguous(memory_format=torch.channels_last) for images in given]
    assert last == [kind == "bit"] * 2


@pytest.mark.parametrize("kind", ["the default", "vit", "dinov2", "convnext"])
def test_an_update_never_waits_for_the_device(kind, tmp_path):
    folder = None if kind == "the default" else make_backbone(tmp_path, kind)
    model = load_model(folder, SIZES).train()
    trial(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    accelerator = SimpleNamespace(backward=torch.Tensor.backward)
    batch = Rows(model.config).batch | {"index": torch.zeros(1), "weight": torch.ones(1)}
    with Waits() as waits:
        train_step(accelerator, model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not waits.found


def test_hours_for_every_group_and_gradients_once(monkeypatch):
    given = {}

    def remember(**options):
        given.update(options)
        raise OSError("enough")

    monkeypatch.setattr(runtime.launch, "Accelerator", remember)
    with pytest.raises(UserError, match="^the launch: enough"):
        make_accelerator()
    group, gradients = given["kwargs_handlers"]
    assert group.timeout.total_seconds() == 7200 and gradients.gradient_as_bucket_view
    # DeepSpeed makes groups of its own, with torch's default.
    defaults = ("default_pg_timeout", "default_pg_nccl_timeout")
    for name in defaults:
        monkeypatch.setattr(torch.distributed.distributed_c10d, name, None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(runtime.launch, "is_deepspeed_available", lambda: True)
    with pytest.raises(UserError, match="^the launch: enough"):
        make_accelerator()
    for name in defaults:
        assert getattr(torch.distributed.distributed_c10d, name).total_seconds() == 7200
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: given.update(options))
    monkeypatch.setattr(runtime.launch.signal, "signal", lambda *_: None)
    watch_for_stop(SimpleNamespace(num_processes=2))
    assert given["timeout"].total_seconds() == 7200


@pytest.mark.slow
@pytest.mark.parametrize("regions", [False, True])
def test_a_compiled_model_is_saved_as_one_that_is_not(regions, tmp_path, monkeypatch):
    model = load_model(make_backbone(tmp_path / "vit", "vit")).eval()
    options = {"backend": "eager"}
    compiled = compile_regions(model, **options) if regions else torch.compile(model, **options)
    images = Rows(model.config).batch["pages"]
    assert compiled(images=images)["outputs"].isfinite().all()
    assert any("_orig_mod." in name for name in compiled.state_dict())
    accelerator = SimpleNamespace(
        is_main_process=True,
        get_state_dict=lambda model: model.state_dict(),
        unwrap_model=lambda model, keep_torch_compile: getattr(model, "_orig_mod", model),
    )
    monkeypatch.setattr(runtime.checkpoint, "write_card", lambda *_: None)
    write_model(accelerator, compiled, tmp_path / "saved", SimpleNamespace(training_config={}))
    again, weights = load_model(tmp_path / "saved").state_dict(), compiled.state_dict()
    for name in weights:
        assert torch.equal(again.pop(name.replace("_orig_mod.", "")), weights[name]), name
    assert not again


# ---- whole runs, in this process

FEW = ["--max_steps", 2, "--save_steps", 1, "--save_total_limit", 0, "--report_to", "none"]


@pytest.fixture
def run_train(tiny, tmp_path, run_here):
    """train.py's main on a tiny DINOv2, in the folder of this name."""
    make_backbone(tmp_path / "dinov2", "dinov2")

    def run_train(name, *flags):
        flags = [*FEW, "--model_name_or_path", tmp_path / "dinov2", *flags]
        run_here(train, tiny.flags(tmp_path / name, *flags))
        return tmp_path / name

    return run_train


@pytest.mark.slow
def test_a_resume_freezes_it_too(run_train, capsys):
    one = run_train("one")
    two = run_train("two", "--resume_from_checkpoint", one / "checkpoints" / "step_00000001")
    assert capsys.readouterr().out.count("frozen, since they get no gradient") == 2
    last = "checkpoints/step_00000002/model.safetensors"
    ours, theirs = (load_file(each / last) for each in (two, one))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_what_the_command_says_of_the_model_is_done(run_train, run_here, monkeypatch):
    found, asked, make = [], [], train.make_trainable
    monkeypatch.setattr(runtime.launch, "enable_full_determinism", found.append)
    monkeypatch.setattr(train, "make_trainable", lambda *given: asked.append(given) or make(*given))
    flags = ["--full_determinism", "--gradient_checkpointing"]
    folder = run_train("sizes", *flags, "--page_size", 16, "--element_size", 24)
    ((_, model, _, checkpointing),) = asked
    assert found == [0] and checkpointing
    assert (model.config.page_size, model.config.element_size) == (16, 24)
    run_here(evaluate, ["--model_dir", folder / "best", "--output_dir", folder / "again"])
    assert found == [0, 0]


@pytest.mark.slow
def test_the_loop_never_waits_between_two_updates(run_train, monkeypatch):
    """From train_step to what is logged: clipping, the step and what stands around them too."""
    waits, modes = Waits(), []
    step, log = train.train_step, train.maybe_log_save_evaluate

    def begin(*given):
        modes.append(waits.__enter__())
        return step(*given)

    def end(*given):
        if modes:
            modes.pop().__exit__(None, None, None)
        return log(*given)

    monkeypatch.setattr(train, "train_step", begin)
    monkeypatch.setattr(train, "maybe_log_save_evaluate", end)
    run_train("waits")
    assert not waits.found


# ---- the matrix


class Matrix:
    """A launch for each way, with all families in it, when it is first asked for."""

    def __init__(self, tiny, folder):
        self.tiny, self.folder, self.done = tiny, folder, set()
        for kind in FAMILIES:
            make_backbone(folder / "backbones" / kind, kind)

    def __getitem__(self, way):
        """The folder of this way: {family}/, {family}_resumed/, {family}.txt from evaluate.py."""
        folder = self.folder / way
        if way not in self.done:
            self.done.add(way)
            config, processes, launch_flags = WAYS[way]
            runs, kinds = [], [kind for each, kind in CELLS if each == way]
            for kind in kinds:
                flags = ["--model_name_or_path", self.folder / "backbones" / kind]
                flags += ["--per_device_train_batch_size", 12 // processes, "--max_steps", 6]
                flags += ["--page_size", 32, "--element_size", 32, "--save_total_limit", 0]
                flags += ["--logging_steps", 1, "--eval_steps", 0, "--save_steps", 3]
                flags += ["--learning_rate", 3e-5, "--report_to", "none"]
                # Which changes no number, so one process is without it.
                flags += ["--gradient_checkpointing"] * (kind == "vit" and way != "1 process")
                runs.append(["train.py", *self.tiny.flags(folder / kind, *flags)])
                flags += ["--resume_from_checkpoint", folder / kind / "checkpoints/step_00000003"]
                runs.append(["train.py", *self.tiny.flags(folder / f"{kind}_resumed", *flags)])
            self.launch(runs, config, processes, launch_flags)
            runs = [
                ["evaluate.py", "--model_dir", folder / kind / LAST, "--output_dir", folder / "at"]
                for kind in kinds
            ]
            done = self.launch(runs, *WAYS["1 process" if processes > 1 else way])
            for kind, text in zip(kinds, done.split("\n--- "), strict=False):
                (folder / f"{kind}.txt").write_text(text)
        return folder

    def launch(self, runs, config, processes, launch_flags):
        runs = json.dumps([[str(word) for word in run] for run in runs])
        options = {"config": config, "processes": processes, "launch_flags": launch_flags}
        options |= {"mixed_precision": "no", "RUNS": runs, "timeout": 3000}
        options |= {"FSDP2_ON_CPU": "1"} if config == "fsdp2" else {}
        return launch("tests/task/many_runs.py", **options).stdout


@pytest.fixture(scope="module")
def matrix(tiny, tmp_path_factory):
    return Matrix(tiny, tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("way", "kind"), CELLS)
def test_a_family_under_a_launch(way, kind, matrix):
    folder, one = matrix[way], matrix["1 process"] / kind
    lines = read_log(folder / kind)[1]
    assert [line["step"] for line in lines] == list(range(7))
    # resumed: the same bits
    again = read_log(folder / f"{kind}_resumed")[1]
    for name in lines[-1].keys() - {"train/samples_per_second"}:
        assert column(again, name).get(6) == column(lines, name)[6], name
    start, ours, resumed, theirs = (
        load_file(each / "model.safetensors")
        for each in (
            folder / kind / "checkpoints/step_00000003",
            folder / kind / LAST,
            folder / f"{kind}_resumed" / LAST,
            one / LAST,
        )
    )
    assert ours.keys() == resumed.keys() == theirs.keys()
    assert all(torch.equal(ours[name], resumed[name]) for name in ours)
    # evaluated, on one process
    printed = (folder / f"{kind}.txt").read_text()
    for name, value in lines[-1].items():
        if name.startswith(("eval/", "rerank/")):
            assert re.search(rf"^{name} +{value:.6f}$", printed, re.MULTILINE), (name, printed)
    # as one process does it
    if kind not in BATCH_NORM or way == "compiled":
        for name, bound in (("loss", BOUNDS["loss"]), ("grad_norm", BOUNDS["grad_norm"])):
            for line, other in zip(lines[1:], read_log(one)[1][1:], strict=True):
                found = relative(line[f"train/{name}"], other[f"train/{name}"])
                assert found <= bound, (name, line["step"], found)
        assert distance(ours, theirs) <= BOUNDS["weights"] * distance(start, theirs)
