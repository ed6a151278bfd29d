"""Remedies in error messages, which `entry_point.run` prints where the script has the flags, and the nearest name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Error = TypeVar("Error", bound=Exception)
OFF = {"global_pool": "--cls_token"}  # where the flag that turns a setting off is not --no_NAME


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: the most similar known one, if its similarity is above `cutoff`."""
    same = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), same, n=1, cutoff=cutoff)
    return f"; did you mean {same[matches[0]]}?" if matches else ""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The settings in `after` that were other ones in `before`, for a message; "" if there are none."""
    different = [key for key in after if before.get(key) != after[key]]
    return "; ".join(f"{key} was {before.get(key)} and is {after[key]}" for key in different)


def advised(error: Error, *remedies: str) -> Error:
    """The error with remedies as its notes.

    The code that raises an error does not depend on the script. `entry_point.run` does: it adds to the message the
    remedies whose flags the script has.

    Args:
        remedies: in the order of their use, such as "--finetune FILE starts from its weights".
    """
    for remedy in remedies:
        error.add_note(remedy)
    return error


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed: `--in_chans 1 --cls_token`."""
    return " ".join(_flag(name, value) for name, value in settings.items())


def _flag(name: str, value: Any) -> str:
    if value is None:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else OFF.get(name, f"--no_{name}")
    return f"--{name} " + " ".join(map(str, value if isinstance(value, list | tuple) else [value]))
