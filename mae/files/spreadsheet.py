"""CSV files whose texts are no formulas in a spreadsheet.

A spreadsheet computes a cell that begins with one of FORMULA. The names of classes and files may come from other
people. A text that begins like that has an apostrophe in front, which the reader removes. Numbers stay numbers.
"""

import csv
import io
import re
from collections.abc import Iterable
from numbers import Number
from pathlib import Path
from typing import Any

from mae.files import atomic

FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # apostrophes in front: the reader removes one
# Numbers as CSV files have them. float() also takes 1_5 for 15, and digits of other scripts.
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def write(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes the rows of a CSV file, completely or not at all."""
    with atomic.replacing(path) as written, written.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_escaped(value) for value in row] for row in rows)


def read(text: str) -> list[list[str]]:
    """Returns the rows of a CSV file as `write` got them.

    Of a cell that begins with an apostrophe and one of FORMULA, the apostrophe is removed. Other apostrophes stay.

    Raises:
        csv.Error: a cell is too long.
    """
    return [[_unescaped(text) for text in row] for row in csv.reader(io.StringIO(text, newline=""))]


def _escaped(value: Any) -> str:
    text = str(value)
    is_formula = FORMULA.match(text) and not (isinstance(value, Number) or DECIMAL.fullmatch(text))
    return f"'{text}" if is_formula else text


def _unescaped(text: str) -> str:
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
