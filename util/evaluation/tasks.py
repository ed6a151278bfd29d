"""What the labels of images mean (--task): the loss, the predictions, and their evaluation."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util import dist
from util.cli.choices import DEFAULT_METRICS, METRICS, MULTILABEL, REGRESSION
from util.data import labels
from util.data.sources import Source, first_few
from util.evaluation import metrics
from util.evaluation.metrics import LOWER_IS_BETTER

logger = logging.getLogger(__name__)

TOP = 5
NONE: Mapping[str, float] = MappingProxyType({})


TITLES = {"acc1": "Acc@1", f"acc{TOP}": f"Acc@{TOP}", "balanced_acc": "balanced accuracy"}


def text(scores: Mapping[str, float]) -> str:
    """Formats scores like the published code."""
    return " ".join(f"{TITLES.get(name, name)} {score:.3f}" for name, score in scores.items())


class Evaluation(NamedTuple):
    """Predictions of a classifier for each sample of a dataset, in the order of the dataset."""

    labels: np.ndarray  # (n,)
    predictions: np.ndarray  # (n,), the most likely class
    num_in_top: int | None  # samples whose label is among the TOP most likely; None with fewer classes
    loss: float  # mean cross-entropy over the samples
    metrics: Mapping[str, float] = NONE  # those of --metric

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float((self.labels == self.predictions).mean())

    def scores(self) -> dict[str, float]:
        """Returns the accuracies in percent, the loss, and the metrics of --metric.

        There is a top-5 accuracy (TOP) if there are as many classes, and a balanced accuracy of imbalanced classes.
        """
        right = np.bincount(self.labels, self.labels == self.predictions)
        top = None if self.num_in_top is None else 100 * self.num_in_top / len(self.labels)
        balanced = labels.balanced_accuracy(right, np.bincount(self.labels))
        scores = {"acc1": self.acc1, f"acc{TOP}": top, "balanced_acc": balanced, "loss": self.loss}
        return {**{name: score for name, score in scores.items() if score is not None}, **self.metrics}

    def stats(self) -> dict[str, float]:
        """Returns the entries of log.txt."""
        return {f"test_{name}": score for name, score in self.scores().items()}

    def __str__(self) -> str:
        """Formats the scores like the published code."""
        return f"* {text(self.scores())}"


class Task(Protocol):
    """What the labels of a run mean."""

    metrics: Sequence[str]

    @property
    def selects(self) -> str:
        """The entry of log.txt that selects the best state."""

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values of this entry are better."""

    @property
    def title(self) -> str:
        """The name of its value."""

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean loss of outputs (B, C) and the labels of a batch."""

    def outputs_of(self, means: Tensor) -> Tensor:
        """Returns the outputs of a model that predicts shares of classes, or means of labels (B, C)."""

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Returns what `evaluation` needs of a batch: tensors (B, ...)."""

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> Any:
        """Returns the evaluation of all samples, from the `columns` of all batches and processes."""


class Classification:
    """One class for each image.

    Args:
        metrics: names of --metric. The first selects the best state; default: the top-1 accuracy.
        class_weight: factors of the losses of the classes (C,). They do not affect an evaluation.
    """

    def __init__(self, metrics: Sequence[str] = (), class_weight: Tensor | None = None) -> None:
        self.metrics = metrics
        self.class_weight = class_weight

    @property
    def selects(self) -> str:
        """The entry of log.txt that selects the best state."""
        return f"test_{self.metrics[0]}" if self.metrics else "test_acc1"

    lower_is_better = False

    @property
    def title(self) -> str:
        """The name of its value."""
        return self.metrics[0] if self.metrics else "Acc@1"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean of the weighted cross-entropies of logits (B, C) and classes (B,).

        The mean does not depend on how the images are divided into batches and processes; the weighted mean of
        `CrossEntropyLoss` does.
        """
        if self.class_weight is None:
            return F.cross_entropy(outputs, targets, label_smoothing=smoothing)
        weight = self.class_weight.to(outputs)
        return F.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=smoothing).mean()

    def outputs_of(self, means: Tensor) -> Tensor:
        """Returns the logits of shares of classes (B, C)."""
        return means.log()

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Returns labels, predictions, whether a label is among the TOP most likely, losses; and logits if needed."""
        loss = F.cross_entropy(outputs, targets, reduction="none")
        top = outputs.topk(min(TOP, outputs.shape[1])).indices
        columns = (targets, outputs.argmax(dim=1), (top == targets[:, None]).any(dim=1), loss)
        return (*columns, outputs) if {*self.metrics} & {*metrics.NEED_SCORES} else columns

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> Evaluation:
        """Returns the evaluation of all samples."""
        truth, predictions, in_top, losses, *logits = columns
        scores = torch.from_numpy(logits[0]).double().softmax(dim=1).numpy() if logits else None
        return Evaluation(
            labels=truth,
            predictions=predictions,
            num_in_top=int(in_top.sum()) if num_outputs >= TOP else None,
            loss=float(losses.mean(dtype=np.float64)),
            metrics={name: metrics.compute(name, truth, predictions, scores, num_outputs) for name in self.metrics},
        )


class TargetEvaluation(NamedTuple):
    """Predictions of vectors for each sample of a dataset, in the order of the dataset."""

    labels: np.ndarray  # (n, C): 0 or 1, or numbers in their units
    predictions: np.ndarray  # (n, C): probabilities, or numbers in their units
    loss: float  # mean over the samples and the numbers
    metrics: Mapping[str, float]

    def scores(self) -> dict[str, float]:
        """Returns the metrics and the loss."""
        return {**self.metrics, "loss": self.loss}

    def stats(self) -> dict[str, float]:
        """Returns the entries of log.txt."""
        return {f"test_{name}": score for name, score in self.scores().items()}

    def __str__(self) -> str:
        return f"* {text(self.scores())}"


class Multilabel:
    """Any number of classes for each image. The loss is the binary cross-entropy of each class.

    Args:
        metrics: names of --metric. The first selects the best state.
        class_weight: factors of the losses of absent and of present classes (2, C). They do not affect an evaluation.
    """

    lower_is_better = False

    def __init__(self, metrics: Sequence[str], class_weight: Tensor | None = None) -> None:
        self.metrics, self.title, self.selects = metrics, metrics[0], f"test_{metrics[0]}"
        self.class_weight = class_weight

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean loss of logits (B, C) and labels (B, C)."""
        assert not smoothing
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        if self.class_weight is not None:
            absent, present = self.class_weight.to(outputs)
            losses = losses * torch.where(targets > 0, present, absent)
        return losses.mean()

    def outputs_of(self, means: Tensor) -> Tensor:
        """Returns the logits of shares of neighbors with a class (B, C)."""
        return means.clamp(0, 1).logit()

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Returns labels, logits, and losses."""
        losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")
        return targets, outputs, losses.mean(dim=1)

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> TargetEvaluation:
        """Returns the evaluation of all samples."""
        truth, logits, losses = columns
        truth, scores = truth.astype(np.int64), torch.from_numpy(logits).double().sigmoid().numpy()
        found = {name: metrics.compute(name, truth, scores >= 0.5, scores, num_outputs) for name in self.metrics}
        return TargetEvaluation(truth, scores, float(losses.mean(dtype=np.float64)), found)


class Regression:
    """Numbers for each image. The loss is that of standardized numbers.

    Args:
        metrics: names of --metric, of the numbers in their units. The first selects the best state.
        criterion: one of `choices.REGRESSION_LOSSES`.
        mean, std: of the targets in the training set (C,).
    """

    def __init__(self, metrics: Sequence[str], criterion: str, mean: Sequence[float], std: Sequence[float]) -> None:
        self.metrics, self.title, self.selects = metrics, metrics[0], f"test_{metrics[0]}"
        self.lower_is_better = metrics[0] in LOWER_IS_BETTER
        losses: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
        self.losses = losses[criterion]
        self.mean, self.std = np.asarray(mean), np.asarray(std)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean loss of outputs (B, C) and standardized targets (B, C)."""
        assert not smoothing
        return self.losses(outputs, targets)

    def outputs_of(self, means: Tensor) -> Tensor:
        """Returns the means of standardized targets (B, C)."""
        return means

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Returns targets, outputs, and losses."""
        return targets, outputs, self.losses(outputs, targets.to(outputs), reduction="none").mean(dim=1)

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> TargetEvaluation:
        """Returns the evaluation of all samples, in the units of the targets."""
        truth, predictions = (column.astype(np.float64) * self.std + self.mean for column in columns[:2])
        found = {name: metrics.compute(name, truth, predictions, None, num_outputs) for name in self.metrics}
        return TargetEvaluation(truth, predictions, float(columns[2].mean(dtype=np.float64)), found)


def task_of(flags: Mapping[str, Any], val: Source, train: Source | None = None) -> Task:
    """Returns what the labels of a run mean.

    Args:
        flags: the settings of the run.
        val: the validation set. A warning names its classes for which a metric is undefined.
        train: the training set, for --class_weight.

    Raises:
        ValueError: a metric is for a different task, or is undefined for all classes; or no classes have weights.
    """
    task, names = flags["task"], check_metrics(flags["task"], flags["metric"])
    weight = flags.get("class_weight") and train is not None
    if task == REGRESSION:
        if weight:
            raise ValueError("--class_weight balanced: --task regression has no classes; omit --class_weight")
        return Regression(names, flags.get("regression_loss") or "l1", flags["target_mean"], flags["target_std"])
    one_hot = val.labels if task == MULTILABEL else np.eye(len(val.classes), dtype=bool)[val.labels]
    _require_defined(names, one_hot, val.classes)
    if task == MULTILABEL:
        if not weight or train is None:
            return Multilabel(names)
        counts = np.stack([(train.labels == present).sum(axis=0) for present in (0, 1)])
        return Multilabel(names, torch.stack([balanced_weights(own) for own in counts.T], dim=1))
    if not weight or train is None:
        return Classification(names)
    return Classification(names, balanced_weights(np.bincount(train.labels, minlength=len(train.classes))))


def _require_defined(names: Sequence[str], one_hot: np.ndarray, classes: Sequence[str]) -> None:
    for name in {*names} & {*metrics.NEED_SCORES}:
        missing = np.flatnonzero(~metrics.is_defined(name, one_hot))
        if len(missing) == len(classes):
            raise ValueError(f"--metric {name}: the validation images are of one class; give images of other classes")
        if len(missing) and dist.is_main():
            which = first_few([classes[number] for number in missing.tolist()])
            kind = "no validation image" if name == "average_precision" else "none or all of the validation images"
            logger.warning(f"--metric {name} is the mean over the other classes: {kind} is of {which}")


def best_of(scores: Sequence[float], lower_is_better: bool = False) -> int:
    """Returns the index of the best score. NaN is the worst score."""
    ordered = [(-score if lower_is_better else score) for score in scores]
    return max(range(len(scores)), key=lambda number: -math.inf if math.isnan(ordered[number]) else ordered[number])


def check_metrics(task: str, names: Sequence[str] | None) -> list[str]:
    """Returns the metrics of --metric.

    Raises:
        ValueError: a metric is for a different task.
    """
    for name in names or ():
        if name not in METRICS[task]:
            raise ValueError(f"--metric {name} is not for --task {task}: give {', '.join(METRICS[task])}")
    return list(dict.fromkeys(names or DEFAULT_METRICS[task]))


def balanced_weights(counts: np.ndarray) -> Tensor:
    """Returns the weights of classes, n / (classes · images of the class), as of scikit-learn; 0 without images."""
    present = np.maximum(counts, 1)
    return torch.from_numpy(np.where(counts > 0, counts.sum() / ((counts > 0).sum() * present), 0.0)).float()
