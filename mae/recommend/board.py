"""Measured pre-trainings that are near to a dataset and a time: what a recipe may reach.

benchmarks/leaderboard.py writes board.json: the best entry of each kind of images and each time, with its score and
that of raw pixels (benchmarks/LEADERBOARD.md, "Rules").
"""

import json
import math
from importlib import resources

SHOWN = 2


def nearest(images: int, side: int, minutes: float) -> list[str]:
    """Returns the rows that are nearest in the number of images, their side in pixels and the time, as text."""
    wanted = {"images": images, "side": side, "minutes": minutes}
    rows = json.loads(resources.files("mae.recommend").joinpath("board.json").read_text(encoding="utf-8"))
    rows.sort(key=lambda row: sum(abs(math.log(row[name] / value)) for name, value in wanted.items()))
    return [
        f"{row['images']:,} {row['kind']}, {row['side']} pixels, {row['minutes']:g} minutes on two cores: score "
        f"{row['score']:.1f}, raw pixels {row['pixels']:.1f} (benchmarks/LEADERBOARD.md)"
        for row in rows[:SHOWN]
    ]
