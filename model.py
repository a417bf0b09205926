"""A dual encoder: one image encoder embeds the page and the elements, and a score is the cosine of two embeddings.

B images, R rows, C candidates of a row, D embedding size, N queries, M distinct inputs of an evaluation.

EDIT HERE for another task: `forward` says what the loss and the scores are, `rerank_scores` how an evaluation's outputs
become scores. train.py and evaluate.py know of neither.
"""

import json
import math

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

# The default encoder, built from a config: a small BiT. Its norm is GroupNorm; BatchNorm would make the outputs depend on
# the micro-batch, so on the number of processes.
SMALL_BACKBONE = {
    "model_type": "bit",
    "embedding_size": 64,
    "hidden_sizes": [64, 128],
    "depths": [2, 2],
    "num_groups": 8,
    "layer_type": "bottleneck",
    "global_padding": "SAME",
}


class DualEncoderConfig(PreTrainedConfig):
    """What `from_pretrained` needs to build the model, and what the images must go through before it.

    backbone_config: the config of any transformers vision model.
    embedding_size: D.
    page_size, element_size: pages and elements are fitted into squares of this many pixels.
    image_mean, image_std: per channel, of pixels in 0..1; the model subtracts and divides itself.
    """

    model_type = "match_element_dual_encoder"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: PreTrainedConfig | dict | None = None
    embedding_size: int = 64
    page_size: int = 64
    element_size: int = 32
    image_mean: list | tuple = (0.5, 0.5, 0.5)
    image_std: list | tuple = (0.5, 0.5, 0.5)

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = dict(SMALL_BACKBONE)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)


class DualEncoder(PreTrainedModel):
    config_class = DualEncoderConfig
    base_model_prefix = ""
    main_input_name = "images"

    def __init__(self, config, backbone=None):
        """backbone: a model that is loaded already; without it, one is built from config.backbone_config."""
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        width = getattr(config.backbone_config, "hidden_size", None) or config.backbone_config.hidden_sizes[-1]
        self.projection = nn.Linear(2 * width, config.embedding_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of the cosines before the softmax, learned as in CLIP
        self.post_init()

    def forward(self, images=None, pages=None, candidates=None, candidate_mask=None, labels=None):
        """Everything that the model can do, since DDP, DeepSpeed and FSDP see nothing but `forward`.

        Rerank evaluation: images, uint8 (B, 3, H, W). Returns {"outputs": float32 (B, D)}, embeddings of length 1.

        Training and the shared evaluation: pages, uint8 (R, 3, H, W); candidates, uint8 (R, C, 3, h, w); candidate_mask,
        bool (R, C), False for padding, which comes last; labels, int64 (R,), the column of the relevant candidate.
        Returns {"losses": float32 (R,), "scores": float32 (R, C), padded with -inf}. The loss is the cross-entropy of
        picking the relevant candidate; there is one a row, since only the caller knows the global batch it is averaged over.
        """
        if images is not None:
            return {"outputs": self.embed(images)}
        rows, width = candidate_mask.shape
        page_embeddings = self.embed(pages)  # (R, D)
        candidate_embeddings = self.embed(candidates.flatten(0, 1)).unflatten(0, (rows, width))  # (R, C, D)
        scores = cosine(page_embeddings[:, None], candidate_embeddings)  # (R, C)
        # Masked after the scaling: 0 x -inf would be a NaN in the gradient of the scale.
        logits = (scores * self.log_scale.exp()).masked_fill(~candidate_mask, -math.inf)  # (R, C)
        losses = functional.cross_entropy(logits, labels, reduction="none")  # (R,)
        return {"losses": losses, "scores": scores.masked_fill(~candidate_mask, -math.inf)}

    def embed(self, images):
        """uint8 (B, 3, H, W) to float32 (B, D) of length 1. Call `forward`, not this, from outside."""
        # Pixels travel to the device as bytes, a quarter of the traffic, and become numbers here.
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.config.image_mean, self.config.image_std)
        )
        pixel_values = (images / 255 - mean) / std
        states = self.backbone(pixel_values.to(self.projection.weight.dtype))
        hidden = states.last_hidden_state  # (B, width, h, w) from a convolutional backbone, (B, tokens, width) from a transformer
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden  # (B, positions, width)
        pooled = hidden.mean(1) if states.get("pooler_output") is None else states.pooler_output.flatten(1)  # (B, width)
        # How much a feature varies over the image tells one style from another better than its mean alone does.
        spread = (hidden.float().var(1, unbiased=False) + 1e-5).sqrt().to(pooled.dtype)
        embedding = self.projection(torch.cat([pooled, spread], dim=1))
        return functional.normalize(embedding.float(), dim=1)


def cosine(a, b):
    """Cosine of embeddings of length 1: float32 (..., D) and (..., D) to (...).

    A product and a sum rather than a matrix product: autocast leaves them in float32 (in bfloat16 many scores would be tied),
    and the bits of a score do not depend on how many others are computed with it.
    """
    return (a * b).sum(-1)


def rerank_scores(outputs, queries, candidates):
    """From an evaluation's outputs, float32 (M, D), to scores, float32 (N, C) padded with -inf.

    queries: int (N,), candidates: int (N, C) padded with -1; both say which of the M inputs.
    """
    scores = torch.full(candidates.shape, -math.inf, device=outputs.device)  # (N, C)
    rows, columns = torch.nonzero(candidates >= 0, as_tuple=True)  # (pairs,), without the padding: lists differ a lot in length
    for pairs in torch.arange(len(rows)).split(2**16):  # bounds the memory to 2 x 65536 x D numbers
        row, column = rows[pairs], columns[pairs]
        scores[row, column] = cosine(outputs[queries[row]], outputs[candidates[row, column]])
    return scores


def load_model(model_name_or_path):
    """A DualEncoder. From None: small, untrained; else a folder that train.py saved, or any vision model, local or on the hub."""
    if model_name_or_path is None:
        return DualEncoder(DualEncoderConfig())
    config = AutoConfig.from_pretrained(model_name_or_path)
    if isinstance(config, DualEncoderConfig):
        return DualEncoder.from_pretrained(model_name_or_path)
    config = getattr(config, "vision_config", config)  # CLIP and its like: the image half
    backbone = AutoModel.from_pretrained(model_name_or_path, config=config, dtype=torch.float32)
    preprocessing = read_preprocessing(model_name_or_path)
    size = getattr(config, "image_size", None) or 224
    return DualEncoder(DualEncoderConfig(backbone_config=config, page_size=size, element_size=size, **preprocessing), backbone)


def read_preprocessing(model_name_or_path):
    """The image_mean and image_std that the backbone was trained with, or {} if it does not say."""
    path = cached_file(model_name_or_path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    return {name: values[name] for name in ("image_mean", "image_std") if name in values}


# So that AutoConfig and AutoModel know a folder that train.py saved, once this file is imported.
AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig)
AutoModel.register(DualEncoderConfig, DualEncoder)
