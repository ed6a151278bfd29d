"""Types of settings: functions that return the value of a text. A ValueError says what is wrong."""

import os
from collections.abc import Callable
from typing import Any


class InvalidValue(ValueError):
    """A text that is no value of a setting."""


def checked(convert: Callable[[str], Any], holds: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Returns a type whose values fulfil a condition.

    Args:
        requirement: the condition in words, such as "at least 1".
    """

    def kind(text: str) -> Any:
        value = convert(text)
        if not holds(value):
            raise InvalidValue(f"must be {requirement}, got {text}")
        return value

    kind.__name__ = convert.__name__  # argparse names it in the error for a text that is not a number
    return kind


positive_int = checked(int, lambda value: value >= 1, "at least 1")
count = checked(int, lambda value: value >= 0, "at least 0")
non_negative = checked(float, lambda value: value >= 0, "at least 0")
positive = checked(float, lambda value: value > 0, "above 0")
share = checked(float, lambda value: 0 <= value <= 1, "in [0, 1]")
positive_share = checked(float, lambda value: 0 < value <= 1, "in (0, 1]")
ratio = checked(float, lambda value: 0 <= value < 1, "in [0, 1)")
job_id = checked(str, str.isdecimal, "a job id, which is a number")
seed = checked(int, lambda value: 0 <= value < 2**32, "in [0, 2^32), which all random generators take")


def path(text: str) -> str:
    """The type of a path: `~` is the home folder, also in a recipe, where no shell replaces it."""
    return os.path.expanduser(text)


def count_or_all(text: str) -> int | str:
    """The type of a number of blocks: at least 0, or "all"."""
    return text if text == "all" else count(text)


def nodata(text: str) -> float | str:
    """The type of a pixel value: a number; NaN remains the text "nan", which equals itself."""
    try:
        value = float(text)
    except ValueError:
        raise InvalidValue(f"must be a number or nan, got {text}") from None
    return "nan" if value != value else value
