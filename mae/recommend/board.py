"""Measured pre-trainings that are near to a dataset and a time: what a recipe may reach.

benchmarks/leaderboard.py writes board.csv: the best entry of each kind of images and each time.
"""

import csv
import math
from importlib import resources
from typing import NamedTuple

COLUMNS = ("images", "kind", "side", "minutes", "entry", "score", "pixels")
SHOWN = 2


class Row(NamedTuple):
    """The best entry of a board.

    Args:
        images: number of them.
        side: of an image, in pixels.
        minutes: time of the pre-training on two CPU cores.
        score: mean of two accuracies in percent: fine-tuned with 500 labels, and of 20 nearest neighbors with all.
        pixels: score of raw pixels.
    """

    images: int
    kind: str
    side: int
    minutes: float
    entry: str
    score: float
    pixels: float


def read() -> list[Row]:
    """Returns the rows of board.csv."""
    text = resources.files("mae.recommend").joinpath("board.csv").read_text(encoding="utf-8")
    return [
        Row(int(line["images"]), line["kind"], int(line["side"]), float(line["minutes"]), line["entry"],
            float(line["score"]), float(line["pixels"]))
        for line in csv.DictReader(text.splitlines())
    ]  # fmt: skip


def nearest(images: int, side: int, minutes: float) -> list[str]:
    """Returns the rows that are nearest in the number of images, their side and the minutes, as lines of text."""

    def distance(row: Row) -> float:
        pairs = (row.images, images), (row.side, side), (row.minutes, minutes)
        return sum(abs(math.log(measured / wanted)) for measured, wanted in pairs)

    return [
        f"{row.images:,} {row.kind}, {row.side} pixels, {row.minutes:g} minutes on two cores: score {row.score:.1f}, "
        f"raw pixels {row.pixels:.1f} (benchmarks/LEADERBOARD.md)"
        for row in sorted(read(), key=distance)[:SHOWN]
    ]
