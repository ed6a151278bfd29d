"""Choices by name. The module that has a choice has its registry: names, help and functions.

A value with ":" is the user's code, any other is a key of a registry. Parsers read the registries (`mae.cli.options`).
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from mae.suggestions import did_you_mean

Entry = TypeVar("Entry")


class Choice(NamedTuple):
    """An entry of a registry. Other entries have a help, too."""

    help: str  # after the name of the choice. "": the name says it
    function: Callable[..., Any]
    is_default: bool = False  # None stands for it. The order of a registry has no meaning


def find(setting: str, registry: Mapping[str, Entry], name: str) -> Entry:
    """Returns an entry of a registry. `setting` is the name of the setting.

    Raises:
        ValueError: the registry has no such name.
    """
    if name not in registry:
        raise ValueError(f"{setting}={name}: give one of {', '.join(registry)}{did_you_mean(name, registry)}")
    return registry[name]


def default_name(registry: Mapping[str, Any]) -> str:
    """Returns the name of the default, "" without one."""
    return next((name for name, choice in registry.items() if choice.is_default), "")


def described(registry: Mapping[str, Any]) -> str:
    """Returns the names of a registry with their help."""
    return "; ".join(f"{name}: {entry.help}" if entry.help else name for name, entry in registry.items())


def lazily(module: str, name: str) -> Callable[..., Any]:
    """Returns a function of this library, whose module is imported when it is called."""

    def function(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return function
