"""Settings of a model that the names and shapes of its tensors determine."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Size

from mae import probes
from mae.checkpoints.checkpoint import CheckpointError
from mae.sizes import side_or_sides

# The weights of the head of a classifier, of a probe (`probes.probe_head`), and of the first of several probes.
HEAD = "head.weight"
PROBE_HEAD = "head.1.weight"
FIRST_OF_HEADS = "head.0.1.weight"
PATCHES = "patch_embed.proj.weight"  # (D, c, p, q)
# of segmentation models
PIXEL_HEAD = "head.classifier.weight"
DPT_HEAD = "head.projects.0.weight"


def determined(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """Returns all settings that names and shapes of tensors determine; images are assumed to be squares."""
    count = sizes["cls_token"][1] if "cls_token" in sizes else 1  # a model of timm may have none
    settings: dict[str, Any] = {
        "num_cls_tokens": count,
        "learned_pos_embed": count > 1,  # as in published autoencoders
        "probe": None,
        "global_pool": "fc_norm.weight" in sizes,
        "nb_classes": next((sizes[name][0] for name in (HEAD, PROBE_HEAD, PIXEL_HEAD) if name in sizes), 0),
        "decoder_depth": _depth(sizes, "decoder_blocks") or None,
    }
    if PROBE_HEAD in sizes:
        settings |= probes.determined(sizes)
    elif not sizes.keys() & {HEAD, FIRST_OF_HEADS, PIXEL_HEAD} and any(name.startswith("head.") for name in sizes):
        del settings["probe"]  # one with other tensors: the file records it
    if PIXEL_HEAD in sizes:
        settings["head"] = "dpt" if DPT_HEAD in sizes else "linear"
    if PATCHES not in sizes or "pos_embed" not in sizes:  # of an encoder of the user's code
        return settings | ({"in_chans": sizes[PATCHES][1]} if PATCHES in sizes else {})
    _, channels, *patch = sizes[PATCHES]
    settings |= {"patch_size": side_or_sides(patch), "in_chans": channels}
    length = sizes["pos_embed"][1]
    # The class tokens have positions, except in timm's models with no_embed_class.
    side = next((math.isqrt(n) for n in (length - count, length) if math.isqrt(max(n, 0)) ** 2 == n), None)
    if side:
        settings["input_size"] = side_or_sides([side * length for length in patch])
    return settings


def certain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the `determined` settings that hold whatever a file records; earlier versions recorded others.

    A file may record another probe with the tensors of a linear one.
    """
    names = ["num_cls_tokens", *(probe.counts for probe in probes.PROBES.values()), "head"]
    if "probe" in settings and (settings["probe"] is None or probes.PROBES[settings["probe"]].tensor):
        names.append("probe")
    return {name: settings[name] for name in names if name in settings}


def width_and_depth(sizes: Mapping[str, Size]) -> tuple[int, int]:
    """Returns the channels of a token of the encoder, and the number of its blocks."""
    return sizes["cls_token"][2] if "cls_token" in sizes else 0, _depth(sizes, "blocks")


def _depth(names: Iterable[str], blocks: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)


def require_settings(settings: Mapping[str, Any], names: Sequence[str], origin: str, remedy: str) -> None:
    """Requires the settings that a task needs.

    Args:
        settings: the settings of a file, and those that its shapes determine.
        origin: the file, for the message.
        remedy: the end of the message.

    Raises:
        CheckpointError: settings have no value. It names all of them.
    """
    if missing := [name for name in names if settings.get(name) is None]:
        raise CheckpointError(f"{origin} records no {' and no '.join(missing)}: {remedy}")
