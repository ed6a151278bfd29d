"""Accuracies of raw pixels, by the rules of the leaderboard: what an encoder has to be better than."""

import statistics
from collections.abc import Sequence
from typing import cast

from mae.compare import baselines
from mae.data.labels import some_of_each_class
from mae.data.open import open_source
from mae.data.source import Source
from mae.evaluate import knn
from mae.settings import DataSpec, ImageSpec


def accuracies(data: DataSpec, images: ImageSpec, labels: int, seeds: Sequence[int], k: int) -> tuple[float, float]:
    """Returns two accuracies in percent: fitted with few labels, and of neighbors with all labels.

    Args:
        labels: number of them. The better of logistic regression and an RBF-SVM counts.
        seeds: of the draws of labels, whose mean counts.
        k: number of neighbors.
    """
    train, val = (cast(Source, open_source(data, split)) for split in ("train", "val"))
    bank, queries = (baselines.read(source, images, 0) for source in (train, val))
    fitted: dict[str, list[float]] = {name: [] for name in baselines.STRENGTHS}
    for seed in seeds:
        few = some_of_each_class(train, labels // len(train.classes), seed)
        pixels = baselines.read(few, images, 0)
        for name, found in fitted.items():
            found.append(baselines.evaluate(name, pixels, few.labels, queries, val.labels, seed)[0])
    return max(map(statistics.fmean, fitted.values())), 100 * knn.accuracy(bank, train.labels, queries, val.labels, k)
