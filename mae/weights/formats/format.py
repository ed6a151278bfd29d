"""What a file of weights records, and the type of its format."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Size, Tensor

Rows = list[tuple[str, str]]  # pairs (ours, theirs) of names, or of prefixes that end with a dot; # is a number

DECODER = ["mask_token", "decoder_pos_embed", "decoder_embed.", "decoder_pred."]


class Record(NamedTuple):
    """What a file contains without its tensors, and what is beside it."""

    path: Path
    is_ours: bool = False  # of this library or of the published code, whose models and images are known
    args: Mapping[str, Any] = MappingProxyType({})  # settings that the run recorded: of this library, of a script
    folder: Path | None = None  # of transformers or timm
    config: Mapping[str, Any] = MappingProxyType({})  # its config.json
    meta: Any = None  # the entry of mmpretrain


def _same(prefix: str, names: Collection[str]) -> str:
    return prefix


class Format(NamedTuple):
    """How a library writes the weights of a Vision Transformer. `mae.weights.reading.FORMATS` has all of them."""

    name: str
    # Whether a model has this format, by the names of its tensors.
    matches: Callable[[Record, Collection[str]], bool]
    # The tensors of the model -> the tensors under our names. KeyError, RuntimeError: one is missing, or does not fit.
    tensors: Callable[[Record, dict[str, Tensor]], dict[str, Tensor]]
    # The settings that the file records, or that the shapes of the tensors under our names show. Any error: they are
    # not supported.
    settings: Callable[[Record, Mapping[str, Size]], dict[str, Any]]
    # The prefix of a class token, and the names of all tensors -> the prefix of the model.
    prefix: Callable[[str, Collection[str]], str] = _same
    trained_by: str = ""  # the method whose loss trained the class token, if it is that of all files


def blocks(ours: str, foreign: str, parts: Mapping[str, str]) -> Rows:
    """Returns the rows of the blocks of a model. `parts`: the names in a block, ours and theirs."""
    return [(f"{ours}.#.{part}.", f"{foreign}.#.{name}.") for part, name in parts.items()]


def renamed(weights: Mapping[str, Tensor], rows: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Renames weights by pairs (old, new). Unknown names are kept."""
    patterns = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + ("" if old.endswith(".") else "$")), new)
        for old, new in rows
    ]

    def rename(name: str) -> str:
        for pattern, new in patterns:
            if match := pattern.match(name):
                return new.replace("#", match[1] if match.groups() else "") + name[match.end() :]
        return name

    return {rename(name): value for name, value in weights.items()}


def to_ours(weights: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Gives weights our names."""
    return renamed(weights, [(foreign, ours) for ours, foreign in rows])
