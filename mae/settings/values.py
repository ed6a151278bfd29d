"""The value of a setting as text: as a recipe, a message, and an argument of a class of the user's code have it."""

import re
from typing import Any

from mae.settings.types import positive_int

# What needs no quotes in a recipe. It is a word, and ends as one: a message may go on with a colon or a comma.
PLAIN = re.compile(r"(?=[^\s,;\[\]{}()'\"#]+$)[-+.]?[\w./~][^\s]*(?<![:.])")
NULL = re.compile("(null|Null|NULL|~|)$")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
PROCESSES = "processes"  # an entry of a recipe that is no setting: `mae start` starts so many
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def read_recipe(text: str) -> dict[Any, Any]:
    """Returns the entries of a recipe. Values are texts, which the type of a flag reads, except null and `processes`.

    Raises:
        ValueError: as `yaml_loader.load`, or the text has no entries, or `processes` is no number of processes.
    """
    from mae.settings.yaml_loader import load  # a command without a recipe needs no yaml

    recipe = load(text, lambda value: None if NULL.match(value) else value)
    if not isinstance(recipe, dict):
        raise ValueError("it must be a list of `flag: value` lines")
    if (processes := recipe.get(PROCESSES)) is not None:
        try:
            recipe[PROCESSES] = positive_int(str(processes))
        except ValueError:
            raise ValueError(f"processes={as_yaml(processes)} must be a whole number of at least 1") from None
    return recipe


def read_value(text: str) -> Any:
    """Returns the value of an argument without a type: a number, true, false, null, a list, a mapping, or a text.

    Raises:
        ValueError: as `yaml_loader.load`.
    """
    from mae.settings.yaml_loader import load

    return load(text, _value_of)


def _value_of(text: str) -> Any:
    if NULL.match(text) or text == "None":
        return None
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else BOOLEANS.get(text, text)


def as_yaml(value: Any) -> str:
    """Returns the value of a setting as a recipe has it, such as `true`, `0.99` or `[100, 1000]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    is_plain = isinstance(value, int | float) or (PLAIN.fullmatch(text) and not NULL.match(text))
    return text if is_plain else "'" + text.replace("'", "''") + "'"
