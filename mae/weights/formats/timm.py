"""The files and folders of timm, and files of other code with its names, which are ours."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from mae.sizes import side_or_sides, to_pair
from mae.weights.formats import mmpretrain
from mae.weights.formats.format import Format, Record

logger = logging.getLogger(__name__)

NAME = "timm"
CONFIG = "pretrained_cfg"  # the entry in a config.json with the settings of the images


def matches(record: Record, names: Collection[str]) -> bool:
    """Any other file: what its tensors lack is named in an error."""
    return True


def tensors(record: Record, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Appends the register tokens to the class tokens, if the head pools patches and uses neither."""
    if not {"reg_token", "fc_norm.weight"} <= weights.keys():
        return weights
    tokens = [weights[name] for name in ("cls_token", "reg_token") if name in weights]
    rest = {name: value for name, value in weights.items() if name != "reg_token"}
    return {**rest, "cls_token": torch.cat(tokens, dim=1)}


def settings(record: Record, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """The settings of a folder, or of a run of timm's train.py."""
    of_folder = of_config(record.config) if CONFIG in record.config else {}
    args = dict(record.args)
    if not (record.is_ours or "settings" in record.config):
        args.pop("channels_last", None)  # of train.py, the layout in memory; of this library, that of arrays
    found = {**of_folder, **args, **of_run(record.args), **mmpretrain.of_meta(record)}
    size = found.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:  # train.py records (channels, height, width)
        found["input_size"] = side_or_sides(size[1:])
    return found


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config.json: those of the images, and `label_names`.

    Raises:
        ValueError: this library does not support the model.
    """
    if "rope" in config.get("architecture", ""):
        raise ValueError(f"architecture is {config['architecture']}, and only the rotary positions of DINOv3 are read")
    arguments = config.get("model_args", {})
    pretrained = config[CONFIG]
    _check_arguments(arguments)
    channels, *size = pretrained["input_size"]
    size = arguments.get("img_size") or size  # earlier versions of timm did not change input_size
    found = {"in_chans": channels, "input_size": side_or_sides(to_pair(size))}
    found |= {name: pretrained[name] for name in ("mean", "std", "crop_pct") if name in pretrained}
    found |= {name: value for name, value in arguments.items() if name == "num_heads"}
    is_whole = pretrained.get("crop_mode") == "squash" and pretrained.get("crop_pct", 1) == 1
    if is_whole:
        found["crop"] = "none"
    known = {"interpolation": "bicubic", "crop_mode": "squash" if is_whole else "center"}
    differences = [f"{name} {pretrained[name]}" for name in known if pretrained.get(name, known[name]) != known[name]]
    if differences:
        logger.warning(f"the timm model was evaluated with {' and '.join(differences)} (this library: bicubic, center)")
    labels = config.get("label_names") or pretrained.get("label_names")
    labels = [labels[str(number)] for number in range(len(labels))] if isinstance(labels, dict) else labels
    return found | ({"label_names": list(labels)} if labels else {})


def of_run(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the arguments of the model (`gp`, `model_kwargs`) of train.py, if there are any.

    Raises:
        ValueError: this library does not support the model.
    """
    arguments = flags.get("model_kwargs")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    _check_arguments({**({"global_pool": flags["gp"]} if flags.get("gp") else {}), **arguments})
    return {name: value for name, value in arguments.items() if name == "num_heads"}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of a model that change its output, but not the shapes of its tensors."""
    pool = arguments.get("global_pool")
    norm = arguments.get("fc_norm")
    is_supported = {
        "global_pool": pool in (None, "token", "avg"),
        "fc_norm": pool is None or norm is None or norm == (pool == "avg"),
        "act_layer": arguments.get("act_layer") in (None, "gelu"),
        "pool_include_prefix": not arguments.get("pool_include_prefix"),
    }
    for name, is_known in is_supported.items():
        if not is_known:
            raise ValueError(f"{name} is {arguments[name]!r}, which the models of this library do not have")


FORMAT = Format(NAME, matches, tensors, settings)
