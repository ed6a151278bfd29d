"""Classes of training and validation sets, and subsets of a source."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from util import dist
from util.data.sources import Source, StoredImage, first_few
from util.data.webdataset_shards import Shards

IMBALANCE = 5  # ratio of the largest to the smallest class from which the accuracy of each class counts

logger = logging.getLogger(__name__)


class Subset:
    """A subset of a source, optionally with other classes.

    Args:
        indices: (n,), indices of the samples in the source.
        classes: the new classes (default: the classes of the source).
        numbers: (number of the source's classes,), the new label of each label of the source. Default: unchanged.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        classes: list[str] | None = None,
        numbers: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes if classes is None else classes
        self.numbers = numbers
        self.labels = source.labels[indices] if numbers is None else numbers[source.labels[indices]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[StoredImage, Any]:
        data, label = self.source[int(self.indices[index])]
        return data, label if self.numbers is None else int(self.numbers[label])

    def name(self, index: int) -> str:
        """Returns the name of the sample in the source."""
        return self.source.name(int(self.indices[index]))

    def version(self, index: int) -> str:
        """Returns the version of the sample in the source."""
        return self.source.version(int(self.indices[index]))


def _is_decimal(name: str) -> bool:
    return name.count(".") == 1 and name.lstrip("-").replace(".", "").isdecimal()


def check_classes(train: Source, val: Source, nb_classes: int | None) -> list[str]:
    """Returns the classes of a training and a validation set, which must be equal.

    Raises:
        ValueError: the classes differ, or their number is not `nb_classes`.
    """
    only_train, only_val = sorted(set(train.classes) - set(val.classes)), sorted(set(val.classes) - set(train.classes))
    if only_train or only_val:
        raise ValueError(
            "training and validation set have different classes: "
            + "; ".join(
                f"only {side}: {first_few(own)}" for side, own in (("train", only_train), ("val", only_val)) if own
            )
            + "; --task multilabel takes a;b as two classes" * any(";" in name for name in only_train + only_val)
            + "; --task regression takes numbers" * all(map(_is_decimal, only_train + only_val))
        )
    if nb_classes not in (None, len(train.classes)):
        raise ValueError(
            f"the data has {len(train.classes)} classes, and --nb_classes is {nb_classes}; omit --nb_classes"
        )
    return train.classes


def open_pair(
    open_split: Callable[[str], Source | Shards],
    *,
    nb_classes: int | None = None,
    train_per_class: int | None = None,
    seed: int = 0,
    validation: bool = True,
) -> tuple[Source, Source]:
    """Opens the training set and the validation set. The labels of both are indices into the same classes.

    Args:
        open_split: returns the set "train" or "val".
        nb_classes: the expected number of classes; None: any number.
        train_per_class: number of training images of each class, chosen at random by `seed`; None: all images.
        validation: open the validation set. Else, the training set takes its place.

    Raises:
        ValueError: a set has no labels, the classes differ, or a class has too few images.
    """
    train = require(open_split("train"), "train")
    val = require(open_split("val"), "val") if validation else train
    classes = check_classes(train, val, nb_classes)
    if dist.is_main():
        _warn_of_imbalance(train, classes)
    chosen = some_of_each_class(train, train_per_class, seed) if train_per_class else train
    return chosen, counted_as(val, classes)


def _warn_of_imbalance(train: Source, classes: Sequence[str]) -> None:
    counts = np.bincount(train.labels, minlength=len(classes))
    if is_imbalanced(counts) or counts.min() == 1 < counts.max():
        few, many = int(counts.argmin()), int(counts.argmax())
        logger.warning(
            f"the training set has {counts[few]:,} to {counts[many]:,} images of a class: {classes[few]} has "
            f"{counts[few]:,}, and {classes[many]} has {counts[many]:,}. The top-1 accuracy depends mostly on large "
            f"classes, and a class of one image may be a misspelled name"
        )


def is_imbalanced(counts: np.ndarray) -> bool:
    """Whether the numbers of images of the classes that have any differ by more than IMBALANCE times."""
    present = counts[counts > 0]
    return len(present) > 0 and present.max() > IMBALANCE * present.min()


def balanced_accuracy(right: np.ndarray, counts: np.ndarray) -> float | None:
    """Returns the mean of the accuracies of the classes in percent; None unless the classes are imbalanced.

    Args:
        right: correctly classified images of each class (classes,).
        counts: images of each class (classes,). Classes without images do not count.
    """
    if not is_imbalanced(counts):
        return None
    return 100 * float((right[counts > 0] / counts[counts > 0]).mean())


def require(source: Source | Shards, split: str) -> Source:
    """Returns the source if all its images have labels.

    Raises:
        ValueError: an image has no label, or the source is a stream, which has no random access.
    """
    if isinstance(source, Shards):
        raise ValueError(
            f"{source.title}: streamed shards are for pre-training only; unpack them, or pack the images as a zip file"
        )
    if not source.classes or (np.asarray(source.labels) < 0).any():
        raise ValueError(
            f"the {split} images have no classes, and supervised training and evaluation need them: give class "
            f"folders ({split}/CLASS/IMAGE), a --{split}_list with labels, or a --dataset with labels"
        )
    return source


def counted_as(source: Source, classes: Sequence[str]) -> Source:
    """Returns the source with labels that are indices into a model's classes. The source may lack some of them.

    Raises:
        ValueError: the source has a class that the model does not have.
    """
    if source.classes == list(classes):
        return source
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(source.classes)} classes of the images are not among the model's "
            f"{len(classes)} classes: {first_few(unknown)}"
        )
    logger.warning(f"the images have only {len(source.classes)} of the model's {len(classes)} classes")
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = np.array([number_of[name] for name in source.classes])
    return Subset(source, np.arange(len(source)), list(classes), numbers)


def some_of_each_class(source: Source, count: int, seed: int) -> Subset:
    """Chooses `count` samples of every class at random by `seed`. A larger `count` adds samples to a smaller one.

    Raises:
        ValueError: a class has fewer samples.
    """
    generator = np.random.default_rng(seed)
    labels, chosen = np.asarray(source.labels), []
    for number, name in enumerate(source.classes):
        own = generator.permutation(np.flatnonzero(labels == number))
        if len(own) < count:
            raise ValueError(f"--train_per_class {count}: the class {name} has {len(own)} images")
        chosen.append(own[:count])
    return Subset(source, np.sort(np.concatenate(chosen)))


def hold_out(source: Source, share: float, seed: int, flag: str) -> tuple[Subset, Subset]:
    """Splits a source at random by `seed` into a training part and a held-out part. Logs the size of the latter.

    Args:
        share: the fraction of the samples that is held out, rounded so that both parts have at least one.
        flag: the flag of the fraction, for the error.

    Returns:
        The training part and the held-out part.

    Raises:
        ValueError: there are fewer than two samples.
    """
    total = len(source)
    if total < 2:
        raise ValueError(f"{flag} {share:g} needs at least 2 images, and there is {total}")
    count = min(max(round(share * total), 1), total - 1)
    logger.info(f"{flag}: {count:,} of {total:,} training images are held out")
    order = np.random.default_rng(seed).permutation(total)
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))
