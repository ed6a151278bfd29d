"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these titles of columns. A cell may contain several columns, separated by ` | `."""
    header = "|" + "|".join(f" {title} " if title else " " for title in titles) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|---" * len(titles) + "|", *lines])
