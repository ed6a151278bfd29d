"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table.

    Args:
        titles: titles of the columns.
        rows: texts of the cells. A text may contain several cells, separated by ` | `.
    """
    header = "|" + "|".join(f" {title} " if title else " " for title in titles) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|---" * len(titles) + "|", *lines])
