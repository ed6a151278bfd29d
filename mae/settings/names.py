"""The settings by their names: their classes, their roles, and when two values are the same."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mae.position_tables import to_pair
from mae.settings import fields as roles
from mae.settings.data import DataSpec
from mae.settings.fields import Values, element_types
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.training import ComparisonSpec, EvaluationSpec, MachineSpec, OptimSpec

SIZES = ("input_size", "patch_size")  # one number is the size of a square
DATASETS = ("data_path", "dataset", "train_list", "val_list", "train_folders", "val_folders")  # each names a dataset
FLIPS = ("hflip",)  # they may change labels: a training that starts from a file takes them, and so do exports
PARTS: dict[str, type[Values]] = {  # of a `Run`
    "model": ModelSpec, "images": ImageSpec, "augmentation": AugmentationSpec, "data": DataSpec, "optim": OptimSpec,
    "evaluation": EvaluationSpec, "machine": MachineSpec, "comparison": ComparisonSpec,
}  # fmt: skip
SPECS = tuple(PARTS.values())
FIELDS = {one.name: (kind, one) for kind in SPECS for one in fields(kind)}  # a setting -> its class and its field


def specs(settings: Mapping[str, Any]) -> tuple[ModelSpec, ImageSpec]:
    """Returns the model and the images of a run or of a file."""
    return ModelSpec.of(settings), ImageSpec.of(settings)


def names_of(*kinds: type[Values]) -> list[str]:
    """Lists the settings of classes."""
    return [one.name for kind in kinds for one in fields(kind)]


def names_with(*values: str) -> list[str]:
    """Lists the settings that have one of these roles."""
    return [one.name for kind in SPECS for one in fields(kind) if (one.metadata["role"] or kind.role) in values]


def names_resumed(resumed: str) -> list[str]:
    """Lists the settings that a resumed run may change freely, may change with a warning, or must not change.

    Args:
        resumed: FREE, WARNS or FIXED. A setting of a machine is FREE.
    """
    free = names_with(roles.MACHINE)
    rules = {one.name: one.metadata["resumed"] for kind in SPECS for one in fields(kind)}
    return [name for name, rule in rules.items() if (roles.FREE if name in free else rule) == resumed]


def fits(name: str, value: Any) -> bool:
    """Whether a recorded value of a setting, or each element of a list, has its type. bool is no number."""
    kinds = ELEMENT_TYPES.get(name)
    parts = value if isinstance(value, list | tuple) else [value]
    return kinds is None or all(type(part) in kinds for part in parts)


def differs(name: str, first: Any, second: Any) -> bool:
    """Whether two values of a setting differ. One number is the size of a square, and tuples are lists."""
    first, second = (list(value) if isinstance(value, tuple) else value for value in (first, second))
    if name in SIZES and None not in (first, second):
        return to_pair(first) != to_pair(second)
    return first != second


ELEMENT_TYPES = {name: kinds for kind in SPECS for name, kinds in element_types(kind).items()}
# What rebuilds a model and its transform:
REBUILDS = names_with(roles.MODEL, roles.HEAD, roles.LABELS, roles.IMAGES)
EXPORTED = [*REBUILDS, *FLIPS]  # what files of other formats keep
