"""The images of a comparison on which predictors are fitted, and those that judge them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mae.data import labels
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.evaluate import tasks
from mae.settings import Run
from mae.settings.choices import CLASSIFICATION


class Size(NamedTuple):
    """A number of labels."""

    labels: int  # number of training images
    per_class: int | None  # of each class; None: all images
    draws: int  # number of random subsets
    epochs: int  # of fine-tuning


class Images:
    """The training images of all draws, and the validation images, with their targets.

    Args:
        run: the settings of the comparison.
        data: leaves out the training images that can't be read.
        train, val: the complete sets.
        sizes: the numbers of labels, with their draws.

    Attributes:
        train: the training images that a draw has.
        targets, truth: classes (n,), labels 0 and 1 (n, C) or standardized numbers (n, C) of `train` and of `val`.
        task: what they mean.
    """

    def __init__(self, run: Run, data: RunData, train: Source, val: Source, sizes: Sequence[Size]) -> None:
        self.all = train
        draws = [self._draw(size.per_class, draw) for size in sizes for draw in range(size.draws)]
        some = labels.Subset(train, np.unique(np.concatenate(draws)))
        self.train = data.readable(some)
        self.indices = some.indices if self.train is some else some.indices[self.train.indices]  # type: ignore[attr-defined]
        self.val = val
        sets = [self.train, val]
        units = {}
        if run.images.task != CLASSIFICATION:
            mean, std = labels.statistics(self.train, run.images.task)
            sets = [labels.standardized(source, mean, std) for source in sets]
            units = {"target_mean": mean, "target_std": std}
        self.targets, self.truth = (np.asarray(source.labels) for source in sets)
        self.task = tasks.task_of(run.record() | units, val)

    def _draw(self, per_class: int | None, seed: int) -> np.ndarray:
        """Returns the indices of a draw."""
        return labels.some_of_each_class(self.all, per_class, seed).indices if per_class else np.arange(len(self.all))

    def rows_of(self, size: Size, draw: int) -> np.ndarray | slice:
        """Returns the rows of `train` and `targets` that a draw has; all without a copy."""
        return (
            np.flatnonzero(np.isin(self.indices, self._draw(size.per_class, draw))) if size.per_class else slice(None)
        )

    def score_of(self, outputs: np.ndarray, are_votes: bool) -> float:
        """Returns the score of outputs (n, C) for `val`; of the classes above C, none is predicted.

        Args:
            are_votes: the outputs for classes are the shares of the votes of neighbors, and no logits.
        """
        count = len(self.val.classes)
        logits = torch.from_numpy(outputs)
        if are_votes and self.targets.ndim == 1:
            logits = logits.log()
        logits = nn.functional.pad(logits, (0, count - logits.shape[1]), value=-torch.inf)
        columns = self.task.columns(logits, torch.from_numpy(self.truth))
        evaluation = self.task.evaluation([column.numpy() for column in columns], count)
        return evaluation.stats()[self.task.selects]
