"""All settings of a run as one value, and the rule that says where each comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mae.settings.data import DataSpec
from mae.settings.fields import HEAD, IMAGES, LABELS, MACHINE, MODEL, OPTIM, SPLIT, Values
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.names import FIELDS, FLIPS, PARTS, names_of, names_with
from mae.settings.training import ComparisonSpec, EvaluationSpec, MachineSpec, OptimSpec


@dataclass(frozen=True)
class Run:
    """The settings of a run, by what they are about.

    Args:
        names: the settings that the script has, and those that the run has determined. `record` contains them.
        others: entries of a Namespace that are no settings of this library. `record` contains them.
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
    others: Mapping[str, Any] = field(default_factory=dict)
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
        parts: dict[str, Any] = {part: kind(**_of(kind, values)) for part, kind in PARTS.items()}
        names = frozenset(values.keys() & PART_OF.keys())
        others = {name: value for name, value in values.items() if name not in PART_OF}
        return cls(**parts, names=names, explicit=names if explicit is None else frozenset(explicit), others=others)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Any:
        return getattr(getattr(self, PART_OF[name]), name)

    def record(self) -> dict[str, Any]:
        """Returns the settings by their names, as plain values."""
        script = {"script": self.script} if self.script else {}
        return {**self.others, **script, **{name: self[name] for name in PART_OF if name in self.names}}

    def changed(self, settings: Mapping[str, Any]) -> Run:
        """Returns a run with other values of settings, which are explicit and are recorded."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            parts.setdefault(PART_OF[name], {})[name] = value
        new: dict[str, Any] = {part: replace(getattr(self, part), **values) for part, values in parts.items()}
        return replace(self, **new, names=self.names | settings.keys(), explicit=self.explicit | settings.keys())


PART_OF = {name: next(part for part, kind in PARTS.items() if kind is FIELDS[name][0]) for name in FIELDS}
assert len(PART_OF) == sum(len(fields(kind)) for kind in PARTS.values()), "a setting has two homes"

# What None stands for, of settings that a file may determine.
UNSET: dict[str, Any] = {"num_cls_tokens": 1, "regression_loss": "l1"}

# What a run does with a file -> the settings that it takes from the file.
RESUME, RESUME_PUBLISHED, EVALUATE, TRAIN = "resume", "resume a published checkpoint", "evaluate", "train"
TAKEN = {
    RESUME: FIELDS.keys() - names_with(MACHINE),
    RESUME_PUBLISHED: {*names_with(MODEL, HEAD, LABELS, IMAGES, OPTIM)},  # its other settings are of another program
    EVALUATE: {*names_with(MODEL, HEAD, LABELS, IMAGES, SPLIT)},
    TRAIN: {*names_with(MODEL, IMAGES), *FLIPS, "min_valid"},  # min_valid gives nodata its meaning
}


def resolve(run: Run, of_file: Mapping[str, Any], purpose: str) -> Run:
    """Returns the settings of a run that uses a file: explicit ones, else those of the file, else the defaults.

    Args:
        run: the explicit settings and the defaults.
        of_file: the settings of the file, by the rule of `chosen`. None counts as absent.
        purpose: RESUME, RESUME_PUBLISHED, EVALUATE or TRAIN.
    """
    taken = TAKEN[purpose] & run.names - run.explicit
    if "blr" in run.explicit:
        taken -= {"lr"}  # it would take precedence
    return run.changed({name: value for name, value in _known(of_file).items() if name in taken})


def _of(kind: type[Values], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a class. None is a value, as a script may have it as its default."""
    return {name: values[name] for name in names_of(kind) if name in values}


def effective(run: Run, name: str) -> Any:
    """Returns a setting; in place of None, the value that it stands for without a file."""
    return UNSET.get(name) if run[name] is None else run[name]


def chosen(
    explicit: Mapping[str, Any], recorded: Mapping[str, Any], determined: Mapping[str, Any], default: Mapping[str, Any]
) -> dict[str, Any]:
    """The rule: an explicit setting, else what a file records, else what its shapes determine, else the default.

    None counts as absent.
    """
    return {**default, **_known(determined), **_known(recorded), **_known(explicit)}


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
