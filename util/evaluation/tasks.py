"""What the labels of images mean (--task): the loss, the predictions, and their evaluation."""

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util import dist
from util.cli.choices import CLASSIFICATION, METRICS
from util.data import labels
from util.data.sources import Source, first_few
from util.evaluation import metrics

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


def task_of(flags: Mapping[str, Any], val: Source, train: Source | None = None) -> Task:
    """Returns what the labels of a run mean.

    Args:
        flags: the settings of the run.
        val: the validation set. A warning names its classes for which a metric is undefined.
        train: the training set, for --class_weight.

    Raises:
        ValueError: a metric is for a different task, or is undefined for all classes.
    """
    names = check_metrics(CLASSIFICATION, flags["metric"])
    one_hot = np.eye(len(val.classes), dtype=bool)[val.labels]
    for name in {*names} & {*metrics.NEED_SCORES}:
        missing = np.flatnonzero(~metrics.is_defined(name, one_hot))
        if len(missing) == len(val.classes):
            raise ValueError(f"--metric {name}: the validation images are of one class; give images of other classes")
        if len(missing) and dist.is_main():
            which = first_few([val.classes[number] for number in missing])
            logger.warning(f"--metric {name} is the mean over the other classes: no validation image is of {which}")
    weight = None
    if train is not None and flags.get("class_weight"):
        weight = balanced_weights(np.bincount(train.labels, minlength=len(train.classes)))
    return Classification(names, weight)


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
    return list(dict.fromkeys(names or ()))


def balanced_weights(counts: np.ndarray) -> Tensor:
    """Returns the weights of classes, n / (classes · images of the class), as of scikit-learn; 0 without images."""
    present = np.maximum(counts, 1)
    return torch.from_numpy(np.where(counts > 0, counts.sum() / ((counts > 0).sum() * present), 0.0)).float()
