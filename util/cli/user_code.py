"""The user's code, named by a flag as `package.module:name`. Files and recipes can't make a program import it."""

import importlib
import os
import sys
from typing import Any

from util.cli.advice import did_you_mean


def import_object(flag: str, text: str) -> Any:
    """Imports an object from a module on Python's path or in the working directory.

    Args:
        flag: the flag and its prefix, for the error.
        text: `package.module:name`.

    Raises:
        ValueError: there is no such module, a module that it imports is missing, or it has no such name.
    """
    module, _, name = text.partition(":")
    if not (name and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])):
        raise ValueError(f"{flag}{text}: give package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_it = module == error.name or module.startswith(f"{error.name}.")
        where = f"there is no module {error.name} on Python's path or in {os.getcwd()}"
        reason = where if is_it else f"{module} needs the module {error.name}, which is not installed"
        raise ValueError(f"{flag}{text}: {reason}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{flag}{text}: {module} has no {part}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found
