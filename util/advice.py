"""What error messages advise: the nearest name, and remedies, which `cli.run` prints where the script takes them."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

Error = TypeVar("Error", bound=Exception)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, if one is near."""
    same = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), same, n=1)
    return f"; did you mean {same[near[0]]}?" if near else ""


def advised(error: Error, *remedies: str) -> Error:
    """The error with remedies as its notes.

    The code that raises an error does not know which script runs. `cli.run` does: it adds to the message the remedies
    whose flags and values the script's parser accepts.

    Args:
        remedies: in the order of their use, such as "--finetune FILE starts from its weights".
    """
    for remedy in remedies:
        error.add_note(remedy)
    return error
