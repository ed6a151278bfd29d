"""Converts the settings that transformers, timm and mmpretrain record to settings of this library.

Images: mean, std, input_size and crop_pct. Classes: `label_names`, the names of the labels in order. The setting
`classes` is different: it contains the names of folders.
"""

import ast
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae.files.untrusted import read_file
from mae.position_tables import to_pair
from mae.settings.choices import MULTILABEL, REGRESSION

logger = logging.getLogger(__name__)

MAX_CONFIG = 1_000_000  # characters; configurations of mmpretrain have about 10,000
BICUBIC = 3  # the number of Pillow's resampling filter


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
    if config.get("model_type") not in (None, "vit", "vit_mae", "pixio"):
        raise ValueError(f"model_type is {config['model_type']}, and only vit, vit_mae and pixio are supported")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act is {config['hidden_act']}, and only gelu is supported")
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
    """Returns the settings in the `meta` of a checkpoint of mmpretrain, as mmpretrain itself reads them.

    mmpretrain decodes images to BGR values from 0 to 255. Its data preprocessor reverses the channels and normalizes
    only if its configuration says so. `channel_order` is the order of the channels in the input of the model, and of
    mean and std. One value of mean or std is for all channels.

    Raises:
        Exception: the configuration can't be read or is not of literal values, or this library does not support the
            model.
    """
    settings: dict[str, Any] = {}
    dataset = meta.get("dataset_meta")
    classes = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, dict) else None
    if classes and all(isinstance(name, str) for name in classes):
        settings["label_names"] = list(classes)
    config = _python_config(meta["cfg"]) if isinstance(meta.get("cfg"), str) else {}
    if not config.keys() & {"model", "data_preprocessor"}:
        return settings
    model = config.get("model") or {}
    preprocessor = model.get("data_preprocessor", config.get("data_preprocessor")) or {}
    reversals = [preprocessor.get(name) for name in ("to_rgb", "bgr_to_rgb", "rgb_to_bgr")]
    if any(value not in (None, True, False) for value in reversals):
        raise ValueError("to_rgb of its data_preprocessor is neither True nor False")
    settings["channel_order"] = "rgb" if any(reversals) else "bgr"
    for name, identity in (("mean", 0), ("std", 1)):
        numbers = preprocessor.get(name)
        numbers = [identity] if numbers is None else numbers
        settings[name] = [number / 255 for number in numbers]
    return settings | _of_mmpretrain_model(model)


def _of_mmpretrain_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the model that the shapes of its tensors do not show."""
    settings: dict[str, Any] = {}
    backbone, neck, head = (model.get(name) or {} for name in ("backbone", "neck", "head"))
    arch, layers = backbone.get("arch"), backbone.get("layer_cfgs")
    eps, neck_eps = (_mmpretrain_eps(part) for part in (backbone, neck))
    activation = layers.get("act_cfg") if isinstance(layers, dict) else None
    if isinstance(activation, dict) and activation.get("type") != "GELU":
        raise ValueError(f"act_cfg is {activation}, and only GELU is supported")
    out_type, is_mae = backbone.get("out_type"), model.get("type") == "MAE"
    if head and not is_mae and out_type not in (None, "cls_token", "avg_featmap"):
        raise ValueError(f"out_type is {out_type!r}, and only cls_token and avg_featmap are supported with a head")
    if isinstance(arch, dict) and "num_heads" in arch:
        settings["num_heads"] = arch["num_heads"]
    if eps is not None:
        settings["layer_norm_eps"] = eps
    if "MultiLabel" in str(head.get("type")):
        settings["task"] = MULTILABEL
    if is_mae:
        settings["decoder_num_heads"] = neck.get("decoder_num_heads", 16)  # the default of mmpretrain
        settings["norm_pix_loss"] = bool(head.get("norm_pix", False))
        if eps != neck_eps:
            raise ValueError(f"eps of norm_cfg is {eps or 1e-6} in its backbone, and {neck_eps or 1e-6} in its neck")
    return settings


def _mmpretrain_eps(part: Mapping[str, Any]) -> Any:
    """Returns the eps of LayerNorm in a part of a model of mmpretrain; None if that is its default and ours, 1e-6."""
    norm = part.get("norm_cfg")
    eps = norm.get("eps", 1e-5) if isinstance(norm, dict) else 1e-6
    return None if eps == 1e-6 else eps


def _python_config(text: str) -> dict[str, Any]:
    """Returns the assignments in a configuration of mmengine, without executing it.

    Raises:
        ValueError, SyntaxError, RecursionError, MemoryError: it is not Python, or is too large.
    """
    if len(text) > MAX_CONFIG:
        raise ValueError(f"its configuration has {len(text)} characters, and at most {MAX_CONFIG} are read")
    return {target.id: _literal(node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip


def _literal(node: ast.expr) -> Any:
    """Returns the value of an expression of literals, lists, tuples (as lists) and dicts; `...` for other ones."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        words = {word.arg: _literal(word.value) for word in node.keywords}
        return ... if None in words else words  # dict(**NAME)
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        return ... if None in keys else dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...
