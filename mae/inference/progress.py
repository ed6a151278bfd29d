"""What the log of a pre-training says, in sentences: what the model explains, and what the last updates gained."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mae.training import measured_runs
from mae.training.explained import OF_TARGET
from mae.training.gate import KNN

MEASURES = {  # what a sentence says has changed, and the factor that makes it percent
    KNN: ("k-NN has changed", 1),
    "test_explained": ("the explained variance of held-out images has changed", 100),
    "train_explained": ("the explained variance of training images has changed", 100),
}

Entries = Sequence[Mapping[str, Any]]  # of log.txt


def explained(entries: Entries) -> str:
    """Returns a sentence on what the model has learned without labels; "" if the log does not have it."""
    for name, losses, images in (
        ("test_explained", ["test_loss"], "held-out"),
        ("train_explained", OF_TARGET, "training"),
    ):
        found = [entry for entry in entries if entry.get(name) is not None]
        if found and (share := found[-1][name]) < 1:
            loss = next(found[-1][loss] for loss in losses if loss in found[-1])
            return (
                f"The model explains {share:.1%} of the variance of {images} images: the loss of its predictions is "
                f"{loss:.3f}, and that of their mean {loss / (1 - share):.3f}."
            )
    return ""


def sentences(entries: Entries, epochs: int, count: int) -> str:
    """Returns how many images a run has processed, and what it gained since half of its updates.

    Args:
        epochs: of the complete run.
        count: number of images.
    """
    done = entries[-1]["epoch"] + 1
    # The rate of an epoch that was resumed is that of its rest.
    processed = done * statistics.median(entry["images_per_s"] * entry["seconds"] for entry in entries)
    texts = [f"The run has processed about {measured_runs.share_text(float(f'{processed:.2g}'), count)}."]
    if done < epochs:
        texts.append(f"It has ended {done} of {epochs} epochs: its learning rate has not fallen to zero.")
    return " ".join([*texts, gains(entries)]).strip()


def gains(entries: Entries) -> str:
    """Returns a sentence on the gains of a run since about half of its updates; "" if the log is too short."""
    texts: dict[str, list[str]] = {}
    for names in ((KNN,), ("test_explained", "train_explained")):
        name = next((name for name in names if second_half(entries, name)), "")
        if name:
            title, factor = MEASURES[name]
            first, last = second_half(entries, name)
            change = factor * (last[name] - first[name])
            in_epochs = f"from epoch {first['epoch']} to epoch {last['epoch']}"
            texts.setdefault(in_epochs, []).append(f"{title} by {change:+.1f} points to {factor * last[name]:.1f} %")
    return " ".join(f"F{in_epochs[1:]}, {' and '.join(found)}." for in_epochs, found in texts.items())


def second_half(entries: Entries, name: str) -> list[Mapping[str, Any]]:
    """Returns two entries with a measure, the newest in the first half of the epochs and the last one; else []."""
    found = [entry for entry in entries if entry.get(name) is not None and math.isfinite(entry[name])]
    first_half = [entry for entry in found if 2 * (entry["epoch"] + 1) <= found[-1]["epoch"] + 1]
    return [first_half[-1], found[-1]] if first_half else []
