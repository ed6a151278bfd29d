"""Writes mae/inference/longer_runs.json, what a page says of runs of several lengths, from two studies.

    python benchmarks/longer_runs.py

The studies are forecast.py and answers.py. k-NN is of held-out images.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import answers, forecast, leaderboard, scripts
from mae.files import atomic
from mae.inference import more_time

FILE = scripts.ROOT / "mae/inference" / more_time.FILE
GENERATED = {  # images of answers.py that forecast.py does not have
    "cells": {"images": 8_000, "kind": "generated cells", "channels": 1, "side": 32},
    "spectrograms": {"images": 8_000, "kind": "generated spectrograms", "channels": 1, "side": 48},
}


def of_forecast() -> list[dict[str, Any]]:
    """Returns the rows of the kinds of forecast.py, each with k-NN of its seeds after the processed images."""
    ends = {(row["kind"], row["seed"], row["factor"]): round(row["curve"][-1], 1) for row in forecast.read()}
    rows = []
    for kind, count in forecast.IMAGES.items():
        title, flags = leaderboard.KINDS[kind]
        batch_size = forecast.ONE_PROCESS["batch_size"]
        shortest = forecast.EPOCHS[kind] * (count // batch_size) * batch_size
        knn = [
            [factor * shortest, [ends[kind, seed, factor] for seed in forecast.SEEDS]] for factor in forecast.FACTORS
        ]
        rows.append(
            {"images": count, "kind": title, "channels": flags["in_chans"], "side": flags["input_size"], "knn": knn}
        )
    return rows


def of_answers() -> list[dict[str, Any]]:
    """Returns the rows of the other kinds of answers.py: k-NN of the log, as in the rows of forecast.py."""
    rows = sorted(answers.read(), key=lambda row: row["minutes"])
    return [
        facts | {"knn": [[row["processed"], [round(row["curve"][-1][1], 1)]] for row in rows if row["kind"] == kind]}
        for kind, facts in GENERATED.items()
    ]


def text() -> str:
    """Returns the text of the file: a line for each kind of images."""
    lines = ",\n".join(f" {json.dumps(row)}" for row in of_forecast() + of_answers())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    atomic.write_text(FILE, text())
    print(f"written: {FILE}")
