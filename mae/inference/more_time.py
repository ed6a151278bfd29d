"""Whether more time may help: what a run gained since half of its updates, and what longer runs of others gained.

benchmarks/longer_runs.py writes longer_runs.json: k-NN after runs of several lengths, by kind of images.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from mae.inference import page
from mae.settings import ImageSpec
from mae.sizes import to_pair
from mae.training import measured_runs
from mae.training.gate import KNN

FILE = "longer_runs.json"
MEASURES = {  # what a sentence says has changed, and the factor that makes it percent
    KNN: ("k-NN has changed", 1),
    "test_explained": ("the explained variance of held-out images has changed", 100),
    "train_explained": ("the explained variance of training images has changed", 100),
}
NOTE = (
    "A longer run is another run, because its learning rate falls to zero later. The runs of the table had other "
    "images: their gains say little of those of others (benchmarks/answers.md). Two accuracies are those of two seeds."
)


def longer_runs() -> list[dict[str, Any]]:
    """Returns the measured runs of each kind of images."""
    text = resources.files("mae.inference").joinpath(FILE).read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
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
    near = measured_runs.near(longer_runs(), images.in_chans, min(to_pair(images.input_size)), count)
    if not near:
        sentences.append("No longer runs were measured with images near to these (benchmarks/forecast.md has others).")
        return page.paragraph(" ".join(filter(None, sentences)))
    texts = [[f"{row['images']:,} {row['kind']}, {row['side']} pixels", reached(row)] for row in near]
    titles = ["images", "k-NN of runs of several lengths"]
    return page.paragraph(" ".join(filter(None, sentences))) + page.table(titles, texts) + page.paragraph(NOTE)


def reached(row: Mapping[str, Any]) -> str:
    """Returns k-NN of the seeds of a row after the images that each run has processed, in words."""
    texts = [
        f"{' and '.join(f'{knn:.1f}' for knn in seeds)} % after {_rounded(processed):,.0f} images"
        for processed, seeds in row["knn"]
    ]
    return "; ".join(texts)


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")
