"""The field of a settings class: the only definition of a setting, from which its flag is generated.

The classes of this package hold the settings of a run as values. Other code asks their fields, and lists no names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

# whether a resumed run may change a setting
FREE = "free"
WARNS = "warns"
FIXED = "fixed"

# What a setting is about. `run.py` says which uses of a file take the settings of which roles.
MODEL = "model"  # the encoder and the decoder
HEAD = "head"  # the head of a model, and its task
LABELS = "labels"  # the meaning of labels
IMAGES = "images"  # how a picture becomes the input of a model
DATA = "data"  # the dataset, and how it is read
SPLIT = "split"  # which training images --val_fraction holds out
OPTIM = "optim"  # the optimization, as the published code records it
TRAINING = "training"  # the rest of a training
MACHINE = "machine"  # a machine, or a start of the program. Never taken from a file

Spec = TypeVar("Spec", bound="Values")


def setting(
    default: Any,
    type: Any = None,
    *,
    group: str = "",
    role: str = "",
    resumed: str = WARNS,
    aliases: Sequence[str] = (),
    off: str = "",
    **argument: Any,
) -> Any:
    """Returns a field with a flag of its name.

    Args:
        default: the default of the field and of the flag. A script may have another one.
        type: function that returns the value of a text, and raises ValueError. Default: text, or a bool.
        group: group of --help. Default: that of the class.
        role: what the setting is about. Default: the role of the class.
        resumed: FREE, WARNS or FIXED; a setting that is FIXED determines the meaning of the data or the task.
        aliases: further spellings of the flag.
        off: help of the flag that disables a `switch`.
        argument: arguments of `argparse.ArgumentParser.add_argument`. The action `switch` adds two flags, --NAME and
            --no_NAME; `size` takes one number or two, and `range` an ascending pair.
    """
    flag = {"type": type, "aliases": aliases, "off": off, "group": group, **argument}
    metadata = {"flag": flag, "role": role, "resumed": resumed}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fact(default: Any, *, role: str = "", resumed: str = WARNS) -> Any:
    """Returns a field without a flag: the data, the model or a file determine its value, and a run records it."""
    return field(default=default, metadata={"flag": None, "role": role, "resumed": resumed})


@dataclass(frozen=True)
class Values:
    """The base of the settings classes. A class has the group and the role of the fields that name none."""

    group: ClassVar[str] = ""
    role: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "", role: str = "") -> None:
        cls.group = group or cls.group
        cls.role = role or cls.role

    @classmethod
    def of(cls: type[Spec], settings: Mapping[str, Any]) -> Spec:
        """Returns the settings of a class among all settings of a run. Absent settings and None are the default."""
        known = {one.name: settings.get(one.name) for one in fields(cls)}
        return cls(**{name: value for name, value in known.items() if value is not None})

    def record(self) -> dict[str, Any]:
        """Returns the settings by the names of the flags, as plain values."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def default_of(one: Field[Any]) -> Any:
    """Returns the default of a field; of a list, a new one."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def element_types(kind: type[Values]) -> dict[str, tuple[type, ...]]:
    """Returns the types of the values of each setting of a class; of lists, the types of their elements."""
    return {name: _element_types(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) != ClassVar}


def lists(kind: type[Values]) -> set[str]:
    """Returns the names of the settings of a class whose values may be lists; tuples are lists in a file."""
    return {name for name, hint in get_type_hints(kind).items() if _takes_list(hint)}


def _takes_list(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple) or any(map(_takes_list, get_args(hint)))


def _element_types(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (list, Union, UnionType):
        return tuple(dict.fromkeys(kind for part in get_args(hint) for kind in _element_types(part)))
    if hint is float:
        return (int, float)
    return () if hint is type(None) else (hint,)
