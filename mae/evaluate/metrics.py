"""Metrics of predictions (--metric), in the units of scikit-learn and SciPy, which compute them.

Classification and multilabel metrics are fractions. A metric is a function and an entry of METRICS, to which `register`
adds those of the user's code.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from mae.registry import find
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION, TASK_CHOICES
from mae.user_code import call, import_object


class Predictions(NamedTuple):
    """What a metric is computed from. With several targets, a metric is the mean over the targets."""

    truth: np.ndarray  # the classes (n,), 0 or 1 for each class (n, classes), or the targets (n, targets)
    predictions: np.ndarray  # the classes (n,), probabilities (n, classes), or the targets (n, targets)
    scores: np.ndarray | None  # of each class (n, classes)
    classes: int  # number of classes or targets
    grades: np.ndarray | None  # numbers of the classes (classes,)


class Metric(NamedTuple):
    """An entry of METRICS."""

    help: str
    function: Callable[[Predictions], float]
    tasks: tuple[str, ...]
    lower_is_better: bool = False
    needs_scores: bool = False  # the score of every class
    without_class: str = ""  # what the mean over the classes is if a class has no images
    needs_absence: bool = False  # it is undefined for a class that all images have, too
    has_order: bool = False  # it weights errors by the order of the classes
    of_constant: str = ""  # what it is if a target is the same for all images


def register(name: str) -> None:
    """Adds a metric of the user's code to METRICS.

    Args:
        name: `module:name` of a `Metric`, or of a function of `Predictions`: then higher values are better.

    Raises:
        ValueError: it can't be imported.
    """
    found = import_object("metric=", name)
    metric = found if isinstance(found, Metric) else Metric("", found, TASK_CHOICES, needs_scores=True)
    METRICS[name] = metric._replace(function=partial(call, f"metric={name}", metric.function))


def compute(
    name: str, truth: np.ndarray, predictions: np.ndarray, scores: np.ndarray | None, classes: int,
    grades: np.ndarray | None = None,
) -> float:  # fmt: skip
    """Returns a metric. It takes memory for the images, the classes and the scores, not for pairs of classes.

    A metric that is undefined is NaN.

    Args:
        name: a key of METRICS.
        truth, predictions, classes: as in `Predictions`.
        scores: of each class (n, classes); None: no metric that needs them is computed.
        grades: numbers of the classes (classes,), whose differences weight the errors of `kappa`. Default: 0, 1, ...
            With gaps, it is the kappa of scikit-learn with all numbers as its `labels`.

    Raises:
        ValueError: METRICS has no such name.
    """
    metric = find("metric", METRICS, name)
    if not np.isfinite(predictions if scores is None else scores).all():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without images; `tasks.task_of` names them
        return float(metric.function(Predictions(truth, predictions, scores, classes, grades)))


def _accuracy(given: Predictions) -> float:
    from sklearn import metrics  # takes a second

    return metrics.accuracy_score(given.truth, given.predictions)


def _balanced_accuracy(given: Predictions) -> float:
    """Classes without an image do not enter."""
    counts = counts_of(given.truth, given.classes)
    right = np.bincount(given.truth[given.truth == given.predictions], minlength=given.classes)
    return (right[counts > 0] / counts[counts > 0]).mean()


def _average_precision(given: Predictions) -> float:
    from sklearn import metrics

    return _mean_over_classes("average_precision", metrics.average_precision_score, given)


def _auroc(given: Predictions) -> float:
    from sklearn import metrics

    return _mean_over_classes("auroc", metrics.roc_auc_score, given)


def _mean_over_classes(name: str, score: Callable[..., float], given: Predictions) -> float:
    """Returns the mean score of the classes for which it is defined, each against the others."""
    assert given.scores is not None
    used = np.flatnonzero(is_defined(name, counts_of(given.truth, given.classes), len(given.truth)))
    columns = (given.truth[:, number] if given.truth.ndim == 2 else given.truth == number for number in used)
    values = [score(column, given.scores[:, number]) for column, number in zip(columns, used, strict=True)]
    return float(np.mean(values)) if values else float("nan")


def _macro_f1(given: Predictions) -> float:
    """A class without an image has an F1 of 0; a class (n,) that is not predicted either does not enter."""
    from sklearn import metrics

    if given.truth.ndim == 2:  # scikit-learn's "macro" of a single class includes the F1 of its absence
        pairs = zip(given.truth.T, given.predictions.T >= 0.5, strict=True)
        return float(np.mean([metrics.f1_score(truth, predicted, zero_division=0) for truth, predicted in pairs]))
    return metrics.f1_score(given.truth, given.predictions, average="macro", zero_division=0)


def _kappa(given: Predictions) -> float:
    if given.grades is None:
        return _quadratic_kappa(given.truth, given.predictions)
    return _quadratic_kappa(given.grades[given.truth], given.grades[given.predictions])


def _r2(given: Predictions) -> float:
    """A target that is the same for all images has an r2 of 0, or of 1 if all predictions are exact."""
    from sklearn import metrics

    # scikit-learn subtracts the mean of the labels. That of equal labels is rounded, unless they are 0.
    is_constant = np.ptp(given.truth, axis=0) == 0
    offset = np.where(is_constant, given.truth[0], 0)
    return metrics.r2_score(given.truth - offset, given.predictions - offset)


def _mae(given: Predictions) -> float:
    from sklearn import metrics

    return metrics.mean_absolute_error(given.truth, given.predictions)


def _spearman(given: Predictions) -> float:
    from scipy import stats

    pairs = zip(given.truth.T, given.predictions.T, strict=True)
    return float(np.mean([stats.spearmanr(truth, predicted).statistic for truth, predicted in pairs]))


def _quadratic_kappa(truth: np.ndarray, predictions: np.ndarray) -> float:
    """Returns Cohen's kappa with quadratic weights of two raters (n,).

    It is 1 - observed / expected, the mean squared differences of the pairs and of all combinations. The latter is a
    sum of variances, and the matrix of scikit-learn has all pairs of classes.
    """
    truth = truth.astype(np.float64)
    predictions = predictions.astype(np.float64)
    expected = truth.var() + predictions.var() + (truth.mean() - predictions.mean()) ** 2
    return float(1 - ((truth - predictions) ** 2).mean() / expected) if expected else float("nan")


def counts_of(truth: np.ndarray, classes: int) -> np.ndarray:
    """Returns the number of images of each class (classes,), of classes (n,) or 0 and 1 for each class (n, classes)."""
    return truth.sum(axis=0) if truth.ndim == 2 else np.bincount(truth, minlength=classes)


def is_defined(name: str, counts: np.ndarray, total: int) -> np.ndarray:
    """Whether a metric is defined for each class (classes,): some images have it and, for `auroc`, others do not."""
    return (counts > 0) & (counts < total) if METRICS[name].needs_absence else counts > 0


def names_of(task: str) -> list[str]:
    """Lists the metrics of a task."""
    return [name for name, metric in METRICS.items() if task in metric.tasks]


def lower_is_better(name: str) -> bool:
    """Whether lower values of a score are better."""
    return name in METRICS and METRICS[name].lower_is_better


ONE_AGAINST_OTHERS = "mean over the classes, one against the others"
OTHER_CLASSES = "is the mean over the other classes"
METRICS = {
    "accuracy": Metric("", _accuracy, (CLASSIFICATION,)),
    "balanced_accuracy": Metric("", _balanced_accuracy, (CLASSIFICATION,), without_class=OTHER_CLASSES),
    "average_precision": Metric(ONE_AGAINST_OTHERS, _average_precision, (CLASSIFICATION, MULTILABEL),
        needs_scores=True, without_class=OTHER_CLASSES),
    "auroc": Metric(ONE_AGAINST_OTHERS, _auroc, (CLASSIFICATION, MULTILABEL),
        needs_scores=True, without_class=OTHER_CLASSES, needs_absence=True),
    "macro_f1": Metric("", _macro_f1, (CLASSIFICATION, MULTILABEL),
        without_class="counts these classes as 0 if they are predicted, and with task=multilabel always"),
    "kappa": Metric("quadratic weights, of numbers their squared differences also across gaps (FINETUNE.md)", _kappa,
        (CLASSIFICATION,), has_order=True),
    "r2": Metric("", _r2, (REGRESSION,), of_constant="0"),
    "mae": Metric("in the units of the labels", _mae, (REGRESSION,), lower_is_better=True),
    "spearman": Metric("", _spearman, (REGRESSION,), of_constant="undefined"),
}  # fmt: skip
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    CLASSIFICATION: (),  # the top-1 accuracy
    MULTILABEL: ("average_precision",),
    REGRESSION: ("r2", "mae"),
}
