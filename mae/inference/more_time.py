"""Whether more time may help: what a run gained since half of its updates, and what longer runs of other images gained.

benchmarks/forecast.py writes longer_runs.json: k-NN after 1, 2, 4 and 10 times the updates, by kind of images.
"""

import json
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


def rows() -> list[dict[str, Any]]:
    """Returns the measured runs, a row for each kind of images."""
    text = resources.files("mae.inference").joinpath(FILE).read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def gain(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns the gain of a measure in the last doubling of the updates, in words; "" if the log is too short.

    It is from the newest measurement in the first half of the epochs to the last one.
    """
    title, factor = MEASURES[name]
    found = [entry for entry in entries if entry.get(name) is not None]
    first_half = [entry for entry in found if 2 * (entry["epoch"] + 1) <= found[-1]["epoch"] + 1]
    if not first_half:
        return ""
    first = first_half[-1]
    last = found[-1]
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
    near = measured_runs.near(rows(), images.in_chans, min(to_pair(images.input_size)), count)
    if not near:
        sentences.append("No longer runs were measured with images near to these (benchmarks/forecast.md has others).")
        return page.paragraph(" ".join(filter(None, sentences)))
    texts = [[f"{row['images']:,} {row['kind']}, {row['side']} pixels", *reached(row)] for row in near]
    titles = ["k-NN of images", *(f"{factor} × the updates" for factor in near[0]["knn"])]
    return page.paragraph(" ".join(filter(None, sentences))) + page.table(titles, texts) + page.paragraph(NOTE)


def reached(row: Mapping[str, Any]) -> list[str]:
    """Returns k-NN of the seeds of a row and the number of images that each run has processed, in words."""
    return [
        f"{' and '.join(f'{knn:.1f}' for knn in seeds)} % after {_rounded(int(factor) * row['processed']):,.0f} images"
        for factor, seeds in row["knn"].items()
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")
