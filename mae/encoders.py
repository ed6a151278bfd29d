"""Encoders by name: those of other methods, whose files say which one they have."""

import importlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mae import user_code
from mae.registry import find
from mae.settings.values import read_value


class Named(NamedTuple):
    """An encoder of this library. `path`: its class, as `module:name`, which is imported when it is used."""

    help: str
    path: str
    is_default: bool = False


ENCODERS = {
    "dinov2": Named("of DINOv2, with `learned_pos_embed`", "models_dino:DINOv2"),
    "dinov3": Named("of DINOv3", "models_dino:DINOv3"),
}
# The names of df1688b4: encoders, and encoders with low-rank updates.
EXAMPLE = re.compile(r"examples\.(dino|lora):(LoRA)?(DINOv[23])?")


def class_of(name: str | None) -> type | None:
    """Returns the encoder that a setting or a file names. None: it names none, or the user's code.

    Raises:
        ValueError: there is no such encoder.
    """
    if not name or ":" in name:
        return None
    module, _, kind = find("encoder", ENCODERS, name).path.partition(":")
    found: type = getattr(importlib.import_module(module), kind)
    return found


def class_named(name: str) -> type:
    """Returns the encoder that a flag names, which may be the user's code.

    Raises:
        ValueError: there is no such encoder, or it can't be imported.
    """
    return class_of(name) or user_code.import_object("encoder=", name)


def name_of(kind: type) -> str:
    """Returns the name of an encoder, as a value of `encoder`."""
    path = user_code.name_of(kind)
    return next((name for name, entry in ENCODERS.items() if entry.path == path), path)


def user_code_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an encoder of the user's code, which commands that read a file of it need."""
    names = ("encoder", "encoder_args") if ":" in (settings.get("encoder") or "") else ()
    return {name: settings.get(name) for name in names}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns recorded settings with the present names of the encoders that were examples, and of their updates."""
    match = EXAMPLE.fullmatch(str(settings.get("encoder")))
    if not match:
        return dict(settings)
    texts = settings.get("encoder_args") or []
    arguments = {name: read_value(value) for name, _, value in (text.partition("=") for text in texts)}
    found = {"encoder": match[3] and match[3].lower()}
    if match[2]:
        rank = arguments.pop("rank", 8)
        found |= {"lora": rank, "lora_alpha": float(arguments.pop("alpha", None) or rank)}
    left = [text for text in texts if text.partition("=")[0] in arguments]
    return {**settings, **found, "encoder_args": left or None}
