"""What the files of strangers may not do: a name that writes to the terminal, a file without an end, a recipe that runs
commands or fills the memory."""

import errno
import os
import re
import stat
from pathlib import Path

import yaml

MAX_BYTES = 1 << 30  # of an image's file, and of an archive's member when unpacked
MAX_RECIPE_BYTES = 20_000
MAX_RECIPE_DEPTH = 10
SHARDS_OF_RECIPES = re.compile(r"[^:]*|https?://[^:]*(:\d+/[^:]*)?")  # files and web addresses, no other scheme


def printable(text: str) -> str:
    """A text of a stranger's (a file's name, an error that quotes a file) for messages, on one line.

    Escape sequences, which could rewrite the terminal, line breaks, marks of the writing direction and bytes that are
    no UTF-8 become backslash escapes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_file(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: no such file; a pipe, a socket or a device, of which a read may never end; or too large.
    """
    # Without O_NONBLOCK, to open a pipe waits for its writer.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read()


def recipe_problem(text: str) -> str | None:
    """Why a recipe is not read, before its values are made.

    Aliases can name the same list many times over in a few lines, and so can merges; a recipe is flat and needs none.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MAX_RECIPE_BYTES:
        return f"has {len(text):,} characters, and a recipe has at most {MAX_RECIPE_BYTES:,}"
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            return f"has an alias (*{printable(token.value)}): write the value where it belongs"
        kind = type(token).__name__
        depth += kind.endswith("StartToken") and kind.startswith(("Block", "Flow"))
        depth -= kind.endswith("EndToken") and kind.startswith(("Block", "Flow"))
        if depth > MAX_RECIPE_DEPTH:
            return "is nested: a recipe is a list of `flag: value` lines"
    return None


def value_problem(key: str, value: str) -> str | None:
    """Why an entry of a recipe is not taken: what can run a command stands on the command line, where users see it."""
    if not value.isprintable():
        return f"{key} holds a control character: {printable(value)}"
    kind, _, shards = value.partition(":")
    if key == "dataset" and kind == "wds" and not SHARDS_OF_RECIPES.fullmatch(shards):
        return f"dataset {value} may run a command: a recipe names files or https:// addresses; give --dataset yourself"
    if key == "slurm":
        return f"slurm {value} may run a command: give --slurm on the command line"
    return None
