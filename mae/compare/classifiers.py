"""Classifiers of features and of pixels: each predicts classes for several values of its hyperparameters at once."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mae.evaluate import knn

Values = tuple[float, ...]  # of the hyperparameters of a classifier

TEMPERATURE = 0.07  # of the votes of neighbors
ITERATIONS = 1000  # of logistic regression, at most


class Classifier(NamedTuple):
    """A classifier with a grid of hyperparameters."""

    title: str
    names: tuple[str, ...]  # of the hyperparameters
    grid: tuple[tuple[float, ...], ...]  # values of each hyperparameter, in ascending order
    default: Values
    # function(features (n, D), labels (n,), queries (m, D), values) -> classes (len(values), m)
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[Values]], np.ndarray]
    # function(features (n, D), labels (n,), values) -> classes (len(values), n), each by the other images
    leave_one_out: Callable[[np.ndarray, np.ndarray, Sequence[Values]], np.ndarray] | None = None

    def in_words(self, values: Values) -> str:
        """Returns the values with their names, such as "C 0.1"."""
        return ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True))


def _standardized(features: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    return scaler.transform(features), scaler.transform(queries)


def _logistic_regression(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> np.ndarray:
    """Fits to convergence on standardized features. Each fit starts from that of the value before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, queries = _standardized(features, queries)
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    found: dict[Values, np.ndarray] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a weak regularization, which no choice prefers
        for value in sorted(values):
            found[value] = model.set_params(C=value[0]).fit(features, labels).predict(queries)
    return np.stack([found[value] for value in values])


def _svm(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    """Fits an SVM with a Gaussian kernel on standardized features (n, D). The values are C and gamma · D."""
    from sklearn.svm import SVC

    features, queries = _standardized(features, queries)
    width = features.shape[1]
    return np.stack([SVC(C=c, gamma=gamma / width).fit(features, labels).predict(queries) for c, gamma in values])


def _neighbors(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    bank, wanted, targets = (torch.tensor(array) for array in (features, queries, labels))
    ks = sorted({min(int(k), len(bank)) for (k,) in values})
    found = knn.predict(
        bank, targets, wanted, torch.zeros(len(wanted)), lambda votes, _: (votes.argmax(dim=1),), ks=ks,
        temperatures=[TEMPERATURE], num_classes=int(targets.max()) + 1, device=torch.device("cpu"),
    )  # fmt: skip
    return np.stack([found[min(int(k), len(bank)), TEMPERATURE][0] for (k,) in values])


def _neighbors_of_others(features: np.ndarray, labels: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    unit = torch.nn.functional.normalize(torch.tensor(features).float(), dim=1)
    targets = torch.tensor(labels)
    most = min(int(max(k for (k,) in values)), len(unit) - 1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    similarity, near = cosines.topk(most, dim=1)
    weights = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()
    found = []
    for (k,) in values:
        votes = torch.zeros(len(unit), int(targets.max()) + 1)
        found.append(votes.scatter_add_(1, targets[near[:, : int(k)]], weights[:, : int(k)]).argmax(dim=1))
    return torch.stack(found).numpy()


def _neighbors_of_components(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> np.ndarray:
    """Neighbors by whitened principal components. The values are their number and k."""
    from sklearn.decomposition import PCA

    most = min(int(max(count for count, _ in values)), len(features) - 1, features.shape[1])
    pca = PCA(most, whiten=True, svd_solver="covariance_eigh" if len(features) > features.shape[1] else "full")
    bank = pca.fit_transform(features)
    wanted = pca.transform(queries)
    found: dict[Values, Any] = {}
    for count in {count for count, _ in values}:
        of_count = [value for value in values if value[0] == count]
        columns = slice(0, int(count))
        classes = _neighbors(bank[:, columns], labels, wanted[:, columns], [(k,) for _, k in of_count])
        found |= dict(zip(of_count, classes, strict=True))
    return np.stack([found[value] for value in values])


KS = (10, 20, 100)
STRENGTHS = (0.001, 0.01, 0.1, 1)
KNN = Classifier("k-NN", ("k",), (KS,), (20,), _neighbors, _neighbors_of_others)
LOGISTIC_REGRESSION = Classifier("logistic regression", ("C",), (STRENGTHS,), (0.01,), _logistic_regression)
SVM = Classifier("RBF-SVM", ("C", "gamma · D"), ((1, 10, 100), (0.3, 1, 3)), (10, 1), _svm)
COMPONENTS = Classifier(
    "k-NN on whitened principal components", ("components", "k"), ((32, 64, 128), KS), (64, 20),
    _neighbors_of_components,
)  # fmt: skip
BASELINES = (LOGISTIC_REGRESSION, SVM, COMPONENTS)  # on pixels
