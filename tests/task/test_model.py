"""The model: what it saves is what it loads, any vision backbone fits, scores are what the definition says."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from page_data import FAMILIES, TINY, make_backbone
from transformers import AutoConfig, AutoModel

from model import DualEncoder, DualEncoderConfig, load_model, rerank_scores


def batch(config, rows=3, width=4):
    random = torch.Generator().manual_seed(0)
    page = (rows, 3, config.page_size, config.page_size)
    element = (rows, width, 3, config.element_size, config.element_size)
    return {
        "pages": torch.randint(0, 256, page, dtype=torch.uint8, generator=random),
        "candidates": torch.randint(0, 256, element, dtype=torch.uint8, generator=random),
        "candidate_mask": torch.tensor(
            [[True] * width, [True] * width, [True] * (width - 2) + [False] * 2]
        ),
        "labels": torch.zeros(rows, dtype=torch.int64),
    }


def test_round_trip_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    model = DualEncoder(
        DualEncoderConfig(image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7], page_size=48)
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config.image_mean == [0.1, 0.2, 0.3] and loaded.config.page_size == 48
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )
    inputs = batch(model.config)
    for one, other in (
        (model(**inputs), loaded(**inputs)),
        (
            model(images=inputs["pages"]),
            AutoModel.from_pretrained(tmp_path).eval()(images=inputs["pages"]),
        ),
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_vision_backbone(tmp_path, kind):
    """From a local folder as from the hub."""
    folder = make_backbone(tmp_path / "backbone", kind)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]})
    )
    assert load_model(folder).config.page_size == (224 if kind == "resnet" else 32)
    model = load_model(folder, SimpleNamespace(page_size=64 if "dino" in kind else 32)).eval()
    model.save_pretrained(tmp_path / "saved")
    images = batch(model.config)["pages"]
    again = load_model(tmp_path / "saved")
    assert again.config.image_mean == [0.4, 0.5, 0.6]
    assert again.config.page_size == model.config.page_size == images.shape[2]
    assert torch.equal(again(images=images)["outputs"], model(images=images)["outputs"])


def test_the_image_half_of_clip(tmp_path):
    text = {
        name: TINY[name]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    clip = AutoModel.from_config(
        AutoConfig.for_model("clip", vision_config=TINY, text_config=text | {"vocab_size": 99})
    )
    clip.save_pretrained(tmp_path)
    backbone = load_model(tmp_path).backbone
    theirs = clip.vision_model.state_dict()
    assert all(
        torch.equal(value, theirs[name.removeprefix("vision_model.")])
        for name, value in backbone.state_dict().items()
    )


def test_scores_and_losses_are_what_the_definition_says():
    torch.manual_seed(0)
    model = DualEncoder(DualEncoderConfig()).eval()
    inputs = batch(model.config)
    got = model(**inputs)
    pages = model(images=inputs["pages"])["outputs"]
    assert pages.norm(dim=1).allclose(torch.ones(3))
    for row, page in enumerate(pages):
        real = inputs["candidate_mask"][row]
        elements = model(images=inputs["candidates"][row][real])["outputs"]
        cosines = torch.stack([page.dot(element) for element in elements])
        assert got["scores"][row][real].allclose(cosines, atol=1e-6)
        assert (got["scores"][row][~real] == -math.inf).all()
        assert got["losses"][row].allclose(-torch.log_softmax(10 * cosines, 0)[0], atol=1e-5)


def test_masked_candidates_change_nothing_not_even_gradients():
    gradients = []
    for value in (0, 255):
        torch.manual_seed(0)
        model = DualEncoder(DualEncoderConfig())
        inputs = batch(model.config)
        inputs["candidates"][~inputs["candidate_mask"]] = value
        model(**inputs)["losses"].mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients[-1])
    assert all(a.allclose(b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_an_embedding_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = DualEncoder(DualEncoderConfig()).eval()
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(
            model(images=images)["outputs"][5:],
            model(images=images.roll(3, 0))["outputs"].roll(-3, 0)[5:],
        )


def test_rerank_scores_by_brute_force():
    random = torch.Generator().manual_seed(0)
    outputs = torch.nn.functional.normalize(torch.randn(50, 8, generator=random), dim=1)
    queries = torch.randint(0, 50, (2000,), generator=random)
    candidates = torch.randint(0, 50, (2000, 60), generator=random)
    for row in range(2000):
        candidates[row, 1 + row % 60 :] = -1
    scores = rerank_scores(outputs, queries, candidates)
    expected = torch.einsum("nd,ncd->nc", outputs[queries], outputs[candidates]).masked_fill(
        candidates < 0, -math.inf
    )
    assert scores.dtype == torch.float32 and scores.allclose(expected, atol=1e-6)


def test_hub_names_go_to_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(
        AutoConfig,
        "from_pretrained",
        lambda name, **options: asked.append(name) or DualEncoderConfig(),
    )
    nothing = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(
        DualEncoder,
        "from_pretrained",
        lambda name, **options: asked.append(name) or (DualEncoder(DualEncoderConfig()), nothing),
    )
    load_model("someone/some-model")
    assert asked == ["someone/some-model"] * 2
