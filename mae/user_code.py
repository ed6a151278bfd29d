"""The user's code, named by a flag as `package.module:name`. Files and recipes can't make a program import it."""

import importlib
import operator
import os
import re
import sys
from collections.abc import Callable
from typing import Any

# Shards that a recipe may name: files and http(s) URLs. WebDataset runs programs for other schemes.
SHARDS_OF_RECIPES = re.compile(r"wds:([^:]*|https?://[^:\s'\"$`;|&<>()\\]*(:\d+/[^:\s'\"$`;|&<>()\\]*)?)")
# Of these settings, a value without ":" is a key of the registry (`mae.registry`).
NAMED = ("encoder", "optimizer", "lr_schedule", "metric")
DATASET = "py:"  # before the name of a function, as a value of --dataset


def import_object(flag: str, text: str) -> Any:
    """Imports an object from a module on Python's path or in the working directory.

    Args:
        flag: the flag and its prefix, for the error.
        text: `package.module:name`.

    Raises:
        ValueError: there is no such module, a module that it imports is missing, or it has no such name.
        RuntimeError: as in `call`.
    """
    module, _, name = text.partition(":")
    if not name:
        raise ValueError(f"{flag}{text}: give package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = call(f"{flag}{text}", importlib.import_module, module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag}{text}: {error}") from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError as error:
        raise ValueError(f"{flag}{text}: {error}") from error


def name_of(kind: Any) -> str:
    """Returns the name of a class or function, or of the function of a `partial`, as `import_object` takes it."""
    kind = getattr(kind, "func", kind)
    return f"{kind.__module__}:{kind.__qualname__}"


def plain_encoder(encoder: type) -> type:
    """Returns a mix-in, or with adapters its first base class without them.

    Raises:
        ValueError: this class lacks a step of the mix-in.
    """
    plain = next(kind for kind in encoder.__mro__ if not getattr(kind, "adapters", ()))
    others = [kind for kind in encoder.__mro__ if not issubclass(plain, kind)]
    lost = sorted(
        f"{kind.__name__}.{name}"
        for kind in others
        for name, value in vars(kind).items()
        if (callable(value) or isinstance(value, property)) and not name.startswith("__") and hasattr(plain, name)
    )
    if lost:
        raise ValueError(
            f"{plain.__name__}, the base class of {encoder.__name__} without adapters, lacks {', '.join(lost)}: move "
            f"them to a base class of it"
        )
    return plain


def named_object(setting: str, name: str | None) -> Any:
    """Returns the class or function that a setting of the command names, if any. What a file names is not imported.

    Raises:
        ValueError: it can't be imported.
    """
    if not name or (setting in NAMED and ":" not in name):
        return None
    return import_object(f"{setting}=", name)


def dataset_of(function: Callable[..., Any], dataset: str | None = None) -> str:
    """Returns the name of a function as a value of --dataset.

    Args:
        dataset: the setting.

    Raises:
        ValueError: it names a different dataset.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    name = f"{DATASET}{named.__module__}:{named.__qualname__}"
    if dataset not in (None, name):
        raise ValueError(f"dataset={dataset} and source= ({name}) exclude each other; give one of them")
    return name


def call(origin: str, function: Callable[..., Any], *arguments: Any, expected: type[Exception] = OSError) -> Any:
    """Calls a function of the user's code. Its mistakes keep their traceback, below what the function belongs to.

    A StopIteration would end an epoch silently.

    Args:
        origin: what the function belongs to, for the error.
        expected: a further error that is no mistake.

    Raises:
        OSError: a file can't be read.
        RuntimeError: the function raised one of these exceptions.
    """
    try:
        return function(*arguments)
    except (OSError, expected):
        raise
    except (ValueError, ArithmeticError, StopIteration) as error:
        raise RuntimeError(f"{origin}: the code raised {type(error).__name__}: {error}") from error


def runs_code(dataset: str) -> bool:
    """Whether a value of --dataset runs code: a function, or shards that a program reads (not http and https)."""
    return dataset.startswith(DATASET) or (dataset.startswith("wds:") and not SHARDS_OF_RECIPES.fullmatch(dataset))
