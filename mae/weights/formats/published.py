"""The files of the published code and of its forks: {"model": tensors}, and in those of a run "args", its flags."""

from collections.abc import Collection

from mae.weights.formats import ours, timm
from mae.weights.formats.format import Format, Record

NAME = "published"


def matches(record: Record, names: Collection[str]) -> bool:
    """A file with this layout and our names. The released files have no settings."""
    return record.is_ours and "cls_token" in names


FORMAT = Format(NAME, matches, timm.tensors, ours.settings)
