"""Measured pre-trainings that are near to a dataset and a time: what a recipe may reach.

benchmarks/leaderboard.py writes board.json: for each kind of images and each time, the score of the settings that a
recipe has, or of the best entry if they were not run, and that of raw pixels (benchmarks/LEADERBOARD.md, "Rules").
"""

import json
import math
from importlib import resources
from typing import Any

from mae.plurals import counted
from mae.recommend.facts import Images
from mae.training import measured_runs

SHOWN = 2
SCORE = "mean of the accuracies with 500 labels and of k-NN"


def rows() -> list[dict[str, Any]]:
    """Returns the measured runs."""
    text = resources.files("mae.recommend").joinpath("board.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def nearest(images: Images, minutes: float) -> list[str]:
    """Returns the rows of images of these channels, about this size and number, the nearest time first, as text.

    If there is none, one line says so.
    """
    near = measured_runs.near(rows(), images.in_chans, images.shorter, images.count)
    wanted = {"images": images.count, "side": images.shorter, "minutes": minutes}
    near.sort(key=lambda row: sum(math.log(measured_runs.ratio(row[name], value)) for name, value in wanted.items()))
    if not near:
        return [
            f"no run with {counted(images.in_chans, 'channel')}, about {images.shorter} pixels and about "
            f"{counted(images.count, 'image')} (benchmarks/LEADERBOARD.md has others)"
        ]
    return [
        f"{row['images']:,} {row['kind']}, {row['side']} pixels, {row['minutes']:g} minutes on two cores: "
        f"{row['score']:.1f} %, raw pixels {row['pixels']:.1f} % "
        f"({SCORE}, by {row['entry']}, benchmarks/LEADERBOARD.md)"
        for row in near[:SHOWN]
    ]


def beyond(images: Images) -> str:
    """Returns the end of a line that says how far measured runs go, if images are larger or more; else ""."""
    side = max(row["side"] for row in rows())
    count = max(row["images"] for row in rows())
    if images.shorter <= side and images.count <= count:
        return ""
    return f"; nothing was measured above {side} x {side} pixels and {count:,} images"
