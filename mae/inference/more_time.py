"""Whether more time may help: what a run gained since half of its updates, and what longer runs of other images gained.

benchmarks/forecast.py writes longer_runs.json: k-NN after 1, 2, 4 and 10 times the updates, by kind of images, and the
numbers of a forecast if it was better than naive ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from mae.inference import page
from mae.position_tables import to_pair
from mae.settings import ImageSpec
from mae.training import measured_runs
from mae.training.gate import KNN

FILE = "longer_runs.json"
MEASURES = {  # titles, and the factor that makes them percent
    KNN: ("k-NN", 1),
    "test_explained": ("the explained variance of held-out images", 100),
    "train_explained": ("the explained variance of training images", 100),
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


def last_doubling(entries: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Returns two entries with a measure, the newest in the first half of the epochs and the last one; else []."""
    found = [entry for entry in entries if entry.get(name) is not None]
    first_half = [entry for entry in found if 2 * (entry["epoch"] + 1) <= found[-1]["epoch"] + 1]
    return [first_half[-1], found[-1]] if first_half else []


def gain(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns the gain of a measure in the last doubling of the updates, in words; "" if the log is too short."""
    title, factor = MEASURES[name]
    pair = last_doubling(entries, name)
    if not pair:
        return ""
    first, last = pair
    change = factor * (last[name] - first[name])
    epochs = f"from epoch {first['epoch']} to epoch {last['epoch']}"
    return f"{title} changed by {change:+.1f} points, to {factor * last[name]:.1f} % ({epochs})"


def gains(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on the gains of a run in the last doubling of its updates; "" if the log is too short."""
    variances = [text for name in ("test_explained", "train_explained") if (text := gain(entries, name))]
    parts = [text for text in (gain(entries, KNN), *variances[:1]) if text]
    return f"In the last doubling of its updates, {', and '.join(parts)}." if parts else ""


def section(entries: Sequence[Mapping[str, Any]], epochs: int, images: ImageSpec, count: int) -> str:
    """Returns whether more time may help, as HTML.

    Args:
        entries: those of log.txt.
        epochs: of the complete run.
        images: the input of the model.
        count: number of images.
    """
    processed = sum(entry["images_per_s"] * entry["seconds"] for entry in entries)  # rounded in the log
    sentences = [f"The run has processed about {measured_runs.share_text(_rounded(processed), count)}."]
    if entries[-1]["epoch"] + 1 < epochs:
        done = entries[-1]["epoch"] + 1
        sentences.append(f"It has ended {done} of {epochs} epochs: its learning rate has not fallen to zero.")
    sentences.append(gains(entries))
    found = study()
    near = measured_runs.near(found["kinds"], images.in_chans, min(to_pair(images.input_size)), count)
    if entries[-1]["epoch"] + 1 == epochs and found["forecast"]:
        sentences.append(forecast(entries, found["forecast"]))
    if not near:
        sentences.append("No longer runs were measured with images near to these (benchmarks/forecast.md has others).")
        return page.paragraph(" ".join(filter(None, sentences)))
    texts = [[f"{row['images']:,} {row['kind']}, {row['side']} pixels", *reached(row)] for row in near]
    titles = ["k-NN of images", *(f"{factor} × the updates" for factor in near[0]["knn"])]
    return page.paragraph(" ".join(filter(None, sentences))) + page.table(titles, texts) + page.paragraph(NOTE)


def forecast(entries: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> str:
    """Returns a sentence with intervals of k-NN after longer runs; "" if the log is too short.

    A longer run gains in proportion to the gain in the last doubling, and to the logarithm of the number of updates.
    """
    pair = last_doubling(entries, KNN)
    if not pair:
        return ""
    first, last = pair
    texts = []
    for factor in law["factors"]:
        value = last[KNN] + law["number"] * math.log2(factor) * (last[KNN] - first[KNN])
        low, high = (min(100.0, max(0.0, value + sign * law["half_width"])) for sign in (-1, 1))
        texts.append(f"{low:.0f} to {high:.0f} % with {factor} times the updates")
    return (
        f"k-NN is forecast, with {law['level']:.0%} intervals: {', '.join(texts)}. Of {law['pairs']} such forecasts "
        f"about other images, {law['covered']} were right (benchmarks/forecast.md)."
    )


def reached(row: Mapping[str, Any]) -> list[str]:
    """Returns k-NN of the seeds of a row and the number of images that each run has processed, in words."""
    return [
        f"{' and '.join(f'{knn:.1f}' for knn in seeds)} % after {_rounded(int(factor) * row['processed']):,.0f} images"
        for factor, seeds in row["knn"].items()
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")
