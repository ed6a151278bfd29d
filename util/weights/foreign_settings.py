"""Converts the settings that transformers, timm and mmpretrain record to settings of this library.

Images: mean, std, input_size and crop_pct. Classes: `label_names`, the names of the labels in order. The setting
`classes` is different: it contains the names of folders.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.files.untrusted import read_file

logger = logging.getLogger(__name__)

BICUBIC = 3  # the number of Pillow's resampling filter


def read_folder(folder: Path) -> dict[str, Any]:
    """Reads the settings of a folder that transformers, timm, or `save_pretrained` of this library wrote.

    Raises:
        OSError, ValueError: config.json or preprocessor_config.json can't be read.
        KeyError, TypeError, AttributeError: a file has another structure.
    """
    config = _read_json(folder / "config.json")
    if "pretrained_cfg" in config:
        return _timm(config)
    settings = {**_transformers(config), **config.get("settings", {})}
    if (folder / "preprocessor_config.json").is_file():
        settings |= _processor(folder, _read_json(folder / "preprocessor_config.json"))
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(read_file(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is a {type(content).__name__}")
    return content


def _transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config.json of transformers.

    Raises:
        ValueError: this library does not support the model.
    """
    if config.get("model_type") not in (None, "vit", "vit_mae", "pixio"):
        raise ValueError(f"model_type is {config['model_type']}, and only vit, vit_mae and pixio are supported")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act is {config['hidden_act']}, and only gelu is supported")
    names = {"image_size": "input_size", "patch_size": "patch_size", "num_channels": "in_chans",
             "norm_pix_loss": "norm_pix_loss", "mask_ratio": "mask_ratio", "num_attention_heads": "num_heads",
             "decoder_num_attention_heads": "decoder_num_heads", "layer_norm_eps": "layer_norm_eps"}  # fmt: skip
    settings = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    labels = config.get("id2label") or {}
    if labels and labels.get("0") != "LABEL_0":  # transformers writes LABEL_0 for classes without names
        settings["label_names"] = [labels[str(number)] for number in range(len(labels))]
    return settings


def _processor(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a preprocessor_config.json. A warning names the differences to our transform."""
    settings: dict[str, Any] = {}
    if "image_mean" in config:
        mean, std = config["image_mean"], config["image_std"]
        if not config.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        # Our mean and std are for pixels in 0 to 1.
        scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
        scale = 1.0 if math.isclose(scale, 1) else scale
        settings |= {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}
    size, crop = config.get("size") or {}, config.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    differences = []
    if edge and height and width and config.get("do_center_crop"):
        settings["crop_pct"] = crop_share(min(height, width), edge)
        if height != width:
            differences.append(
                f"crops {height} x {width} pixels of an image whose short side is {edge} (this library scales images "
                f"to cover a rectangle of this aspect ratio)"
            )
    elif config.get("do_resize", True):
        settings["crop_pct"] = 1.0
        differences.append("scales images to a square (this library crops the center)")
    if config.get("resample", BICUBIC) != BICUBIC:
        differences.append(f"has resample {config['resample']} (this library: bicubic, 3)")
    if differences:
        logger.warning(f"{folder}: the image processor {' and '.join(differences)}")
    return settings


def crop_share(crop: int, edge: int) -> float:
    """Returns the crop_pct for which `transforms.eval_transform` scales the short side of a picture to `edge` pixels.

    Args:
        crop: side of the crop, in pixels.
        edge: short side of the scaled picture, in pixels.
    """
    share = crop / edge
    return share if int(crop / share) == edge else crop / (edge + 0.5)


def side_or_sides(size: Sequence[int]) -> int | list[int]:
    """Returns the side of a square, or [height, width] of another rectangle."""
    height, width = size
    return height if height == width else [height, width]


def _timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config.json of timm.

    Raises:
        ValueError: this library does not support the model.
    """
    _check_timm_arguments(config.get("model_args", {}))
    pretrained = config["pretrained_cfg"]
    channels, *size = pretrained["input_size"]
    settings = {"in_chans": channels, "input_size": side_or_sides(size)}
    settings |= {name: pretrained[name] for name in ("mean", "std", "crop_pct") if name in pretrained}
    settings |= {name: value for name, value in config.get("model_args", {}).items() if name == "num_heads"}
    if pretrained.get("crop_mode") == "squash":
        settings["crop"] = "none"
    differences = [f"{name} {pretrained[name]}" for name, own in (("interpolation", ("bicubic",)),
                                                                  ("crop_mode", ("center", "squash")))
                   if pretrained.get(name, own[0]) not in own]  # fmt: skip
    if differences:
        logger.warning(f"the timm model was evaluated with {' and '.join(differences)} (this library: bicubic, center)")
    labels = config.get("label_names") or pretrained.get("label_names")
    labels = labels.values() if isinstance(labels, dict) else labels
    return settings | ({"label_names": list(labels)} if labels else {})


def _check_timm_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of timm's model that change its output, but not the shapes of its tensors."""
    pool, norm, activation = (arguments.get(name) for name in ("global_pool", "fc_norm", "act_layer"))
    if pool not in (None, "token", "avg"):
        raise ValueError(f"global_pool is {pool!r}, and only token and avg are supported")
    if None not in (pool, norm) and norm != (pool == "avg"):
        raise ValueError(f"fc_norm is {norm} with global_pool {pool}, and only its default is supported")
    if activation not in (None, "gelu"):
        raise ValueError(f"act_layer is {activation}, and only gelu is supported")


def of_mmpretrain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the `meta` of a checkpoint of mmpretrain, whose mean and std are for values 0 to 255.

    Raises:
        ValueError: the images of the model are BGR.
    """
    settings: dict[str, Any] = {}
    dataset = meta.get("dataset_meta")
    classes = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, dict) else None
    if classes and all(isinstance(name, str) for name in classes):
        settings["label_names"] = list(classes)
    preprocessor = re.search(r"^data_preprocessor = dict\((.*?)\)$", str(meta.get("cfg", "")), re.DOTALL | re.MULTILINE)
    if preprocessor and re.search(r"to_rgb=False", preprocessor[1]):
        raise ValueError(
            "data_preprocessor has to_rgb=False, and the images here are RGB: flip the input channels of "
            "patch_embed.projection.weight, mean and std, and set to_rgb=True"
        )
    for name in ("mean", "std") if preprocessor else ():
        numbers = re.search(rf"{name}=\[([\d., \n]+)\]", preprocessor[1])  # type: ignore[index]
        if numbers:
            settings[name] = [float(number) / 255 for number in numbers[1].split(",") if number.strip()]
    return settings
