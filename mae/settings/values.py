"""The value of a setting as text: as a recipe, a message, and an argument of a class of the user's code have it."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 20_000
# What needs no quotes in a recipe. It is a word, and ends as one: a message may go on with a colon or a comma.
PLAIN = re.compile(r"(?=[^\s,;\[\]{}()'\"#]+$)[-+.]?[\w./~][^\s]*(?<![:.])")
NULL = re.compile("(null|Null|NULL|~|)$")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class _Loader(yaml.SafeLoader):
    """The YAML of settings. A function reads the text of a value without quotes; a value in quotes is a text.

    YAML's own rules would take 010 for 8, 1:30 for 90 and no for False. With aliases, a few lines could expand to lists
    that fill the memory.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, text: str, read: Callable[[str], Any]) -> None:
        super().__init__(text)
        self.read = read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"it has an alias (*{self.peek_event().anchor}): write the value where it belongs")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            twice = [name for name, count in Counter(key.value for key, _ in node.value).items() if count > 1]
            raise ValueError(f"it has {', '.join(twice)} twice: delete one of them")
        return mapping

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        return node.value if node.style else self.read(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def _load(text: str, read: Callable[[str], Any]) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    return _Loader(text, read).get_single_data()


def read_recipe(text: str) -> Any:
    """Returns the content of a recipe. All values are texts, which the type of a flag reads, except null.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not YAML, is too long, or has an alias or a key twice.
    """
    return _load(text, lambda value: None if NULL.match(value) else value)


def read_value(text: str) -> Any:
    """Returns the value of an argument without a type: a number, true, false, null, a list, a mapping, or a text.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: as `read_recipe`.
    """
    return _load(text, _value_of)


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
