"""A small data set of our task, a model for it that computes next to nothing, tiny backbones."""

import csv

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

import data
from model import DualEncoder, DualEncoderConfig

COLUMNS = [
    "search_word",
    "template_idx",
    "page_num",
    "x_image_path",
    "resourceKey",
    "candidate_resourceKey",
    "x_info",
    "y_info",
]


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
FAMILIES = {
    "vit": TINY,
    "dinov2": TINY | {"mlp_ratio": 2},
    "dinov2_with_registers": TINY | {"mlp_ratio": 2},
    # Rescaling is random in training, as dropout is. ZeRO-3 takes no empty parameter of registers.
    "dinov3_vit": TINY | {"pos_embed_rescale": None, "num_register_tokens": 2},
    "clip_vision_model": TINY,
    "siglip_vision_model": TINY,
    "beit": TINY | {"drop_path_rate": 0.0},
    "swin": {
        **{"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32},
        **{"patch_size": 2, "window_size": 4, "drop_path_rate": 0.0},
    },
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "bit": CONVOLUTIONS | {"num_groups": 8, "image_size": 32},
    "resnet": CONVOLUTIONS,
    "hiera": {
        **{"image_size": [32, 32], "patch_stride": [4, 4], "depths": [1, 1], "num_heads": [1, 2]},
        **{"embed_dim": 16, "query_stride": [2, 2], "num_query_pool": 1},
        **{"masked_unit_size": [4, 4], "masked_unit_attention": [True, False]},
    },
}


def make_tiny_model(folder, dropout=0.1):
    """A folder with a model that computes next to nothing. dropout: of its hidden states."""
    backbone = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    backbone |= {"image_size": 16, "patch_size": 8, "hidden_dropout_prob": dropout}
    config = DualEncoderConfig(
        backbone_config=backbone, feature_size=86, embedding_size=16, page_size=16, element_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # which evaluation is the best one depends on it
        DualEncoder(config).save_pretrained(folder)
    return folder


def make_backbone(folder, kind, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **FAMILIES.get(kind, TINY) | changes)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_data(folder, train=41, evaluation=13, test=17, elements=30):
    """A data set of noise in the layout of data.py. Its numbers of rows divide by nothing.

    Returns the folder.
    """
    random = np.random.default_rng(0)
    for name in ("csv", "images", "elements"):
        (folder / name).mkdir(parents=True)
    keys = [
        f"요소 {number}" if number % 5 == 0 else f"element_{number}" for number in range(elements)
    ]
    for key in keys:
        save_image(
            folder / "elements" / f"{key}.png", random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        )
    for split, rows in {"train": train, "eval": evaluation, "test_vocabulary": test}.items():
        written = []
        for row in range(rows):
            page = f"{split} {row}"
            save_image(
                folder / "images" / f"{page}.png",
                random.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            )
            found = [keys[i] for i in random.permutation(elements)[: 2 + row % 9]]
            written.append(
                [
                    "하트" if row % 2 else "heart",
                    row,
                    1,
                    page,
                    found[0],
                    found,
                    [64, 64],
                    [0, 0, 32, 32],
                ]
            )
        write_csv(folder / "csv" / f"{split}.csv", written)
    return folder


def save_image(path, pixels):
    Image.fromarray(pixels).save(path)


def write_csv(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_table(*arguments):
    """A CSV as read_tables reads it, which checks its rows."""
    return data.check_relevant(data.read_table(*arguments))
