"""Sizes of images, grids and patches: one number for squares, or a pair."""

from collections.abc import Sequence

Size = int | tuple[int, int]


def to_pair(size: Size | list[int]) -> tuple[int, int]:
    """Returns (rows, columns) of a size, which is one number for squares, or a pair."""
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return rows, columns


def side_or_sides(size: Sequence[int]) -> int | list[int]:
    """Returns the side of a square, or [rows, columns] of another size."""
    rows, columns = size
    return rows if rows == columns else [rows, columns]
