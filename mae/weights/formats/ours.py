"""The files of this library: the layout of the published code, with more settings.

A .safetensors file has the settings in its metadata. A folder of a sharded run has the same content.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Size

from mae.weights.foreign_settings import recorded
from mae.weights.formats import timm
from mae.weights.formats.format import Format, Record

NAME = "ours"


def matches(record: Record, names: Collection[str]) -> bool:
    """A file whose settings are ours: the published code has no in_chans. User code may have any names."""
    return record.is_ours and "in_chans" in record.args


def settings(record: Record, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """All settings. An export to a folder of timm has a configuration as well."""
    return recorded(record)


FORMAT = Format(NAME, matches, timm.tensors, settings)
