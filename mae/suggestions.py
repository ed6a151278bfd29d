"""Suggestions of similar names, for messages about unknown ones."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns the end of a message about an unknown name: the most similar known name, or "".

    Args:
        cutoff: minimum similarity, as in `difflib.get_close_matches`.
    """
    same = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name.lower(), same, n=1, cutoff=cutoff)
    return f"; did you mean {same[matches[0]]}?" if matches else ""
