"""What only a command line knows of flags: types of output files, actions, and what a recipe must not set."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """Returns the type of an output file: a path in an existing folder, with one of the suffixes, if any are given."""

    def path(text: str) -> Path:
        file = Path(text)
        if suffixes and file.suffix.lower() not in suffixes:
            others = ["another suffix of images"] if len(suffixes) > 4 else []
            endings = " or ".join([*suffixes[:4], *others])
            raise argparse.ArgumentTypeError(f"{text}: its name must end in {endings}")
        if file.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder: give a file name")
        if not file.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: there is no folder {file.parent}; create it first")
        return file

    return path


class Size(argparse.Action):
    """Stores one number (a square) as a number, and two numbers (height, width) as a list."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(nargs="+", **arguments)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one or two numbers (height, width), got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else list(values))


class Range(argparse.Action):
    """Stores two numbers, of which the first is below the second."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(nargs=2, **arguments)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not values[0] < values[1]:
            raise argparse.ArgumentError(self, f"MIN must be below MAX, got {values[0]:g} {values[1]:g}")
        setattr(namespace, self.dest, values)


def not_in_recipes(flag: argparse.Action, values: Callable[[str], bool] = lambda value: True) -> argparse.Action:
    """Declares that a recipe must not set a flag, because its value may run code or connect to other machines.

    Recipes may come from others. A flag that names code, a command or an address has this declaration where it is
    added.

    Args:
        values: whether a recipe must not set this value. Default: no value is accepted.
    """
    flag.refused_in_recipes = values  # type: ignore[attr-defined]
    return flag


def is_refused_in_recipes(flag: argparse.Action, value: Any) -> bool:
    """Whether `not_in_recipes` declares that a recipe must not set this value. None and False set nothing."""
    values = value if isinstance(value, list) else [value]
    refused = getattr(flag, "refused_in_recipes", None)
    return refused is not None and any(refused(str(one)) for one in values if one is not None and one is not False)
