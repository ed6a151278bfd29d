"""Remedies for error messages, and suggestions of similar names."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Error = TypeVar("Error", bound=Exception)
OFF = {"global_pool": "--cls_token"}  # settings that a flag other than --no_NAME disables


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns the end of a message about an unknown name: the most similar known name, or "".

    Args:
        cutoff: minimum similarity, as in `difflib.get_close_matches`.
    """
    same = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), same, n=1, cutoff=cutoff)
    return f"; did you mean {same[matches[0]]}?" if matches else ""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Lists the settings of `after` that differ from `before`, for a message; "" if there are none."""
    different = [key for key in after if before.get(key) != after[key]]
    return "; ".join(f"{key} was {before.get(key)} and is {after[key]}" for key in different)


def advised(error: Error, *remedies: str) -> Error:
    """Adds remedies to an error, as notes, and returns it.

    The code that raises the error does not depend on the script. `entry_point.run` appends to the message only the
    remedies whose flags the script has.

    Args:
        remedies: texts such as "--finetune FILE starts from its weights", in the order of preference.
    """
    for remedy in remedies:
        error.add_note(remedy)
    return error


def remedy(settings: Mapping[str, Any]) -> str:
    """Returns a remedy that sets flags, such as `give --in_chans 1 --cls_token`; None as `omit --NAME`."""
    omitted = " ".join(f"--{name}" for name, value in settings.items() if value is None)
    words = " ".join(arguments(settings))
    return " and ".join([f"give {words}"] * bool(words) + [f"omit {omitted}"] * bool(omitted))


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Returns settings as the arguments of a command; those that are None are left out."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else OFF.get(name, f"--no_{name}"))
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words
