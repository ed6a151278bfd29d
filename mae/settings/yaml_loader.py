"""The YAML of settings."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 20_000


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


def load(text: str, read: Callable[[str], Any]) -> Any:
    """Returns the content of a text.

    Args:
        read: returns the meaning of a value without quotes.

    Raises:
        ValueError: the text is not YAML, is too long or too deep, or has an alias or a key twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        return _Loader(text, read).get_single_data()
    except RecursionError as error:
        raise ValueError("its lists are nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
