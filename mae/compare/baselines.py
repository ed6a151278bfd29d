"""Baselines without an encoder: logistic regression and an RBF-SVM of scikit-learn on raw pixels."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from mae.compare import grids

STRENGTHS = {"logistic regression": [0.01, 0.1, 1.0], "RBF-SVM": [1.0, 10.0, 100.0]}  # C
MOST = 10_000  # images on which C is chosen
ITERATIONS = 300  # of logistic regression, at most


def evaluate(
    name: str, train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int
) -> tuple[float, str]:
    """Fits a baseline.

    A fifth of the training images (at most MOST are used for this) is held out to choose C, as `grids.choose` does.
    With fewer than five images of a class among them, the middle value is used.

    Args:
        name: a key of STRENGTHS.

    Returns:
        The test accuracy in percent, and the chosen C, with a note if the fit has not converged.

    Raises:
        ValueError: the training images have one class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
    from sklearn.svm import SVC
    from threadpoolctl import threadpool_limits

    model: Any = SVC(gamma="scale") if name == "RBF-SVM" else LogisticRegression(max_iter=ITERATIONS)
    strength = STRENGTHS[name][1]
    some = np.random.default_rng(seed).permutation(len(labels))[:MOST]
    # The products are small. Waiting for other threads takes longer, above all if other processes use the cores.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so
        counts = np.bincount(labels[some], minlength=labels.max() + 1)
        if counts[np.unique(labels)].min() >= 5:
            split = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed)

            def scores_of(_: str, values: Sequence[float]) -> dict[float, float]:
                search = GridSearchCV(model, {"C": [*values]}, cv=split, refit=False).fit(train[some], labels[some])
                return dict(zip(values, search.cv_results_["mean_test_score"].tolist(), strict=True))

            _, strength = grids.choose([name], STRENGTHS[name], scores_of)
        model.set_params(C=strength)
        accuracy = 100 * model.fit(train, labels).score(test, test_labels)
    is_stopped = isinstance(model, LogisticRegression) and model.n_iter_.max() == ITERATIONS
    return accuracy, f"C {strength:g}" + (f", stopped after {ITERATIONS} iterations" if is_stopped else "")
