"""Messages with flags. Code below the scripts names settings as Python does: `name=value`, or a name in backticks."""

import argparse
import ast
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mae.settings.arguments import arguments

# A name, and a value: a text in quotes, a list, a tuple, or a word without the punctuation that follows it.
# The name of a folder, such as runs/lr=0.1/checkpoint-0.pth, is no setting.
SETTING = re.compile(r"""(?<![\w/.=-])(\w+)=('[^']*'|"[^"]*"|\[[^\]]*\]|\([^)]*\)|[^\s,;:()'"]*[^\s,;:()'".])""")
NAME = re.compile(r"`(\w+)`")
CALL = re.compile(r"\w+\((?:[^()]|\([^()]*\))*\)")  # Python code, such as get_model("base", input_size=(32, 32))
FILES = {"FILE", "PATH", "DIR", "FOLDER", "YAML", "IMAGE"}  # metavars of flags that take a path
OURS = ("mae", "main_", "engine_", "models_")  # names of loggers


def with_flags(text: str, parser: argparse.ArgumentParser) -> str:
    """Returns a message in which the settings that a command has are its flags, such as `--mask_ratio 0.99`.

    Other names and values stay as they are.
    """
    flags = {action.dest for action in parser._actions if action.option_strings}
    of_paths = {action.dest for action in parser._actions if set(str(action.metavar).split("|")) & FILES}
    positional = {action.dest: str(action.metavar) for action in parser._actions if not action.option_strings}

    def setting(match: re.Match[str]) -> str:
        name, value = match.groups()
        if "/" in value and not value.startswith(("'", '"')) and name not in of_paths:
            return match[0]
        if name in positional:
            return f"{positional[name]} {value}"
        return " ".join(arguments({name: _value(value)})) if name in flags else match[0]

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{name}" if name in flags else positional.get(name, match[0])

    result, end = "", 0
    for call in CALL.finditer(text):
        result += NAME.sub(flag, SETTING.sub(setting, text[end : call.start()])) + call[0]
        end = call.end()
    return result + NAME.sub(flag, SETTING.sub(setting, text[end:]))


def _value(text: str) -> Any:
    """Returns the value of a text in Python's notation. Numbers stay as they are written."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(value, int | float) and not isinstance(value, bool) else value


@contextmanager
def flags_in_log(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Makes the log of this library name settings as flags, as `with_flags` does."""
    create: Callable[..., logging.LogRecord] = logging.getLogRecordFactory()

    def record(name: str, *arguments: Any, **options: Any) -> logging.LogRecord:
        found = create(name, *arguments, **options)
        if name.startswith(OURS):
            found.msg, found.args = with_flags(found.getMessage(), parser), None
        return found

    logging.setLogRecordFactory(record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(create)
