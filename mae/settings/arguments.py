"""Settings as text: in a message, as the arguments of a command, and what has changed."""

from collections.abc import Mapping
from typing import Any

from mae.settings.values import as_yaml

# Settings that a flag other than --no_NAME disables.
OFF = {"global_pool": "--cls_token", "channels_last": "--channels_first"}


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Returns settings as the arguments of a command; those that are None are left out."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else OFF.get(name, f"--no_{name}"))
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Lists the settings of `after` that differ from `before`, for a message; "" if there are none."""
    different = [key for key in after if before.get(key) != after[key]]
    return "; ".join(f"{key} was {as_yaml(before.get(key))} and is {as_yaml(after[key])}" for key in different)


def in_words(settings: Mapping[str, Any]) -> str:
    """Returns settings as messages name them: `name=value`, separated by spaces, with the values of a recipe."""
    return " ".join(f"{name}={as_yaml(value)}" for name, value in settings.items())


def advice(settings: Mapping[str, Any]) -> str:
    """Returns the advice to give settings, such as "give in_chans=1 and omit `mean`". None: the setting is omitted."""
    given = {name: value for name, value in settings.items() if value is not None}
    omitted = " ".join(f"`{name}`" for name, value in settings.items() if value is None)
    parts = []
    if given:
        parts.append(f"give {in_words(given)}")
    if omitted:
        parts.append(f"omit {omitted}")
    return " and ".join(parts)
