"""Metrics of predictions (--metric), in the units of scikit-learn and SciPy, which compute them.

Classification and multilabel metrics are fractions. `mae` has the units of the targets.
"""

import warnings

import numpy as np

NEED_SCORES = ("auroc", "average_precision")  # they need the score of every class
OF_CLASSES = (*NEED_SCORES, "balanced_accuracy", "macro_f1")  # means over the classes
LOWER_IS_BETTER = ("mae",)


def compute(
    name: str, truth: np.ndarray, predictions: np.ndarray, scores: np.ndarray | None, classes: int,
    grades: np.ndarray | None = None,
) -> float:  # fmt: skip
    """Returns a metric. It takes memory for the images, the classes and the scores, not for pairs of classes.

    Classes without an image do not enter `balanced_accuracy`, `auroc` and `average_precision`, which are means over the
    classes. In `macro_f1`, they have an F1 of 0; a class (n,) that is not predicted either does not enter. With several
    targets, a metric is the mean over the targets. A metric that is undefined is NaN.

    Args:
        truth: the classes (n,), 0 or 1 for each class (n, classes), or the targets (n, targets).
        predictions: the classes (n,), probabilities (n, classes), or the targets (n, targets).
        scores: of each class (n, classes); None: no metric of NEED_SCORES is computed.
        classes: number of classes or targets.
        grades: numbers of the classes (classes,), whose differences weight the errors of `kappa`. Default: 0, 1, ...
            With gaps, it is the kappa of scikit-learn with all numbers as its `labels`.
    """
    from scipy import stats
    from sklearn import metrics  # takes a second

    if not np.isfinite(predictions if scores is None else scores).all():
        return float("nan")
    counts = counts_of(truth, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without images; `tasks.task_of` names them
        if name in NEED_SCORES:
            assert scores is not None
            score = metrics.roc_auc_score if name == "auroc" else metrics.average_precision_score
            used = np.flatnonzero(is_defined(name, counts, len(truth)))
            columns = (truth[:, number] if truth.ndim == 2 else truth == number for number in used)
            values = [score(own, scores[:, number]) for own, number in zip(columns, used, strict=True)]
            return float(np.mean(values)) if values else float("nan")
        if name == "spearman":
            pairs = zip(truth.T, predictions.T, strict=True)
            return float(np.mean([stats.spearmanr(ours, theirs).statistic for ours, theirs in pairs]))
        if name == "kappa":
            return _quadratic_kappa(*(own if grades is None else grades[own] for own in (truth, predictions)))
        if name == "balanced_accuracy":
            right = np.bincount(truth[truth == predictions], minlength=classes)
            return float((right[counts > 0] / counts[counts > 0]).mean())
        if name == "macro_f1":
            if truth.ndim == 2:  # scikit-learn's "macro" of a single class includes the F1 of its absence
                pairs = zip(truth.T, predictions.T >= 0.5, strict=True)
                return float(np.mean([metrics.f1_score(ours, theirs, zero_division=0) for ours, theirs in pairs]))
            return float(metrics.f1_score(truth, predictions, average="macro", zero_division=0))
        functions = {
            "accuracy": metrics.accuracy_score, "r2": metrics.r2_score, "mae": metrics.mean_absolute_error,
        }  # fmt: skip
        return float(functions[name](truth, predictions))


def _quadratic_kappa(truth: np.ndarray, predictions: np.ndarray) -> float:
    """Returns Cohen's kappa with quadratic weights of two raters (n,).

    It is 1 - observed / expected, the mean squared differences of the pairs and of all combinations. The latter is a
    sum of variances, and the matrix of scikit-learn has all pairs of classes.
    """
    truth, predictions = truth.astype(np.float64), predictions.astype(np.float64)
    expected = truth.var() + predictions.var() + (truth.mean() - predictions.mean()) ** 2
    return float(1 - ((truth - predictions) ** 2).mean() / expected) if expected else float("nan")


def counts_of(truth: np.ndarray, classes: int) -> np.ndarray:
    """Returns the number of images of each class (classes,), of classes (n,) or 0 and 1 for each class (n, classes)."""
    return truth.sum(axis=0) if truth.ndim == 2 else np.bincount(truth, minlength=classes)


def is_defined(name: str, counts: np.ndarray, total: int) -> np.ndarray:
    """Whether a metric is defined for each class (classes,): it has images, and for `auroc` not all of the images."""
    return (counts > 0) & (counts < total) if name == "auroc" else counts > 0
