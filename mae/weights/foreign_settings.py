"""Converts the settings that transformers and timm record to settings of this library.

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

from mae.files.untrusted import read_file
from mae.position_tables import to_pair
from mae.settings.choices import MULTILABEL, REGRESSION

logger = logging.getLogger(__name__)

MODEL_TYPES = ("vit", "vit_mae", "pixio", "dinov2", "dinov2_with_registers", "dinov3_vit")  # of transformers
BICUBIC = 3  # the number of Pillow's resampling filter
TO_RGB = re.compile(r"to_rgb['\"]?\s*[=:]\s*True")  # in a configuration of mmpretrain, or bgr_to_rgb of mmselfsup


def read_folder(folder: Path) -> dict[str, Any]:
    """Reads the settings of a folder that transformers, timm, or `save_pretrained` of this library wrote.

    Raises:
        Exception: config.json or preprocessor_config.json can't be read, or has another structure.
    """
    config = _read_json(folder / "config.json")
    if "pretrained_cfg" in config:
        return _timm(config)
    settings = {**_transformers(config), **config.get("settings", {})}
    if (folder / "preprocessor_config.json").is_file():
        settings |= _processor(folder, _read_json(folder / "preprocessor_config.json"))
    return settings


def _read_json(path: Path) -> Any:
    return json.loads(read_file(path))


def _transformers(config: Mapping[str, Any]) -> dict[str, Any]:
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
    settings = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    tasks = {"regression": REGRESSION, "multi_label_classification": MULTILABEL}
    if config.get("problem_type") in tasks:
        settings["task"] = tasks[config["problem_type"]]
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
    if "rope" in config.get("architecture", ""):
        raise ValueError(f"architecture is {config['architecture']}, and only the rotary positions of DINOv3 are read")
    _check_timm_arguments(config.get("model_args", {}))
    pretrained = config["pretrained_cfg"]
    channels, *size = pretrained["input_size"]
    size = config.get("model_args", {}).get("img_size") or size  # earlier versions of timm did not change input_size
    settings = {"in_chans": channels, "input_size": side_or_sides(to_pair(size))}
    settings |= {name: pretrained[name] for name in ("mean", "std", "crop_pct") if name in pretrained}
    settings |= {name: value for name, value in config.get("model_args", {}).items() if name == "num_heads"}
    is_whole = pretrained.get("crop_mode") == "squash" and pretrained.get("crop_pct", 1) == 1
    if is_whole:
        settings["crop"] = "none"
    known = {"interpolation": "bicubic", "crop_mode": "squash" if is_whole else "center"}
    differences = [f"{name} {pretrained[name]}" for name in known if pretrained.get(name, known[name]) != known[name]]
    if differences:
        logger.warning(f"the timm model was evaluated with {' and '.join(differences)} (this library: bicubic, center)")
    labels = config.get("label_names") or pretrained.get("label_names")
    labels = [labels[str(number)] for number in range(len(labels))] if isinstance(labels, dict) else labels
    return settings | ({"label_names": list(labels)} if labels else {})


def _check_timm_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of timm's model that change its output, but not the shapes of its tensors."""
    pool, norm = arguments.get("global_pool"), arguments.get("fc_norm")
    is_supported = {
        "global_pool": pool in (None, "token", "avg"),
        "fc_norm": pool is None or norm is None or norm == (pool == "avg"),
        "act_layer": arguments.get("act_layer") in (None, "gelu"),
        "pool_include_prefix": not arguments.get("pool_include_prefix"),
    }
    for name, is_known in is_supported.items():
        if not is_known:
            raise ValueError(f"{name} is {arguments[name]!r}, which the models of this library do not have")


def of_timm_run(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the arguments of the model (`gp`, `model_kwargs`) of timm's train.py, if there are any.

    Raises:
        ValueError: this library does not support the model.
    """
    arguments = flags.get("model_kwargs")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    _check_timm_arguments({**({"global_pool": flags["gp"]} if flags.get("gp") else {}), **arguments})
    return {name: value for name, value in arguments.items() if name == "num_heads"}


def of_mmpretrain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names of the classes in the `meta` of a checkpoint of mmpretrain. Its configuration is not read.

    Raises:
        ValueError: the model is for BGR images. mmpretrain decodes images to BGR, and converts them to RGB only if its
            configuration says so.
    """
    config = meta.get("cfg")
    if config and not TO_RGB.search(str(config)):
        raise ValueError(
            "it has no to_rgb=True, so that the model is for BGR images: convert it as in docs/migrating.md"
        )
    dataset = meta.get("dataset_meta")
    classes = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, dict) else None
    if classes and all(isinstance(name, str) for name in classes):
        return {"label_names": list(classes)}
    return {}
