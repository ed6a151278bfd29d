"""Results by name, in a JSON file that is complete after each of them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae.files import atomic


def to_line(scores: Mapping[str, Any]) -> str:
    """Returns a JSON object in one line. Numbers that are not finite, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in scores.items()
    }
    return json.dumps(finite)


def from_line(line: str) -> dict[str, Any]:
    """Returns the scores of a line of `to_line`; null becomes NaN."""
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


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
