"""The value of a setting as text: as a recipe, a message, and an argument of a class of the user's code have it."""

import re
from typing import Any

import yaml

# What needs no quotes in a recipe. It is a word, and ends as one: a message may go on with a colon or a comma.
PLAIN = re.compile(r"(?=[^\s,;\[\]{}()'\"#]+$)[-+.]?[\w./~][^\s]*(?<![:.])")
NULL = re.compile("(null|Null|NULL|~|)$")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class _Texts(yaml.SafeLoader):
    """YAML whose values are texts, except null. YAML 1.1 takes 010 for 8, 1:30 for 90 and no for False."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Values(_Texts):
    """YAML with decimals, also 1e-3, and true and false."""


_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)$|[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$|[-+]?\.inf$|\.nan$"
_Texts.add_implicit_resolver("tag:yaml.org,2002:null", NULL, ["n", "N", "~", ""])
_Values.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])
_Values.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Values.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
_Values.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(f"({'|'.join(BOOLEANS)})$"), list("tTfF"))


def read_recipe(text: str) -> Any:
    """Returns the content of a recipe. All values are texts, which the type of a flag reads, except null.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not YAML.
    """
    return _Texts(text).get_single_data()


def read_value(text: str) -> Any:
    """Returns the value of an argument without a type: a number, true, false, null, a list, a mapping, or a text.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return _Values(text).get_single_data()


def as_yaml(value: Any) -> str:
    """Returns the value of a setting as a recipe has it, such as `true`, `0.99` or `[100, 1000]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    is_plain = isinstance(value, int | float) or (PLAIN.fullmatch(text) and not NULL.match(text))
    return text if is_plain else "'" + text.replace("'", "''") + "'"
