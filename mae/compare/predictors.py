"""Predictors on features and on pixels: each predicts for several values of its hyperparameters at once."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mae.evaluate import knn
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION

Values = tuple[float, ...]  # of the hyperparameters of a predictor
# function(features (n, D), targets (n, ...), queries (m, D), values) -> outputs (len(values), m, C)
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[Values]], np.ndarray]

TEMPERATURE = 0.07  # of the votes of neighbors
ITERATIONS = 1000  # of logistic regression, at most
# Tolerances of logistic regression: while several values are compared, and of the fit of one value.
SEARCH_TOLERANCE = 1e-3
TOLERANCE = 1e-4
MOST_KERNEL = 10_000  # images up to which a kernel is in memory: 800 MB
PART = 2048  # queries whose kernel is in memory at a time


class Predictor(NamedTuple):
    """A predictor of targets, with a grid of hyperparameters.

    The targets are classes (n,), of several labels 0 and 1 (n, C), or numbers (n, C). The outputs are scores of the
    classes, of which the largest is predicted; scores of the labels, which are predicted where they are positive; or
    numbers.
    """

    title: str
    names: tuple[str, ...]  # of the hyperparameters
    grid: tuple[tuple[float, ...], ...]  # values of each hyperparameter, in ascending order
    default: Values
    predict: Predict
    # function(features (n, D), targets (n, ...), values) -> outputs (len(values), n, C), each by the other images
    leave_one_out: Callable[[np.ndarray, np.ndarray, Sequence[Values]], np.ndarray] | None = None

    def in_words(self, values: Values) -> str:
        """Returns the values with their names, such as "C 0.1"."""
        return ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True))


def _standardized(features: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    return scaler.transform(features), scaler.transform(queries)


def _in_their_span(features: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates of the features (n, D) in their own span, and of the queries, if D is above n: (n, n).

    A linear predictor with an L2 penalty is the same, because its weights are in this span. It takes n / D of the time.
    """
    if features.shape[1] <= len(features):
        return features, queries
    basis, _ = np.linalg.qr(features.T)
    return features @ basis, queries @ basis


def _of_classes(scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Scores (m, ...) of scikit-learn, of the sorted classes of a fit -> (m, C) of all classes up to the largest."""
    if scores.ndim == 1:  # of the second of two classes
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    found = np.full((len(scores), classes[-1] + 1), -np.inf, dtype=np.float32)
    found[:, classes] = scores
    return found


def _of_one_class(classes: np.ndarray, queries: int, values: int) -> np.ndarray:
    """Returns scores (values, queries, C) that predict the only class of a fit."""
    return np.stack([_of_classes(np.zeros((queries, 1)), classes)] * values)


def _logistic_regression(
    features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> np.ndarray:
    """Fits to convergence on standardized features; each label by itself, if there are several."""
    features, queries = _in_their_span(*_standardized(features, queries))
    if targets.ndim == 1:
        return _logistic_of_classes(features, targets, queries, values)
    shares = [_logistic_of_classes(features, column.astype(np.int64), queries, values) for column in targets.T]
    never = np.full(shares[0].shape[:2], -np.inf, dtype=np.float32)
    logits = [share[..., 1] - share[..., 0] if share.shape[2] == 2 else never for share in shares]
    return np.stack(logits, axis=2).clip(-50, 50)


def _logistic_of_classes(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> np.ndarray:
    """Returns logits of the classes. Each fit starts from that of the value before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    if len(classes) == 1:
        return _of_one_class(classes, len(queries), len(values))
    tolerance = TOLERANCE if len(values) == 1 else SEARCH_TOLERANCE
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, tol=tolerance)
    found: dict[Values, np.ndarray] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a weak regularization, which no choice prefers
        for value in sorted(values):
            fitted = model.set_params(C=value[0]).fit(features, labels)
            found[value] = _of_classes(fitted.decision_function(queries), classes)
    return np.stack([found[value] for value in values])


def _kernels(
    features: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> Iterator[tuple[float, np.ndarray, Callable[[Any], np.ndarray]]]:
    """Yields gamma · D, the Gaussian kernel of the features, and a function that applies a fit to the queries."""
    from sklearn.metrics.pairwise import euclidean_distances

    width = features.shape[1]
    distances = euclidean_distances(features, squared=True)
    for gamma in sorted({gamma for _, gamma in values}):
        rate = -gamma / width

        def applied(method: Any, rate: float = rate) -> np.ndarray:
            parts = (queries[start : start + PART] for start in range(0, len(queries), PART))
            return np.concatenate(
                [method(np.exp(rate * euclidean_distances(part, features, squared=True))) for part in parts]
            )

        yield gamma, np.exp(rate * distances), applied


def _svm_of(make: Callable[..., Any], method: str) -> Predict:
    """Returns a predictor of standardized features with a Gaussian kernel. The values are C and gamma · D."""

    def predict(
        features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]
    ) -> np.ndarray:  # fmt: skip
        features, queries = _standardized(features, queries)
        found: dict[Values, np.ndarray] = {}
        if len(features) > MOST_KERNEL:
            for c, gamma in values:
                model = make(C=c, gamma=gamma / features.shape[1], cache_size=1000).fit(features, targets)
                found[c, gamma] = getattr(model, method)(queries)
        else:
            for gamma, kernel, applied in _kernels(features, queries, values):
                for value in (value for value in values if value[1] == gamma):
                    model = make(C=value[0], kernel="precomputed").fit(kernel, targets)
                    found[value] = applied(getattr(model, method))
        return np.stack([found[value] for value in values])

    return predict


def _svm(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    from sklearn.svm import SVC

    classes = np.unique(labels)
    if len(classes) == 1:
        return _of_one_class(classes, len(queries), len(values))
    scores = _svm_of(SVC, "decision_function")(features, labels, queries, values)
    return np.stack([_of_classes(each, classes) for each in scores])


def _by_column(fit: Callable[[], Predict]) -> Predict:
    """Returns a predictor of numbers (n, C): each column is standardized, and has a fit of its own."""

    def predict(
        features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]
    ) -> np.ndarray:  # fmt: skip
        mean = targets.mean(axis=0)
        std = np.maximum(targets.std(axis=0), np.finfo(np.float32).eps)
        columns = [fit()(features, column, queries, values) for column in ((targets - mean) / std).T]
        return (np.stack(columns, axis=2) * std + mean).astype(np.float32)

    return predict


def _svr() -> Predict:
    from sklearn.svm import SVR

    return _svm_of(SVR, "predict")


def _ridge() -> Predict:
    from sklearn.linear_model import Ridge

    def predict(
        features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]
    ) -> np.ndarray:  # fmt: skip
        features, queries = _in_their_span(*_standardized(features, queries))
        return np.stack([Ridge(alpha=alpha).fit(features, targets).predict(queries) for (alpha,) in values])

    return predict


def _votes(similarity: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the weighted means of the targets (n, K, C) of the k nearest of K neighbors: (n, C)."""
    weights = ((similarity[:, :k] - similarity[:, :1]) / TEMPERATURE).exp()
    return (weights[:, None] @ targets[:, :k])[:, 0] / weights.sum(dim=1, keepdim=True)


def _as_vectors(targets: np.ndarray) -> torch.Tensor:
    """Returns classes (n,) as shares (n, C); vectors as they are."""
    vectors = torch.as_tensor(targets)
    return torch.nn.functional.one_hot(vectors).float() if vectors.ndim == 1 else vectors.float()


def _neighbors(features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    bank, wanted = (torch.nn.functional.normalize(torch.as_tensor(each).float()) for each in (features, queries))
    most = min(int(max(k for (k,) in values)), len(bank))
    vectors = _as_vectors(targets)
    parts = []
    for part in wanted.split(PART):
        similarity, near = knn.nearest(part, bank, most)
        parts.append(torch.stack([_votes(similarity, vectors[near], int(k)) for (k,) in values]))
    return torch.cat(parts, dim=1).numpy()


def _neighbors_of_others(features: np.ndarray, targets: np.ndarray, values: Sequence[Values]) -> np.ndarray:
    unit = torch.nn.functional.normalize(torch.as_tensor(features).float())
    most = min(int(max(k for (k,) in values)), len(unit) - 1)
    similarity, near = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(most, dim=1)
    vectors = _as_vectors(targets)[near]
    return torch.stack([_votes(similarity, vectors, int(k)) for (k,) in values]).numpy()


def _neighbors_of_labels(predict: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Returns a predictor of several labels: the shares of the neighbors that have a label, above one half."""
    return lambda *arguments: predict(*arguments) - 0.5


def _neighbors_of_components(
    features: np.ndarray, targets: np.ndarray, queries: np.ndarray, values: Sequence[Values]
) -> np.ndarray:
    """Neighbors by whitened principal components. The values are their number and k."""
    from sklearn.decomposition import PCA

    features, queries = _in_their_span(features, queries)
    most = min(int(max(count for count, _ in values)), len(features) - 1, features.shape[1])
    pca = PCA(most, whiten=True, svd_solver="covariance_eigh" if len(features) > features.shape[1] else "full")
    bank = pca.fit_transform(features)
    wanted = pca.transform(queries)
    found: dict[Values, np.ndarray] = {}
    for count, group in itertools.groupby(sorted(values), key=lambda value: value[0]):
        of_count = [*group]
        columns = slice(0, int(count))
        outputs = _neighbors(bank[:, columns], targets, wanted[:, columns], [(k,) for _, k in of_count])
        found |= dict(zip(of_count, outputs, strict=True))
    return np.stack([found[value] for value in values])


KS = (10, 20, 100)
KNN = Predictor("k-NN", ("k",), (KS,), (20,), _neighbors, _neighbors_of_others)
KNN_OF_LABELS = KNN._replace(
    predict=_neighbors_of_labels(_neighbors), leave_one_out=_neighbors_of_labels(_neighbors_of_others)
)
LOGISTIC_REGRESSION = Predictor(
    "logistic regression", ("C",), ((0.001, 0.01, 0.1, 1),), (0.01,), _logistic_regression
)  # fmt: skip
SVM = Predictor("RBF-SVM", ("C", "gamma · D"), ((1, 10, 100), (0.3, 1, 3)), (10, 1), _svm)
COMPONENTS = Predictor(
    "k-NN on whitened principal components", ("components", "k"), ((32, 64, 128), KS), (64, 20),
    _neighbors_of_components,
)  # fmt: skip
RIDGE = Predictor("ridge regression", ("alpha",), ((10, 100, 1000),), (100,), _by_column(_ridge))
SVR = Predictor("RBF-SVR", ("C", "gamma · D"), ((0.3, 1, 3), (0.3, 1, 3)), (1, 1), _by_column(_svr))

# By task: the uses of frozen features, which are named after what they are, and the baselines on pixels.
LINEAR = "linear probe"
USES: dict[str, dict[str, Predictor]] = {
    CLASSIFICATION: {KNN.title: KNN, LINEAR: LOGISTIC_REGRESSION},
    MULTILABEL: {KNN.title: KNN_OF_LABELS, LINEAR: LOGISTIC_REGRESSION},
    REGRESSION: {KNN.title: KNN, LINEAR: RIDGE},
}
BASELINES: dict[str, tuple[Predictor, ...]] = {
    CLASSIFICATION: (LOGISTIC_REGRESSION, SVM, COMPONENTS),
    MULTILABEL: (),
    REGRESSION: (RIDGE, SVR, COMPONENTS),
}


def judged(outputs: np.ndarray, targets: np.ndarray, task: str, metric: str = "") -> np.ndarray:
    """Outputs (..., n, C) and targets -> the score of each image (..., n), whose mean higher is better.

    It is 1 for the right class and 0 for a wrong one, the share of the labels that are right, or the negative squared
    error (`metric` mae: absolute error), the mean over the numbers.
    """
    if task == CLASSIFICATION:
        return (outputs.argmax(axis=-1) == targets).astype(np.float64)
    if task == MULTILABEL:
        return ((outputs > 0) == (targets > 0)).mean(axis=-1)
    errors = np.abs(outputs.astype(np.float64) - targets)
    return -(errors if metric == "mae" else errors**2).mean(axis=-1)
