"""The choice of hyperparameters by cross-validation with the labels of a draw alone: one rule for all predictors."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mae.compare.predictors import Predictor, Values, judged
from mae.settings.choices import CLASSIFICATION

logger = logging.getLogger(__name__)

MOST = 2_000  # labels with which a grid is searched
FOLDS = 5
ENOUGH = 1_000  # labels; with fewer, the folds are drawn REPEATS times
REPEATS = 3
MOST_EXTENSIONS = 8  # of a grid, each by about a factor of 3


class Choice(NamedTuple):
    """What was chosen for a predictor."""

    option: str  # a key of `options`
    values: Values
    scores: np.ndarray  # `judged` by cross-validation, of each searched image (n,)
    note: str = ""  # why nothing was searched

    @property
    def score(self) -> float:
        """The mean by cross-validation."""
        return float(self.scores.mean())


def choose(
    predictor: Predictor, options: Mapping[str, np.ndarray], targets: np.ndarray, seed: int,
    task: str = CLASSIFICATION, metric: str = "",
) -> Choice:  # fmt: skip
    """Chooses features and hyperparameters of a predictor.

    The first option with the default values stands, unless others of the grid are better by more than the standard
    error of the paired difference. A grid that ends at its best is extended; a value beyond it has to be better than
    the choice from the grid by as much. If a class has one image and the predictor needs folds, the default is chosen.

    Args:
        options: features (n, D) of the labelled images, by name: for example, two poolings.
        targets: their classes (n,), labels or numbers (n, C).
        seed: of the folds, and of the MOST images with which the grid is searched.
        task, metric: as in `judged`.
    """
    rows = stratified(targets, MOST, seed)
    targets = targets[rows]
    default = (next(iter(options)), predictor.default)
    folds = min(FOLDS, _smallest(targets))
    searched = {name: features[rows] for name, features in options.items()}
    if predictor.leave_one_out is None and folds < 2:
        (scores,) = _scores(predictor, searched[default[0]], targets, [default[1]], folds, seed, task, metric)
        return Choice(*default, scores, "the default, because a class has one image")
    found: dict[tuple[str, Values], np.ndarray] = {}
    axes = [list(values) for values in predictor.grid]
    for _ in range(MOST_EXTENSIONS + 1):
        new = [values for values in itertools.product(*axes) if (default[0], values) not in found]
        for name, features in searched.items():
            scores = _scores(predictor, features, targets, new, folds, seed, task, metric)
            found |= dict(zip(((name, values) for values in new), scores, strict=True))
        best = max(found, key=lambda key: (found[key].mean(), key == default, inner(axes, key[1])))
        if not extend(axes, best[1]):
            break
    of_grid = {key: scores for key, scores in found.items() if key[1] in itertools.product(*predictor.grid)}
    chosen = default
    for candidates in (of_grid, found):
        best = max(candidates, key=lambda key: candidates[key].mean())
        gain = found[best] - found[chosen]
        if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
            chosen = best
    return Choice(*chosen, found[chosen])


def stratified(targets: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Returns sorted rows of at most `most` random images, with the shares of the classes of all images."""
    order = np.random.default_rng(seed).permutation(len(targets))
    if targets.ndim == 2:  # no class, or several
        return np.sort(order[:most])
    quantile = np.empty(len(targets))  # of an image among those of its class, from 0 to 1
    for label in np.unique(targets):
        rows = order[targets[order] == label]
        quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.argsort(quantile, kind="stable")[:most])


def _smallest(targets: np.ndarray) -> int:
    """Returns the number of images of the rarest class; of all images, if they have no single class."""
    return len(targets) if targets.ndim == 2 else int(np.unique(targets, return_counts=True)[1].min())


def _scores(
    predictor: Predictor, features: np.ndarray, targets: np.ndarray, values: Sequence[Values], folds: int, seed: int,
    task: str, metric: str,
) -> np.ndarray:  # fmt: skip
    """Returns the scores of the predictions for each image by others: (len(values), n)."""
    from sklearn.model_selection import RepeatedKFold, RepeatedStratifiedKFold

    if predictor.leave_one_out:
        return judged(predictor.leave_one_out(features, targets, values), targets, task, metric)
    repeats = REPEATS if len(targets) < ENOUGH else 1
    kind = RepeatedStratifiedKFold if targets.ndim == 1 and folds > 1 else RepeatedKFold
    count = folds if folds > 1 else min(FOLDS, len(targets))
    scores = np.zeros((len(values), len(targets)))
    for train, held_out in kind(n_splits=count, n_repeats=repeats, random_state=seed).split(features, targets):
        outputs = predictor.predict(features[train], targets[train], features[held_out], values)
        scores[:, held_out] += judged(outputs, targets[held_out], task, metric) / repeats
    return scores


def inner(axes: Sequence[Sequence[float]], values: Values) -> int:
    """Returns the number of values that are at no end of their axis."""
    return sum(axis[0] < value < axis[-1] for axis, value in zip(axes, values, strict=True))


def extend(axes: Sequence[list[float]], best: Values) -> bool:
    """Adds the next value beyond each end that is the best; returns whether there is one."""
    lengths = [len(axis) for axis in axes]
    for axis, value in zip(axes, best, strict=True):
        if value == axis[-1]:
            axis.append(float(f"{value * 3.4:.1g}"))  # 1, 3, 10, 30
        elif value == axis[0]:
            axis.insert(0, float(f"{value / 3:.1g}"))
    return lengths != [len(axis) for axis in axes]
