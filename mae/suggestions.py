"""Suggestions of similar names, for messages about unknown ones."""

import difflib
from collections.abc import Iterable

# A typo in a name of four letters has .75. Names of flags share endings: foo_ratio has .63 of mask_ratio.
SIMILAR = 0.75


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the most similar known name, or "".

    A name may also be the first or the last words of a known one, such as warmup of warmup_epochs. The dashes of a flag
    do not count.
    """
    same = {known.lower().lstrip("-"): known for known in names}
    given = name.lower().lstrip("-")
    parts = [known for known in same if given and (known.startswith(f"{given}_") or known.endswith(f"_{given}"))]
    matches = difflib.get_close_matches(given, same, n=1, cutoff=SIMILAR) or sorted(parts, key=len)
    return f"; did you mean {same[matches[0]]}?" if matches else ""
