"""Counts in messages: 1 epoch, 2 epochs."""


def counted(count: int, noun: str) -> str:
    """Returns a number and a noun, in the plural unless the number is 1: `1 update`, `1,024 updates`, `2 processes`."""
    suffix = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else suffix}"
