"""Results: lines of JSON in a file that grows, and a JSON file that is complete after each result."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae.files import atomic

logger = logging.getLogger(__name__)


def to_line(scores: Mapping[str, Any]) -> str:
    """Returns a JSON object in one line. Numbers that are not finite, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in scores.items()
    }
    return json.dumps(finite)


def add_line(path: Path, line: str) -> None:
    """Adds a line to a file. After a line that a crash has cut off, it begins a new one.

    Raises:
        OSError: the file can't be written.
    """
    with atomic.writing(path), path.open("ab+") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        begin = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{begin}{line}\n".encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects in the lines of a file. A warning names each line that a crash has cut off.

    Raises:
        OSError: the file can't be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            logger.warning(f"{path}, line {number} is incomplete or damaged, and is skipped")
    return found


class Results:
    """The results in a file, which need not exist.

    Args:
        path: the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Returns the results by name, each a dictionary.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        try:
            results = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: dict(result) for name, result in dict(results).items()}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} can't be read ({error}); remove it") from error

    def add(self, results: Mapping[str, Any]) -> None:
        """Adds results by name, or replaces them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self.path, json.dumps({**self.read(), **results}, indent=1, sort_keys=True) + "\n")
