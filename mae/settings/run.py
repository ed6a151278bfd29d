"""All settings of a run: by their names, as one value, and the rule that says where each comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mae.settings.data import DataSpec
from mae.settings.fields import FREE, HEAD, IMAGES, LABELS, MACHINE, MODEL, OPTIM, SPLIT, Values, element_types, lists
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.training import ComparisonSpec, EvaluationSpec, MachineSpec, OptimSpec
from mae.sizes import to_pair

SIZES = ("input_size", "patch_size")  # one number is the size of a square
DATASETS = ("data_path", "dataset", "train_list", "val_list", "train_folders", "val_folders")  # each names a dataset
ARGUMENTS = "encoder_args"  # the only setting of which a file may give a part
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
    free = names_with(MACHINE)
    rules = {one.name: one.metadata["resumed"] for kind in SPECS for one in fields(kind)}
    return [name for name, rule in rules.items() if (FREE if name in free else rule) == resumed]


def fits(name: str, value: Any) -> bool:
    """Whether a recorded value of a setting has its type; of a list, each element. bool is no number."""
    kinds = ELEMENT_TYPES.get(name)
    parts = value if isinstance(value, list | tuple) and name in LISTS else [value]
    return kinds is None or all(type(part) in kinds for part in parts)


def differs(name: str, first: Any, second: Any) -> bool:
    """Whether two values of a setting differ. One number is the size of a square, and tuples are lists."""
    first, second = (list(value) if isinstance(value, tuple) else value for value in (first, second))
    if name in SIZES and None not in (first, second):
        return to_pair(first) != to_pair(second)
    return first != second


ELEMENT_TYPES = {name: kinds for kind in SPECS for name, kinds in element_types(kind).items()}
LISTS = {name for kind in SPECS for name in lists(kind)}
# What rebuilds a model and its transform:
REBUILDS = names_with(MODEL, HEAD, LABELS, IMAGES)
EXPORTED = [*REBUILDS, *FLIPS]  # what files of other formats keep


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
        """Returns the settings by their names, as plain values. By their order, `resume` knows earlier versions."""
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
RESUME = "resume"
RESUME_PUBLISHED = "resume a published checkpoint"
EVALUATE = "evaluate"
TRAIN = "train"
TAKEN = {
    RESUME: FIELDS.keys() - names_with(MACHINE),
    RESUME_PUBLISHED: {*names_with(MODEL, HEAD, LABELS, IMAGES, OPTIM)},  # its other settings are of another program
    EVALUATE: {*names_with(MODEL, HEAD, LABELS, IMAGES, SPLIT)},
    TRAIN: {*names_with(MODEL, IMAGES), *FLIPS, "min_valid"},  # min_valid gives nodata its meaning
}


def taken_from(
    of_file: Mapping[str, Any], settings: Mapping[str, Any], explicit: frozenset[str], purpose: str
) -> dict[str, Any]:
    """Returns the settings that a run takes from a file: those that are not explicit.

    Args:
        of_file: the settings of the file, by the rule of `chosen`. None counts as absent.
        settings: the settings of the run: explicit ones and defaults.
        explicit: the names of the explicit ones.
        purpose: RESUME, RESUME_PUBLISHED, EVALUATE or TRAIN.
    """
    taken = TAKEN[purpose] & settings.keys() - explicit
    if "blr" in explicit:
        taken -= {"lr"}  # it would take precedence
    given = {name: settings[name] for name in explicit & {ARGUMENTS}}
    found = {name: value for name, value in _known(of_file).items() if name in taken}
    return found | _arguments(given, of_file)


def _of(kind: type[Values], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a class. None is a value, as a script may have it as its default."""
    return {name: values[name] for name in names_of(kind) if name in values}


def effective(settings: Mapping[str, Any], name: str) -> Any:
    """Returns a setting; in place of None, the value that it stands for without a file."""
    return UNSET.get(name) if settings[name] is None else settings[name]


def chosen(
    explicit: Mapping[str, Any], recorded: Mapping[str, Any], determined: Mapping[str, Any], default: Mapping[str, Any]
) -> dict[str, Any]:
    """The rule: an explicit setting, else what a file records, else what its shapes determine, else the default.

    None counts as absent.
    """
    found = {**default, **_known(determined), **_known(recorded), **_known(explicit)}
    return found | _arguments(explicit, recorded)


def _arguments(explicit: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the class of `encoder`, by their names: explicit ones, and others of a file."""
    given, of_file = (settings.get(ARGUMENTS) for settings in (explicit, recorded))
    if not (given and of_file):
        return {}
    return {ARGUMENTS: [*{text.partition("=")[0]: text for text in [*of_file, *given]}.values()]}


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
