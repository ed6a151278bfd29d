"""Whether more time may help: what a run gained since half of its updates, and what longer runs of others gained.

benchmarks/forecast.py writes longer_runs.json: k-NN after 1, 2, 4 and 10 times the updates, by kind of images, and the
numbers of a forecast if it was better than naive ones.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from mae.inference import page
from mae.position_tables import to_pair
from mae.settings import ImageSpec
from mae.training import measured_runs
from mae.training.gate import KNN

FILE = "longer_runs.json"
COVERED = 0.7  # least share of the forecasts of the study that were right, of all images and of near ones
MEASURES = {  # what a sentence says has changed, and the factor that makes it percent
    KNN: ("k-NN has changed", 1),
    "test_explained": ("the explained variance of held-out images has changed", 100),
    "train_explained": ("the explained variance of training images has changed", 100),
}
NOTE = (
    "A longer run is another run, because its learning rate falls to zero later. The runs of the table had other "
    "images. Two accuracies are those of two seeds (benchmarks/forecast.md)."
)


def study() -> dict[str, Any]:
    """Returns `kinds`, the measured runs of each kind of images, and `forecast`; None: it is not shown."""
    text = resources.files("mae.inference").joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def second_half(entries: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Returns two entries with a measure, the newest in the first half of the epochs and the last one; else []."""
    found = [entry for entry in entries if entry.get(name) is not None and math.isfinite(entry[name])]
    first_half = [entry for entry in found if 2 * (entry["epoch"] + 1) <= found[-1]["epoch"] + 1]
    return [first_half[-1], found[-1]] if first_half else []


def gains(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on the gains of a run since about half of its updates; "" if the log is too short."""
    texts: dict[str, list[str]] = {}
    for names in ((KNN,), ("test_explained", "train_explained")):
        name = next((name for name in names if second_half(entries, name)), "")
        if name:
            title, factor = MEASURES[name]
            first, last = second_half(entries, name)
            change = factor * (last[name] - first[name])
            epochs = f"from epoch {first['epoch']} to epoch {last['epoch']}"
            texts.setdefault(epochs, []).append(f"{title} by {change:+.1f} points to {factor * last[name]:.1f} %")
    return " ".join(f"F{epochs[1:]}, {' and '.join(found)}." for epochs, found in texts.items())


def section(entries: Sequence[Mapping[str, Any]], epochs: int, images: ImageSpec, count: int) -> str:
    """Returns whether more time may help, as HTML.

    Args:
        entries: those of log.txt.
        epochs: of the complete run.
        images: the input of the model.
        count: number of images.
    """
    done = entries[-1]["epoch"] + 1
    # The rate of an epoch that was resumed is that of its rest.
    processed = done * statistics.median(entry["images_per_s"] * entry["seconds"] for entry in entries)
    sentences = [f"The run has processed about {measured_runs.share_text(_rounded(processed), count)}."]
    if done < epochs:
        sentences.append(f"It has ended {done} of {epochs} epochs: its learning rate has not fallen to zero.")
    sentences.append(gains(entries))
    found = study()
    near = measured_runs.near(found["kinds"], images.in_chans, min(to_pair(images.input_size)), count)
    if not near:
        sentences.append("No longer runs were measured with images near to these (benchmarks/forecast.md has others).")
        return page.paragraph(" ".join(filter(None, sentences)))
    right, pairs = np.sum([row["covered"] for row in near], axis=0)
    if done == epochs and found["forecast"] and right >= COVERED * pairs:
        sentences.append(forecast(entries, found["forecast"], near))
    texts = [[f"{row['images']:,} {row['kind']}, {row['side']} pixels", *reached(row)] for row in near]
    titles = ["k-NN of images", *(f"{factor} × the updates" for factor in near[0]["knn"])]
    return page.paragraph(" ".join(filter(None, sentences))) + page.table(titles, texts) + page.paragraph(NOTE)


def interval_of(
    entries: Sequence[Mapping[str, Any]], law: Mapping[str, Any], factor: float
) -> tuple[float, float] | None:
    """Returns the bounds of k-NN in percent after `factor` times the updates; None if the log is too short.

    A longer run gains in proportion to the gain in the last doubling of the updates, and to the logarithm of their
    number.
    """
    pair = second_half(entries, KNN)
    if not pair:
        return None
    first, last = pair
    slope = (last[KNN] - first[KNN]) / math.log2((last["epoch"] + 1) / (first["epoch"] + 1))
    value = last[KNN] + law["number"] * math.log2(factor) * slope
    low, high = (min(100.0, max(0.0, value + sign * law["half_width"])) for sign in (-1, 1))
    return low, high


def forecast(entries: Sequence[Mapping[str, Any]], law: Mapping[str, Any], near: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence with intervals of k-NN after longer runs; "" if the log is too short.

    Args:
        near: rows of near images, with the number of forecasts that were right.
    """
    texts = []
    for factor in law["factors"]:
        bounds = interval_of(entries, law, factor)
        if bounds is None:
            return ""
        low, high = bounds
        texts.append(f"{low:.0f} to {high:.0f} % with {factor} times the updates")
    right = ", and ".join(f"{row['covered'][0]} of {row['covered'][1]} with {row['kind']}" for row in near)
    return (
        f"k-NN is forecast, with {law['level']:.0%} intervals: {', '.join(texts)}. Of forecasts that knew nothing of "
        f"these images, {right} were right (benchmarks/forecast.md)."
    )


def reached(row: Mapping[str, Any]) -> list[str]:
    """Returns k-NN of the seeds of a row and the number of images that each run has processed, in words."""
    return [
        f"{' and '.join(f'{knn:.1f}' for knn in seeds)} % after {_rounded(int(factor) * row['processed']):,.0f} images"
        for factor, seeds in row["knn"].items()
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")
