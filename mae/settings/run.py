"""All settings of a run as one value: the explicit ones, those that files record, and the defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mae.settings.data import DataSpec
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.resolve import FIELDS
from mae.settings.training import ComparisonSpec, EvaluationSpec, MachineSpec, OptimSpec


@dataclass(frozen=True)
class Run:
    """The settings of a run, by what they are about.

    Args:
        names: the settings that the script has, and those that the run has determined. `record` contains them.
        explicit: those that a command line, a recipe or a program has set, and that no file replaces.
        script: name of the script, such as "main_pretrain".
    """

    model: ModelSpec
    images: ImageSpec
    augmentation: AugmentationSpec
    data: DataSpec
    optim: OptimSpec
    evaluation: EvaluationSpec
    machine: MachineSpec
    comparison: ComparisonSpec
    names: frozenset[str]
    explicit: frozenset[str] = frozenset()
    script: str = ""

    @classmethod
    def of(cls, settings: Any, explicit: Collection[str] | None = None) -> Run:
        """Returns the run of settings by their names.

        Args:
            settings: a mapping, a Namespace, or a run.
            explicit: names of the explicit settings. Default: all, because a program has no other settings.
        """
        if isinstance(settings, Run):
            return settings
        values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else vars(settings)
        parts: dict[str, Any] = {part: kind.of(values) for part, kind in PARTS.items()}
        names = frozenset(values)
        return cls(**parts, names=names, explicit=names if explicit is None else frozenset(explicit))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Any:
        return getattr(getattr(self, PART_OF[name]), name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a setting by its name; the default, if the script does not have it."""
        return self[name] if name in self.names else default

    def record(self) -> dict[str, Any]:
        """Returns the settings by their names, as plain values."""
        own = {"script": self.script} if self.script else {}
        return own | {name: self[name] for name in PART_OF if name in self.names}

    def changed(self, settings: Mapping[str, Any], explicit: bool = False) -> Run:
        """Returns a run with other values of settings, which are recorded.

        Args:
            explicit: no file replaces them.
        """
        parts: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            parts.setdefault(PART_OF[name], {})[name] = value
        new: dict[str, Any] = {part: replace(getattr(self, part), **values) for part, values in parts.items()}
        fixed = self.explicit | settings.keys() if explicit else self.explicit
        return replace(self, **new, names=self.names | settings.keys(), explicit=fixed)


PARTS = {"model": ModelSpec, "images": ImageSpec, "augmentation": AugmentationSpec, "data": DataSpec,
         "optim": OptimSpec, "evaluation": EvaluationSpec, "machine": MachineSpec,
         "comparison": ComparisonSpec}  # fmt: skip
PART_OF = {name: next(part for part, kind in PARTS.items() if kind is FIELDS[name][0]) for name in FIELDS}
assert len(PART_OF) == sum(len(fields(kind)) for kind in PARTS.values()), "a setting has two homes"
