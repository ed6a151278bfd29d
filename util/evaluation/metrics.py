"""Metrics of predictions (--metric), in the units of scikit-learn and SciPy, which compute them.

Classification and multilabel metrics are fractions. `mae` has the units of the targets.
"""

import warnings

import numpy as np

NEED_SCORES = ("auroc", "average_precision")  # they need the score of every class
OF_CLASSES = (*NEED_SCORES, "balanced_accuracy", "macro_f1")  # means over the classes
LOWER_IS_BETTER = ("mae",)


def compute(name: str, truth: np.ndarray, predictions: np.ndarray, scores: np.ndarray | None, classes: int) -> float:
    """Returns a metric.

    Classes without an image do not enter `balanced_accuracy`, `auroc` and `average_precision`, which are means over the
    classes. In `macro_f1`, they have an F1 of 0; a class (n,) that is not predicted either does not enter. With several
    targets, a metric is the mean over the targets. A metric that is undefined is NaN.

    Args:
        truth: the classes (n,), 0 or 1 for each class (n, classes), or the targets (n, targets).
        predictions: the classes (n,), probabilities (n, classes), or the targets (n, targets).
        scores: of each class (n, classes); None: no metric of NEED_SCORES is computed.
        classes: number of classes or targets.
    """
    from scipy import stats
    from sklearn import metrics  # takes a second

    if not np.isfinite(predictions if scores is None else scores).all():
        return float("nan")
    one_hot = truth if truth.ndim == 2 else np.eye(classes, dtype=np.int64)[truth]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without images; `tasks.task_of` names them
        if name in NEED_SCORES:
            assert scores is not None
            score = metrics.roc_auc_score if name == "auroc" else metrics.average_precision_score
            used = is_defined(name, one_hot)
            values = [score(one_hot[:, number], scores[:, number]) for number in np.flatnonzero(used)]
            return float(np.mean(values)) if values else float("nan")
        if name == "spearman":
            pairs = zip(truth.T, predictions.T, strict=True)
            return float(np.mean([stats.spearmanr(ours, theirs).statistic for ours, theirs in pairs]))
        if name == "kappa":  # the weights count the classes between two classes, also those without images
            return float(metrics.cohen_kappa_score(truth, predictions, labels=np.arange(classes), weights="quadratic"))
        if name == "macro_f1":
            if truth.ndim == 2:  # scikit-learn's "macro" of a single class includes the F1 of its absence
                pairs = zip(truth.T, predictions.T >= 0.5, strict=True)
                return float(np.mean([metrics.f1_score(ours, theirs, zero_division=0) for ours, theirs in pairs]))
            return float(metrics.f1_score(truth, predictions, average="macro", zero_division=0))
        functions = {
            "accuracy": metrics.accuracy_score, "balanced_accuracy": metrics.balanced_accuracy_score,
            "r2": metrics.r2_score, "mae": metrics.mean_absolute_error,
        }  # fmt: skip
        return float(functions[name](truth, predictions))


def is_defined(name: str, one_hot: np.ndarray) -> np.ndarray:
    """Whether a metric is defined for each class (classes,): it has images, and for `auroc` not all of the images."""
    counts = one_hot.sum(axis=0)
    return (counts > 0) & (counts < len(one_hot)) if name == "auroc" else counts > 0
