"""Tables in Markdown, and figures. Files are written completely or not at all."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mae.files import atomic


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table.

    Args:
        titles: titles of the columns.
        rows: texts of the cells. A text may contain several cells, separated by ` | `.
    """
    header = "|" + "|".join(f" {title} " if title else " " for title in titles) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|---" * len(titles) + "|", *lines])


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches, with 100 pixels per inch."""
    from matplotlib.figure import Figure  # takes half a second

    return Figure((width, height), dpi=100, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Writes a figure in the format of the file's suffix. Dollar signs in names do not begin a formula."""
    _disable_formulas(figure)
    with atomic.replacing(path) as written:
        figure.savefig(written)


def to_svg(figure: Any) -> bytes:
    """Returns a figure as the content of an SVG file; formulas are as in `save`."""
    _disable_formulas(figure)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _disable_formulas(figure: Any) -> None:
    from matplotlib.text import Text

    ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for text in (*figure.findobj(Text), *ticks):
        if r"\math" not in text.get_text():  # numbers of a logarithmic axis are formulas of matplotlib
            text.set_parse_math(False)
