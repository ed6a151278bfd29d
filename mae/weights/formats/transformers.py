"""The files and folders of transformers.

It has three layouts: its files (`vit.encoder.layer.0.attention.attention.query`), the decoder in files of 5.x
(`decoder.decoder_encoder`), and models of 5.x in memory (`vit.layers.0.attention.q_proj`). Query, key and value are
separate there, and one matrix `qkv` here.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from mae.files.untrusted import read_file
from mae.settings.choices import MULTILABEL, REGRESSION
from mae.weights.formats import timm
from mae.weights.formats.format import DECODER, Format, Record, Rows, blocks, renamed, to_ours

logger = logging.getLogger(__name__)

NAME = "transformers"
MODEL_TYPES = ("vit", "vit_mae", "pixio", "dinov2", "dinov2_with_registers", "dinov3_vit")
PROCESSOR = "preprocessor_config.json"  # beside config.json: the settings of the images
BICUBIC = 3  # the number of Pillow's resampling filter
SPLIT = ("query", "key", "value")  # of `attn.qkv`


def _rows(layers: str, decoder_layers: str, block: dict[str, str]) -> Rows:
    block = {"norm1": "layernorm_before", "norm2": "layernorm_after", **block}
    return [
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        *blocks("blocks", layers, block),
        ("norm.", "layernorm."),
        ("head.", "classifier."),
        *((name, f"decoder.{name}") for name in [*DECODER, "decoder_norm."]),
        *blocks("decoder_blocks", f"decoder.{decoder_layers}", block),
    ]


_IN_FILES = {
    **{f"attn.{part}": f"attention.attention.{part}" for part in SPLIT},
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
# Of Pixio; the names of its MLP are those of _IN_FILES in the files that the installed version writes.
_IN_PIXIO_FILES = _IN_FILES | {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_IN_MEMORY = {
    **{f"attn.{part}": f"attention.{part[0]}_proj" for part in SPLIT},
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
LAYOUTS: list[Rows] = [
    _rows("encoder.layer", "decoder_layers", _IN_FILES),
    _rows("encoder.layer", "decoder_encoder.layer", _IN_FILES),
    _rows("encoder.layer", "decoder_layers", _IN_PIXIO_FILES),
    _rows("layers", "decoder_layers", _IN_MEMORY),
]


def matches(record: Record, names: Collection[str]) -> bool:
    """A model with its embeddings, or any in a folder with its configuration."""
    return any(name.endswith("embeddings.cls_token") for name in names) or has_config(record)


def has_config(record: Record) -> bool:
    """Whether the folder of a file has a configuration, and not that of timm."""
    return record.folder is not None and timm.CONFIG not in record.config


def prefix(prefix: str, names: Collection[str]) -> str:
    """The embeddings are a part of the model, which may be a part of one with a head or a decoder."""
    return re.sub(r"(?<![^.])(vit\.)?embeddings\.$", "", prefix)


def tensors(record: Record, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights, and joins query, key and value."""
    # The features do not depend on the pooler.
    plain = {name.removeprefix("vit."): value for name, value in weights.items()}
    plain = {name: value for name, value in plain.items() if not name.startswith("pooler.")}
    return _joined(to_ours(plain, [row for rows in LAYOUTS for row in rows]))


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates query, key and value, (D, D) or (D,) each, to (3D, D) or (3D,)."""
    result = {}
    for name, value in weights.items():
        if ".attn.query." in name:
            result[name.replace(".query.", ".qkv.")] = torch.cat(
                [weights[name.replace(".query.", f".{part}.")] for part in SPLIT]
            )
        elif ".attn.key." not in name and ".attn.value." not in name:
            result[name] = value
    return result


def to_transformers(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Converts our weights to the names of a model of transformers.

    Args:
        names: the names in the state dict of that model.

    Raises:
        ValueError: no known layout has exactly these names.
    """
    split: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = zip(SPLIT, value.chunk(3), strict=True) if ".attn.qkv." in name else [("qkv", value)]
        split |= {name.replace(".qkv.", f".{part}."): tensor for part, tensor in parts}
    for rows in LAYOUTS:
        converted = renamed(split, rows)
        for prefix in ("vit.", ""):
            complete = {k if k.startswith(("decoder.", "classifier.")) else prefix + k: v for k, v in converted.items()}
            if complete.keys() == names:
                return complete
    differing = sorted(names ^ converted.keys())
    raise ValueError(f"the installed transformers has unknown names of weights: {', '.join(differing[:4])}")


def settings(record: Record, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """The settings of a folder: of the model, of an export of this library, and of the images."""
    found = {**of_config(record.config), **record.config.get("settings", {})}
    if record.folder and (record.folder / PROCESSOR).is_file():
        found |= of_processor(record.folder, json.loads(read_file(record.folder / PROCESSOR)))
    return {**found, **record.args}


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config.json of transformers.

    Raises:
        ValueError: this library does not support the model.
    """
    if config.get("model_type") not in (None, *MODEL_TYPES):
        raise ValueError(f"model_type is {config['model_type']}, and only {', '.join(MODEL_TYPES)} are supported")
    activation = "silu" if config.get("use_gated_mlp") else "gelu"  # the gate of DINOv2 has silu whatever it records
    for name, value in {"hidden_act": activation, "rope_theta": 100}.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]}, and only {value} is supported")
    names = {"image_size": "input_size", "patch_size": "patch_size", "num_channels": "in_chans",
             "norm_pix_loss": "norm_pix_loss", "mask_ratio": "mask_ratio", "num_attention_heads": "num_heads",
             "decoder_num_attention_heads": "decoder_num_heads", "layer_norm_eps": "layer_norm_eps"}  # fmt: skip
    found = {ours: config[key] for key, ours in names.items() if key in config}
    tasks = {"regression": REGRESSION, "multi_label_classification": MULTILABEL}
    if config.get("problem_type") in tasks:
        found["task"] = tasks[config["problem_type"]]
    labels = config.get("id2label") or {}
    if labels and labels.get("0") != "LABEL_0":  # transformers writes LABEL_0 for classes without names
        found["label_names"] = [labels[str(number)] for number in range(len(labels))]
    return found


def of_processor(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a preprocessor_config.json. A warning names the differences to our transform."""
    found: dict[str, Any] = {}
    if "image_mean" in config:
        mean = config["image_mean"]
        std = config["image_std"]
        if not config.get("do_normalize", True):
            mean = [0.0] * len(mean)
            std = [1.0] * len(std)
        # Our mean and std are for pixels in 0 to 1.
        scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
        scale = 1.0 if math.isclose(scale, 1) else scale
        found |= {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}
    size = config.get("size") or {}
    crop = config.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    differences = []
    if edge and height and width and config.get("do_center_crop"):
        found["crop_pct"] = crop_share(min(height, width), edge)
        if height != width:
            differences.append(
                f"crops {height} x {width} pixels of an image whose short side is {edge} (this library scales images "
                f"to cover a rectangle of this aspect ratio)"
            )
    elif config.get("do_resize", True):
        found["crop_pct"] = 1.0
        differences.append("scales images to a square (this library crops the center)")
    if config.get("resample", BICUBIC) != BICUBIC:
        differences.append(f"has resample {config['resample']} (this library: bicubic, 3)")
    if differences:
        logger.warning(f"{folder}: the image processor {' and '.join(differences)}")
    return found


def crop_share(crop: int, edge: int) -> float:
    """Returns the crop_pct for which `transforms.eval_transform` scales the short side of a picture to `edge` pixels.

    Args:
        crop: side of the crop, in pixels.
        edge: short side of the scaled picture, in pixels.
    """
    share = crop / edge
    return share if int(crop / share) == edge else crop / (edge + 0.5)


FORMAT = Format(NAME, matches, tensors, settings, prefix)
