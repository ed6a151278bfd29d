"""The choice of hyperparameters by cross-validation with the labels of a draw alone: one rule for all classifiers."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mae.compare.classifiers import Classifier, Values

logger = logging.getLogger(__name__)

MOST = 2_000  # labels with which a grid is searched
FOLDS = 5
ENOUGH = 1_000  # labels; with fewer, the folds are drawn REPEATS times
REPEATS = 3
MOST_EXTENSIONS = 8  # of a grid, each by about a factor of 3


class Choice(NamedTuple):
    """What was chosen for a classifier."""

    option: str  # a key of `options`
    values: Values
    correct: np.ndarray  # share of the predictions for each searched image that are correct (n,); none if not searched

    @property
    def accuracy(self) -> float:
        """By cross-validation; NaN if nothing was searched."""
        return float(self.correct.mean()) if len(self.correct) else float("nan")


def choose(classifier: Classifier, options: Mapping[str, np.ndarray], labels: np.ndarray, seed: int) -> Choice:
    """Chooses features and hyperparameters of a classifier.

    The first option with the default values stands, unless others are better by more than the standard error of the
    paired difference. A grid that ends at its best is extended. If an image is the only one of its class and the
    classifier needs folds, the default is returned.

    Args:
        options: features (n, D) of the labelled images, by name: for example, two poolings.
        labels: their classes (n,).
        seed: of the folds, and of the MOST images with which the grid is searched.
    """
    rows = stratified(labels, MOST, seed)
    labels = labels[rows]
    default = (next(iter(options)), classifier.default)
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    if classifier.leave_one_out is None and smallest == 1:
        return Choice(*default, np.empty(0))
    searched = {name: features[rows] for name, features in options.items()}
    found: dict[tuple[str, Values], np.ndarray] = {}
    axes = [list(values) for values in classifier.grid]
    for _ in range(MOST_EXTENSIONS + 1):
        new = [values for values in itertools.product(*axes) if (default[0], values) not in found]
        for name, features in searched.items():
            correct = _correct(classifier, features, labels, new, min(FOLDS, smallest), seed)
            found |= dict(zip(((name, values) for values in new), correct, strict=True))
        best = max(found, key=lambda key: (found[key].mean(), key == default, _inner(axes, key[1])))
        if not _extend(axes, best[1]):
            break
    gain = found[best] - found[default]
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    chosen = best if gain.mean() > error else default
    return Choice(*chosen, found[chosen])


def stratified(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Returns sorted rows of at most `most` random images, with the shares of the classes of all images."""
    order = np.random.default_rng(seed).permutation(len(labels))
    quantile = np.empty(len(labels))  # of an image among those of its class, from 0 to 1
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.argsort(quantile, kind="stable")[:most])


def _correct(
    classifier: Classifier, features: np.ndarray, labels: np.ndarray, values: Sequence[Values], folds: int, seed: int
) -> np.ndarray:
    """Returns the share of the predictions for each image that are correct, by others: (len(values), n)."""
    from sklearn.model_selection import RepeatedStratifiedKFold

    if classifier.leave_one_out:
        return (classifier.leave_one_out(features, labels, values) == labels).astype(float)
    repeats = REPEATS if len(labels) < ENOUGH else 1
    correct = np.zeros((len(values), len(labels)))
    for train, held_out in RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed).split(
        features, labels
    ):
        classes = classifier.predict(features[train], labels[train], features[held_out], values)
        correct[:, held_out] += (classes == labels[held_out]) / repeats
    return correct


def _inner(axes: Sequence[Sequence[float]], values: Values) -> int:
    """Returns the number of values that are at no end of their axis."""
    return sum(axis[0] < value < axis[-1] for axis, value in zip(axes, values, strict=True))


def _extend(axes: Sequence[list[float]], best: Values) -> bool:
    """Adds the next value beyond each end that is the best; returns whether there is one."""
    lengths = [len(axis) for axis in axes]
    for axis, value in zip(axes, best, strict=True):
        if value == axis[-1]:
            axis.append(float(f"{value * 3.4:.1g}"))  # 1, 3, 10, 30
        elif value == axis[0]:
            axis.insert(0, float(f"{value / 3:.1g}"))
    return lengths != [len(axis) for axis in axes]
