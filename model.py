"""A dual encoder: one image encoder embeds the page and the elements. A score is a cosine.

B images, R rows, C candidates of a row, F features, D embedding size, N queries, M items of an
evaluation. This file imports no other one of the project, since a saved model takes it along.

EDIT HERE for another task: `forward` says what the loss is, `rerank_scores` what a score is.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

# The default encoder: a small BiT with GroupNorm. With BatchNorm the outputs would depend on the
# micro-batch and so on the number of processes.
SMALL_BACKBONE = {
    "model_type": "bit",
    "embedding_size": 64,
    "hidden_sizes": [64, 128],
    "depths": [2, 2],
    "num_groups": 8,
    "layer_type": "preactivation",
    "global_padding": "SAME",
}


class DualEncoderConfig(PreTrainedConfig):
    """What `from_pretrained` needs to build the model and to prepare its images.

    backbone_config: that of any transformers vision model.
    feature_size: F, how many numbers `pool_all_levels` makes of an image. embedding_size: D.
    page_size, element_size: pages and elements are fitted into squares of this many pixels.
    image_mean, image_std: of each channel, for pixels in 0..1. The model applies them itself.
    """

    model_type = "match_element_dual_encoder"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: PreTrainedConfig | dict | None = None
    feature_size: int = 646
    embedding_size: int = 128
    page_size: int = 96
    element_size: int = 32
    image_mean: list | tuple = (0.5, 0.5, 0.5)
    image_std: list | tuple = (0.5, 0.5, 0.5)

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = SMALL_BACKBONE
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        for name, least in (("image_mean", -math.inf), ("image_std", 0)):
            values = getattr(self, name)
            three = isinstance(values, (list, tuple)) and len(values) == 3
            numbers = three and all(isinstance(value, (int, float)) for value in values)
            if not numbers or not all(least < value < math.inf for value in values):
                what = "three numbers above 0" if least == 0 else "three numbers"
                raise ValueError(f"{name} must be {what}, not {values!r}")
        for name in ("page_size", "element_size"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {size!r}")
        super().__post_init__(**kwargs)


class DualEncoder(PreTrainedModel):
    config_class = DualEncoderConfig
    main_input_name = "images"
    supports_gradient_checkpointing = True  # where the backbone has it

    def __init__(self, config, backbone=None):
        """backbone: a loaded model. None: one is built from the config."""
        super().__init__(config)
        self.backbone = (
            AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        )
        hidden_size = 2 * config.embedding_size
        self.head = nn.Sequential(
            nn.Linear(config.feature_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, config.embedding_size),
        )
        # Scales the cosines before the softmax, as in CLIP. (1,): FSDP2 refuses a scalar.
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.post_init()

    def forward(self, images=None, pages=None, candidates=None, candidate_mask=None, labels=None):
        """All that the model can do: DDP, DeepSpeed and FSDP2 hook nothing but `forward`.

        Rerank evaluation: images uint8 (B, 3, H, W) give {"outputs": float32 (B, D)}. These are
        embeddings of length 1.

        Training and the shared evaluation: pages uint8 (R, 3, H, W); candidates uint8
        (R, C, 3, h, w); candidate_mask bool (R, C), False for padding at the end; labels int64
        (R,), the column of the relevant candidate.
        They give {"losses": float32 (R,), "scores": float32 (R, C), padded with -inf}. A row's loss
        is the cross-entropy of picking its relevant candidate. The caller averages the losses: it
        alone knows the global batch.
        """
        if images is not None:
            return {"outputs": self.embed(images)}
        page_embeddings = self.embed(pages)  # (R, D)
        candidate_embeddings = self.embed(candidates.flatten(0, 1))  # (R x C, D)
        candidate_embeddings = candidate_embeddings.unflatten(0, candidate_mask.shape)  # (R, C, D)
        scores = cosine(page_embeddings[:, None], candidate_embeddings)  # (R, C)
        # Masked after the scaling: 0 x -inf would be a NaN in the gradient of the scale.
        logits = (scores * self.log_scale.exp()).masked_fill(~candidate_mask, -math.inf)  # (R, C)
        losses = functional.cross_entropy(logits, labels, reduction="none")  # (R,)
        return {"losses": losses, "scores": scores.masked_fill(~candidate_mask, -math.inf)}

    def get_input_embeddings(self):
        """None. FSDP2 asks for a table of words that is tied to an output layer."""

    def embed(self, images):
        """uint8 (B, 3, H, W) to float32 (B, D) of length 1. From outside call `forward`."""
        # Here, since bytes are a quarter of the traffic to the device. Filled on the device: for
        # the copy of a list the host would wait.
        mean, std = (
            torch.stack([torch.full((1, 1), float(v), device=images.device) for v in values])
            for values in (self.config.image_mean, self.config.image_std)
        )  # (3, 1, 1)
        pixel_values = ((images / 255 - mean) / std).to(self.log_scale.dtype)
        # Channels last: on a CPU the small model's convolutions take two thirds of the time. In the
        # backward of tiny ResNets and RegNets it has crashed.
        if self.config.backbone_config.model_type == "bit":
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = pool_all_levels(self.backbone, pixel_values).to(pixel_values.dtype)
        return functional.normalize(self.head(features).float(), dim=1)


def pool_all_levels(backbone: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to float32 (B, F): mean and deviation of each level over the image.

    A style shows in ink, strokes and corners more than in the thing drawn. These are features of
    the early levels. How much a feature varies tells as much as its mean. What the backbone pools
    itself comes last.
    """
    states = backbone(pixel_values, output_hidden_states=True)
    pooled = []
    for level in (pixel_values, *states.hidden_states[:-1], states.last_hidden_state):
        # (B, width, h, w) from a convolutional backbone. (B, tokens, width) from a transformer.
        level = level.flatten(2).transpose(1, 2) if level.ndim == 4 else level
        mean = level.float().mean(dim=1)  # (B, width)
        # In two passes. With var_mean an evaluation takes a third longer on a CPU.
        variance = (level - mean[:, None]).square().mean(dim=1)  # (B, width)
        pooled += [mean, (variance + 1e-5).sqrt()]
    if states.get("pooler_output") is not None:
        pooled.append(states.pooler_output.flatten(1).float())
    return torch.cat(pooled, dim=1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of embeddings of length 1: float32 (..., D) and (..., D) to (...).

    Not a matrix product: autocast would make it bfloat16, and many scores would be tied. And the
    bits of a score would depend on how many are computed with it.
    """
    return (a * b).sum(-1)


def rerank_scores(
    outputs: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """Embeddings float32 (M, D) to scores float32 (N, C), padded with -inf.

    queries: int64 (N,). candidates: int64 (N, C), padded with -1. Both are items: 0 to M - 1.
    """
    queries, candidates = queries.to(outputs.device), candidates.to(outputs.device)
    scores = torch.full(candidates.shape, -math.inf, device=outputs.device)  # (N, C)
    # Only pairs that are there: lists differ a lot in length.
    rows, columns = torch.nonzero(candidates >= 0, as_tuple=True)  # (pairs,)
    for pairs in torch.arange(len(rows)).split(2**16):  # bounds the memory: 2 x 65536 x D floats
        row, column = rows[pairs], columns[pairs]
        scores[row, column] = cosine(outputs[queries[row]], outputs[candidates[row, column]])
    return scores


def load_model(model_name_or_path: str | Path | None, options=None) -> DualEncoder:
    """A DualEncoder: one that train.py saved, or any vision model of a folder or of the hub.

    None: a small one without training. options: of train.py; sizes that they name replace its own.
    Weights are read from safetensors only. No code that comes with them is run. Raises OSError,
    SafetensorError or, where the model is not known or its weights do not fit, ValueError.
    """
    sizes = {name: getattr(options, name, None) for name in ("page_size", "element_size")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if model_name_or_path is None:
        return DualEncoder(DualEncoderConfig(**sizes))
    if os.path.lexists(model_name_or_path):  # where it may not read, transformers says other things
        for file in filter(os.path.isfile, os.scandir(model_name_or_path)):
            open(file, "rb").close()
    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    if isinstance(config, DualEncoderConfig):
        return load_weights(DualEncoder, model_name_or_path, whole=True, **sizes)
    config = getattr(config, "vision_config", config)  # CLIP and its like: the image half
    backbone = load_weights(AutoModel, model_name_or_path, config=config, dtype=torch.float32)
    size = getattr(config, "image_size", None) or 224
    size = size if isinstance(size, int) else max(size)  # some say height and width
    try:
        with torch.no_grad():
            feature_size = pool_all_levels(backbone, torch.zeros(1, 3, size, size)).shape[1]
    except Exception as error:  # of any kind, where a model takes something else
        raise ValueError(f"{config.model_type} gives no features of images: {error}") from error
    config = DualEncoderConfig(
        backbone_config=config,
        feature_size=feature_size,
        **{"page_size": size, "element_size": size} | sizes,
        **read_preprocessing(model_name_or_path),
    )
    return DualEncoder(config, backbone)


def load_weights(kind, model_name_or_path, whole=False, **options):
    """`from_pretrained`, which makes random weights of those that are missing or do not fit.

    Most must be there; `whole`: all, and no others. Process 0 says which are not.
    """
    model, found = kind.from_pretrained(
        model_name_or_path,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    random = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    unknown = sorted(found["unexpected_keys"]) if whole else []
    total = len(model.state_dict())
    said = f"{len(random)} of its {total} weights are missing or do not fit, {len(unknown)} are "
    said += f"unknown: {', '.join((random + unknown)[:5])}"
    if unknown or len(random) > (0 if whole else total / 2):
        raise ValueError(said)
    if random and os.environ.get("RANK", "0") == "0":
        print(f"{model_name_or_path}: {said}. They start random", flush=True)
    return model


def read_preprocessing(model_name_or_path):
    """The image_mean and image_std of the backbone's training, or {} where it does not say."""
    path = cached_file(
        model_name_or_path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    return {name: values[name] for name in ("image_mean", "image_std") if name in values}


# Once this file is imported, AutoConfig and AutoModel know a folder that train.py saved. In that
# folder lies a copy of it, which is imported where trust_remote_code=True says so.
AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)
DualEncoderConfig.register_for_auto_class()
DualEncoder.register_for_auto_class()
