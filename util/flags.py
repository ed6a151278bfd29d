"""The kinds of value that flags take, and what argparse says of a wrong one."""

import argparse
from collections.abc import Callable
from typing import Any


def _kind(convert: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def kind(text: str) -> Any:
        value = convert(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    kind.__name__ = convert.__name__  # argparse says so where the text is no number
    return kind


positive_int = _kind(int, lambda value: value >= 1, "at least 1")
count = _kind(int, lambda value: value >= 0, "at least 0")
non_negative = _kind(float, lambda value: value >= 0, "at least 0")
positive = _kind(float, lambda value: value > 0, "above 0")
share = _kind(float, lambda value: 0 <= value <= 1, "in [0, 1]")
positive_share = _kind(float, lambda value: 0 < value <= 1, "in (0, 1]")
ratio = _kind(float, lambda value: 0 <= value < 1, "in [0, 1)")
jpeg_quality = _kind(int, lambda value: 1 <= value <= 100, "in 1 to 100")
seed = _kind(int, lambda value: 0 <= value < 2**32, "in [0, 2^32), which all random generators take")


class Size(argparse.Action):
    """One number for a square, two for height and width; one stays a plain number."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two (height, width), got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else list(values))


def add_switch(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    """--NAME and --no_NAME, so that a flag can undo what a recipe or a default says."""
    on, off = (" (the default)", "") if default else ("", " (the default)")
    group.add_argument(f"--{name}", action="store_true", default=default, help=text + on)
    group.add_argument(f"--no_{name}", action="store_false", dest=name, default=default, help=f"not so{off}")
