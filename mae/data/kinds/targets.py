"""Datasets of the user's code whose labels are vectors: --task multilabel and regression."""

import logging
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from mae.data.kinds.objects import UserSet
from mae.data.source import OpenDataset, Source
from mae.files.untrusted import printable
from mae.settings import DataSpec
from mae.settings.choices import CLASSIFICATION, MULTILABEL
from mae.user_code import DATASET

logger = logging.getLogger(__name__)


class TargetSet(UserSet):
    """A map-style dataset of the user's code, as `UserSet`.

    A label is a number, or a sequence, an array or a tensor (C,). For `multilabel`, its values are 0 or 1. The optional
    attribute `labels` of the dataset is (n,) or (n, C), and `classes` has the C names.

    Args:
        task: MULTILABEL or REGRESSION.
        others: as in `UserSet`.
    """

    def __init__(self, function: OpenDataset | None, split: str, data_path: str | None, name: str, task: str) -> None:
        self.task = task
        super().__init__(function, split, data_path, name)

    def label_of(self, index: int, label: Any) -> Any:
        """Returns the label of an item, (C,).

        Raises:
            ValueError: the label is no vector of finite numbers, or differs from the attribute `labels`.
        """
        vector = self._vectors(label, self.describe(index), "its label is").reshape(-1)
        given = _array(label)
        self._require_known(index, vector.astype(given.dtype) if given.dtype.kind == "f" else vector)
        return vector

    def _vectors(self, value: Any, name: str, what: str) -> np.ndarray:
        try:
            found = _array(value).astype(np.float64)
        except (TypeError, ValueError):
            found = np.array(np.nan)
        wrong = ~np.isfinite(found) if self.task != MULTILABEL else ~np.isin(found, (0, 1))
        if wrong.any():
            kind = "0 or 1 for each class" if self.task == MULTILABEL else "finite numbers"
            shown = value if found.ndim == 0 else found[wrong][0]
            raise ValueError(f"{name}: {what} {printable(str(shown))[:80]}: task={self.task} needs {kind}")
        return found

    @cached_property
    def _listed(self) -> np.ndarray | None:
        """The attribute `labels` of the dataset, (n, C)."""
        listed = getattr(self.dataset, "labels", None)
        if listed is None:
            return None
        labels = self._vectors(listed, self.setting, "its labels have").reshape(len(listed), -1)
        if len(labels) != self.count:
            raise ValueError(f"{self.setting}: it has {self.count} samples and {len(labels)} labels: give equally many")
        return labels

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all samples, (n, C). If the dataset does not list them, all samples are read once."""
        if self._listed is not None:
            return self._listed
        logger.info(f"{self.title} has no attribute labels: reading all {self.count:,} samples to collect them")
        return np.stack([self.label_of(index, self._read(index).label) for index in range(len(self))])


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.cpu() if isinstance(value, Tensor) else value)


def open_dataset(name: str, split: str, data: DataSpec, task: str | None, function: OpenDataset | None) -> Source:
    """Opens a dataset, as an entry of `mae.data.kinds.registry.KINDS`. `name` is that of the function."""
    if task in (None, CLASSIFICATION):
        return UserSet(function, split, data.data_path, f"{DATASET}{name}", reads_labels=task is not None)
    return TargetSet(function, split, data.data_path, f"{DATASET}{name}", task)
