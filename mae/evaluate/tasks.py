"""What the labels of images mean (--task): the loss, the predictions, and their evaluation."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mae import parallel
from mae.data import labels
from mae.data.source import Source, first_few
from mae.evaluate import metrics
from mae.evaluate.metrics import METRICS, lower_is_better
from mae.settings import UNSET
from mae.settings.choices import MULTILABEL, REGRESSION

logger = logging.getLogger(__name__)

TOP = 5
NONE: Mapping[str, float] = MappingProxyType({})


TITLES = {"acc1": "Acc@1", f"acc{TOP}": f"Acc@{TOP}", "balanced_acc": "balanced accuracy"}


def text(scores: Mapping[str, float]) -> str:
    """Formats scores like the published code."""
    return " ".join(f"{TITLES.get(name, name)} {score:.3f}" for name, score in scores.items())


def warn_of_undefined(scores: Mapping[str, float]) -> None:
    """Logs a warning that names the scores that are not finite."""
    if undefined := [name for name, score in scores.items() if not math.isfinite(score)]:
        logger.warning(
            f"undefined (nan): {', '.join(undefined)}. The validation images are too few or have equal labels, or the "
            f"outputs of the model are equal or not finite. Undefined scores select no checkpoint-best.pth"
        )


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


class TargetEvaluation(Evaluation):
    """Predictions of vectors (n, C): labels 0 and 1, and probabilities; or numbers in their units."""

    def scores(self) -> dict[str, float]:
        """Returns the metrics and the loss."""
        return {**self.metrics, "loss": self.loss}


class Classification:
    """What the labels of a run mean: one class for each image.

    Args:
        metrics: names of --metric. Default: the top-1 accuracy.
        class_weight: factors of the losses of the classes (C,). They do not affect an evaluation.
        grades: as in `metrics.compute`.

    Attributes:
        title: name of the score that selects.
        selects: its entry of log.txt.
        best_by: the same for the best state, or "" if the validation labels are equal: they select none.
        lower_is_better: whether lower scores are better.
    """

    def __init__(
        self, metrics: Sequence[str] = (), class_weight: Tensor | None = None, grades: np.ndarray | None = None
    ) -> None:
        self.metrics = metrics
        self.class_weight = class_weight
        self.grades = grades
        self.title, self.selects = (metrics[0], f"test_{metrics[0]}") if metrics else ("Acc@1", "test_acc1")
        self.best_by = self.selects
        self.lower_is_better = lower_is_better(self.title)

    def of_outputs(self, count: int) -> str:
        """Returns what images have, for the log."""
        return f"of {count} classes"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean of the weighted cross-entropies of logits (B, C) and classes (B,).

        The mean does not depend on how the images are divided into batches and processes; the weighted mean of
        `CrossEntropyLoss` does.
        """
        if self.class_weight is None:
            return F.cross_entropy(outputs, targets, label_smoothing=smoothing)
        weight = self.class_weight.to(outputs)
        # The weight of cross_entropy would weight the smoothed part by all classes, which favors the rare ones.
        losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
        return (losses * weight[targets]).mean()

    def outputs_of(self, means: Tensor) -> Tensor:
        """Returns the outputs of a model that predicts shares of classes, or means of labels (B, C)."""
        return means.log()

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Returns what `evaluation` needs of a batch: tensors (B, ...)."""
        loss = F.cross_entropy(outputs, targets, reduction="none")
        top = outputs.topk(min(TOP, outputs.shape[1])).indices
        columns = (targets, outputs.argmax(dim=1), (top == targets[:, None]).any(dim=1), loss)
        return (*columns, outputs) if any(METRICS[name].needs_scores for name in self.metrics) else columns

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> Evaluation:
        """Returns the evaluation of all samples, from the `columns` of all batches and processes."""
        truth, predictions, in_top, losses, *logits = columns
        scores = torch.from_numpy(logits[0]).double().softmax(dim=1).numpy() if logits else None
        return Evaluation(
            labels=truth,
            predictions=predictions,
            num_in_top=int(in_top.sum()) if num_outputs >= TOP else None,
            loss=float(losses.mean(dtype=np.float64)),
            metrics={
                name: metrics.compute(name, truth, predictions, scores, num_outputs, self.grades)
                for name in self.metrics
            },
        )


class Multilabel(Classification):
    """Any number of classes for each image. The loss is the binary cross-entropy of each class.

    Args:
        class_weight: factors of the losses of absent and of present classes (2, C).
        others: as in `Classification`.
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses of outputs (B, C) and labels (B, C)."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="none")

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Returns the mean of the weighted losses. There is no smoothing."""
        losses = self.losses(outputs, targets)
        if self.class_weight is not None:
            absent, present = self.class_weight.to(losses)
            losses = losses * torch.where(targets > 0, present, absent)
        return losses.mean()

    def outputs_of(self, means: Tensor) -> Tensor:
        """As in `Classification`."""
        return means.clamp(0, 1).logit()

    def columns(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """As in `Classification`."""
        return targets, outputs, self.losses(outputs, targets).mean(dim=1)

    def values(self, targets: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns labels and probabilities, (n, C) each."""
        return targets.astype(np.int64), torch.from_numpy(outputs).double().sigmoid().numpy()

    def evaluation(self, columns: Sequence[np.ndarray], num_outputs: int) -> TargetEvaluation:
        """As in `Classification`."""
        truth, predictions = self.values(*columns[:2])
        found = {name: metrics.compute(name, truth, predictions, predictions, num_outputs) for name in self.metrics}
        return TargetEvaluation(truth, predictions, None, float(columns[2].mean(dtype=np.float64)), found)


class Regression(Multilabel):
    """Numbers for each image. The loss is that of standardized numbers.

    Args:
        metrics: as in `Classification`, of the numbers in their units.
        criterion: one of `choices.REGRESSION_LOSSES`.
        mean, std: of the numbers in the training set (C,).
    """

    def __init__(self, metrics: Sequence[str], criterion: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(metrics)
        self.criterion = criterion
        self.mean = np.asarray(mean)
        self.std = np.asarray(std)

    def of_outputs(self, count: int) -> str:
        return f"with {count} numbers for each" if count > 1 else "with a number for each"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses of outputs (B, C) and standardized numbers (B, C)."""
        functions: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
        return functions[self.criterion](outputs, targets.to(outputs), reduction="none")

    def outputs_of(self, means: Tensor) -> Tensor:
        """As in `Classification`."""
        return means

    def values(self, targets: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns numbers and predictions in their units, (n, C) each."""
        return targets.astype(np.float64) * self.std + self.mean, outputs.astype(np.float64) * self.std + self.mean


def task_of(flags: Mapping[str, Any], val: Source, train: Source | None = None) -> Classification:
    """Returns what the labels of a run mean.

    Args:
        flags: the settings of the run.
        val: the validation set. A warning names its classes for which a metric is undefined.
        train: the training set, for --class_weight.

    Raises:
        ValueError: a metric or a loss is for a different task; a metric is undefined for all classes; or no classes
            have weights.
    """
    task = flags["task"]
    weight = flags.get("class_weight") and train is not None
    names = list(dict.fromkeys(flags["metric"] or metrics.DEFAULT_METRICS[task]))
    if code := [name for name in names if ":" in name and name not in METRICS]:  # a file can't make a program import it
        raise ValueError(f"the resumed run has a metric of its own: give metric={code[0]}")
    known = metrics.names_of(task)
    if others := [name for name in names if name not in known]:
        raise ValueError(f"metric={others[0]} is not for task={task}: give {', '.join(known)}")
    if task == REGRESSION:
        if weight:
            raise ValueError("class_weight=balanced: task=regression has no classes; omit `class_weight`")
        constant = [name for name, column in zip(val.classes, val.labels.T, strict=True) if np.ptp(column) == 0]
        undefined = [f"{name} ({METRICS[name].of_constant})" for name in known if METRICS[name].of_constant]
        if constant and any(METRICS[name].of_constant for name in names):
            logger.warning(
                f"metric=[{', '.join(names)}]: {first_few(constant)} is the same for all validation images; "
                f"{' and '.join(undefined)} can't score it"
            )
        task = Regression(
            names,
            str(flags.get("regression_loss") or UNSET["regression_loss"]),
            flags["target_mean"],
            flags["target_std"],
        )
        if len(constant) == len(val.classes) and METRICS[names[0]].of_constant:
            task.best_by = ""
        return task
    if flags.get("regression_loss"):
        raise ValueError(f"regression_loss={flags['regression_loss']} is for task=regression, and the task is {task}")
    _require_defined(names, np.asarray(val.labels), val.classes)
    ordered = [name for name in names if METRICS[name].has_order]
    if ordered and len(val.classes) > 2 and not _are_numbers(val.classes) and parallel.is_main():
        logger.warning(
            f"metric={ordered[0]} weights errors by the order of the classes, {first_few(val.classes)}; for another "
            f"order, give `train_list` and `val_list` with the labels 0, 1, 2"
        )
    kind = Multilabel if task == MULTILABEL else Classification
    # Grades 0, 1, 2 and 4 are as far apart as their numbers, also if no image has the grade 3.
    grades = np.array(val.classes, dtype=np.float64) if _are_numbers(val.classes) else None
    return kind(names, balanced_weights(train) if weight and train is not None else None, grades)


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether the classes are increasing numbers."""
    return all(name.isascii() and name.isdecimal() for name in classes) and sorted(classes, key=int) == list(classes)


def _require_defined(names: Sequence[str], truth: np.ndarray, classes: Sequence[str]) -> None:
    counts = metrics.counts_of(truth, len(classes))
    for name in names:
        metric = METRICS[name]
        if not metric.without_class:
            continue
        missing = np.flatnonzero(~metrics.is_defined(name, counts, len(truth)))
        if len(missing) == len(classes) and metric.needs_scores:
            raise ValueError(f"metric={name}: the validation images are of one class; give images of other classes")
        if len(missing) and parallel.is_main():
            lacking = first_few([classes[number] for number in missing.tolist()])
            kind = "none or all of the validation images" if metric.needs_absence else "no validation image"
            logger.warning(f"metric={name} {metric.without_class}: {kind} is of {lacking}")


def best_of(scores: Sequence[float], lower_is_better: bool = False) -> int:
    """Returns the index of the best score. NaN is the worst score.

    Raises:
        ValueError: there are several scores, and all are NaN.
    """
    if len(scores) > 1 and np.isnan(scores).all():
        raise ValueError(
            f"the score is undefined (nan) for each of the {len(scores)} values to choose from: the images that decide "
            f"are too few or of one class; give one value, or more images"
        )
    return int(np.argmax(np.nan_to_num(-np.array(scores) if lower_is_better else np.array(scores), nan=-np.inf)))


def balanced_weights(train: Source) -> Tensor:
    """Returns the weights of classes (C,), as of scikit-learn: images / (classes · images of the class).

    For labels (n, C), they are the weights of the values 0 and 1 of each class (2, C). The weight of a class without
    images is 0.
    """
    labels = np.asarray(train.labels)
    if labels.ndim == 2:
        counts = np.stack([(labels == value).sum(axis=0) for value in (0, 1)])
    else:
        counts = np.bincount(labels, minlength=len(train.classes))
    share = np.maximum(counts, 1) * (counts > 0).sum(axis=0)
    return torch.from_numpy(np.where(counts > 0, len(labels) / share, 0.0)).float()
