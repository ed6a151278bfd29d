"""Training and validation sets whose labels are vectors (n, C): several classes (0 or 1), or numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from util.cli.choices import CLASSIFICATION, MULTILABEL, REGRESSION
from util.data import labels
from util.data.sources import Source, first_few
from util.data.webdataset_shards import Shards


class Targets(labels.Subset):
    """A source with other labels: vectors (n, C) in fp32."""

    def __init__(self, source: Source, classes: Sequence[str], labels: np.ndarray) -> None:
        super().__init__(source, np.arange(len(source)), list(classes))
        self.labels = labels.astype(np.float32)

    def __getitem__(self, index: int) -> tuple:
        return self.source[index][0], self.labels[index]


def require(source: Source | Shards, split: str, task: str) -> Source:
    """Returns the source if its labels are vectors.

    Raises:
        ValueError: they are classes, or there are none; or the source is a stream.
    """
    if isinstance(source, Shards) or np.asarray(source.labels).ndim < 2:
        what = "streamed" if isinstance(source, Shards) else "class numbers" if source.classes else "without labels"
        raise ValueError(
            f"--task {task}: the {split} images are {what}: give --train_list and --val_list with labels, or vectors "
            f"of a --dataset py:MODULE:FUNCTION"
        )
    return source


def open_pair(
    open_split: Callable[[str], Source | Shards],
    task: str,
    nb_classes: int | None = None,
    train_per_class: int | None = None,
    seed: int = 0,
    validation: bool = True,
) -> tuple[Source, Source]:
    """Opens the training set and the validation set. The labels of both have the same classes or targets.

    Args:
        open_split: returns the set "train" or "val".
        nb_classes: the expected number of classes or targets; None: any number.
        train_per_class, seed: as in `labels.open_pair`.
        validation: open the validation set. Else, the training set takes its place.

    Raises:
        ValueError: a set has no labels of the task, their classes or targets differ, or a class has too few images.
    """
    if task == CLASSIFICATION:
        return labels.open_pair(
            open_split, nb_classes=nb_classes, train_per_class=train_per_class, seed=seed, validation=validation
        )
    if train_per_class:
        raise ValueError(
            f"--train_per_class {train_per_class}: an image has no single class with --task {task}; omit "
            f"--train_per_class"
        )
    train = require(open_split("train"), "train", task)
    if nb_classes not in (None, len(train.classes)):
        raise ValueError(f"--nb_classes {nb_classes}: the labels have {len(train.classes)} numbers; omit --nb_classes")
    if not train.classes:
        raise ValueError(f"--task {task}: no training image has a label: give labels")
    return train, counted_as(require(open_split("val"), "val", task), train.classes, task) if validation else train


def counted_as(source: Source, classes: Sequence[str], task: str) -> Source:
    """Returns a source with labels in the order of the classes or targets of a model.

    A source of several classes may lack some of them.

    Raises:
        ValueError: the source has other classes or targets.
    """
    if source.classes == list(classes):
        return source
    unknown = sorted(set(source.classes) - set(classes))
    if unknown or (task == REGRESSION and len(source.classes) < len(classes)):
        raise ValueError(
            f"--task {task}: the labels of the validation images are {first_few(source.classes)}, and those of the "
            f"training images or of the model are {first_few(classes)}: give the same"
        )
    vectors = np.zeros((len(source), len(classes)))
    vectors[:, [list(classes).index(name) for name in source.classes]] = source.labels
    return Targets(source, classes, vectors)


def statistics(source: Source, task: str) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each target, by which `standardized` labels are made.

    Raises:
        ValueError: a target is the same for all images.
    """
    if task == MULTILABEL:
        return [0.0] * len(source.classes), [1.0] * len(source.classes)
    mean, std = source.labels.mean(axis=0), source.labels.std(axis=0)
    if not (std > 0).all():
        name = source.classes[int(np.argmin(std))]
        raise ValueError(f"--task regression: {name} is the same for all training images: omit this label")
    return mean.tolist(), std.tolist()


def standardized(source: Source, mean: Sequence[float], std: Sequence[float]) -> Source:
    """Returns a source whose labels have the mean 0 and the standard deviation 1 if `mean` and `std` are theirs."""
    return Targets(source, source.classes, (np.asarray(source.labels, dtype=np.float64) - mean) / std)
