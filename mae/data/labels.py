"""Classes and targets of training and validation sets, and subsets of a source."""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mae import parallel
from mae.data import extra_inputs
from mae.data.item import Item
from mae.data.kinds.folders import strays_of
from mae.data.kinds.listing import Listing
from mae.data.kinds.torchvision import require_training
from mae.data.source import Source, Stream, first_few, is_stream, require_random_access
from mae.plurals import counted
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION

# Names that keep the number of a class free: the letters of torchvision's EMNIST count from 1.
PLACEHOLDERS = ("", "n/a")
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

    def __getitem__(self, index: int) -> Item:
        item = self.source[int(self.indices[index])]
        if self.numbers is None:
            return item
        if item.label < 0:
            raise ValueError(f"{self.name(index)} has no label when it is read, and has one in the list of labels")
        return item._replace(label=int(self.numbers[item.label]))

    def name(self, index: int) -> str:
        """Returns the name of the sample in the source."""
        return self.source.name(int(self.indices[index]))

    def version(self, index: int) -> str:
        """Returns the version of the sample in the source."""
        return self.source.version(int(self.indices[index]))


class Targets(Subset):
    """A source with other labels: vectors (n, C)."""

    def __init__(self, source: Source, classes: Sequence[str], labels: np.ndarray) -> None:
        super().__init__(source, np.arange(len(source)), list(classes))
        self.labels = labels

    def __getitem__(self, index: int) -> Item:
        return self.source[index]._replace(label=self.labels[index])


def open_pair(
    open_split: Callable[[str], Source | Stream],
    task: str = CLASSIFICATION,
    *,
    nb_classes: int | None = None,
    train_per_class: int | None = None,
    seed: int = 0,
    validation: bool = True,
) -> tuple[Source, Source]:
    """Opens the training set and the validation set. The labels of both have the same classes or targets.

    Args:
        open_split: returns the set "train" or "val".
        task: what the labels mean, one of `choices.TASK_CHOICES`.
        nb_classes: the expected number of classes or targets; None: any number. Integer ids below it are outputs.
        train_per_class: number of training images of each class, chosen at random by `seed`; None: all images.
        validation: open the validation set. Else, the training set takes its place.

    Raises:
        ValueError: a set has no labels of the task, the validation set has other classes or targets or the same images,
            or a class has too few images.
    """
    is_classification = task == CLASSIFICATION
    if train_per_class and not is_classification:
        raise ValueError(
            f"train_per_class={train_per_class}: an image has no single class with task={task}; omit `train_per_class`"
        )
    train = require(open_split("train"), "train", task)
    if validation:
        require_training(extra_inputs.original(train))
    if is_classification and nb_classes and has_ids(train) and max(map(int, train.classes)) < nb_classes:
        train = counted_as(train, outputs(nb_classes))
    val = require(open_split("val"), "val", task) if validation else train
    if is_classification and nb_classes != len(train.classes):  # an earlier head may have an output for them
        train = without_placeholders(train)
    count = len(train.classes)
    if nb_classes not in (None, count):
        unit = "classes" if is_classification else "numbers in each label"
        raise ValueError(f"the data has {count} {unit}, and `nb_classes` is {nb_classes}; omit `nb_classes`")
    if is_classification and count == 1:
        logger.warning(f"all training images are of one class, {train.classes[0]}: the accuracy says nothing")
    if not count:
        raise ValueError(f"task={task}: no training image has a label: give labels")
    if is_classification and parallel.is_main():
        _warn_of_imbalance(train, train.classes)
    chosen = some_of_each_class(train, train_per_class, seed) if train_per_class else train
    return chosen, counted_as(val, train.classes, task)


def _warn_of_imbalance(train: Source, classes: Sequence[str]) -> None:
    counts = np.bincount(train.labels, minlength=len(classes))
    if is_imbalanced(counts) or counts.min() == 1 < counts.max():
        few = int(counts.argmin())
        many = int(counts.argmax())
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


def require(source: Source | Stream, split: str, task: str = CLASSIFICATION) -> Source:
    """Returns the source if all its images have labels of the task. Of integer ids, those that occur are the classes.

    Raises:
        ValueError: an image has no label or a label of another task, or the source is a stream, which has no random
            access.
    """
    source = require_random_access(source)
    if task == CLASSIFICATION and (reason := getattr(source, "no_labels", "")):
        raise ValueError(f"the {split} images have no labels: {reason}")
    if task == CLASSIFICATION and source.classes and (lacking := np.flatnonzero(np.asarray(source.labels) < 0)).size:
        raise ValueError(
            f"{len(lacking):,} of the {len(source):,} {split} images have no label, such as "
            f"{source.name(int(lacking[0]))}: give each image a label, or leave it out"
        )
    if task == CLASSIFICATION and not source.classes:
        strays = strays_of(getattr(source, "names", ()))
        reason = f", because these are in no class folder: {strays}; move or remove them" if strays else ""
        raise ValueError(
            f"the {split} images have no classes{reason}. Supervised training and evaluation need them: give class "
            f"folders ({split}/CLASS/IMAGE), a `{split}_list` with labels, or a `dataset` with labels"
        )
    if task != CLASSIFICATION and np.asarray(source.labels).ndim < 2:
        raise ValueError(
            f"task={task}: the {split} images are {'class numbers' if source.classes else 'without labels'}: give "
            f"`train_list` and `val_list` with labels, or vectors of a `dataset` py:MODULE:FUNCTION"
        )
    return _of_classes(source, np.unique(source.labels)) if task == CLASSIFICATION and has_ids(source) else source


def _of_classes(source: Source, kept: np.ndarray) -> Source:
    """Returns a source with some of its classes. The others have no images.

    Args:
        kept: the numbers of these classes (n,), in ascending order.
    """
    if len(kept) == len(source.classes):
        return source
    numbers = np.full(len(source.classes), -1)
    numbers[kept] = np.arange(len(kept))
    return Subset(source, np.arange(len(source)), [source.classes[number] for number in kept], numbers)


def is_placeholder(name: str) -> bool:
    """Whether a name of a class only keeps its number free."""
    return name.strip().lower() in PLACEHOLDERS


def without_placeholders(source: Source) -> Source:
    """Returns a source without the placeholders among its classes that have no images."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    kept = [number for number, name in enumerate(source.classes) if counts[number] or not is_placeholder(name)]
    return _of_classes(source, np.array(kept, dtype=np.int64))


def has_ids(source: Any) -> bool:
    """Whether the names of the classes of a source, or of a subset of it, are integer ids, as in `Source`."""
    return getattr(extra_inputs.original(source), "has_ids", False)


def has_class_numbers(source: Source | Stream) -> bool:
    """Whether labels are class numbers. Labels of the user's code may be other numbers, for main_finetune.py --task."""
    if not is_stream(source) and getattr(source, "runs_code", False):
        try:
            source.labels  # noqa: B018
        except ValueError:
            return False
    return True


def outputs(count: int) -> list[str]:
    """Returns the ids of the outputs of a head whose file records no names."""
    return [str(number) for number in range(count)]


def counted_as(source: Source, classes: Sequence[str], task: str = CLASSIFICATION) -> Source:
    """Returns the source with labels that count the classes or targets of a model.

    The source may lack some classes.

    Raises:
        ValueError: the source has a class that the model does not have, or other targets.
    """
    if source.classes == list(classes):
        return source
    unknown = sorted(set(source.classes) - set(classes))
    if task != CLASSIFICATION:
        if unknown or (task == REGRESSION and len(source.classes) < len(classes)):
            raise ValueError(
                f"task={task}: the labels of the validation images are {first_few(source.classes)}, and those of the "
                f"training images or of the model are {first_few(classes)}: give the same"
            )
        vectors = np.zeros((len(source), len(classes)), source.labels.dtype)  # fp64: fp32 would round times
        vectors[:, [list(classes).index(name) for name in source.classes]] = source.labels
        return Targets(source, classes, vectors)
    if unknown and (named := without_placeholders(source)) is not source:
        return counted_as(named, classes)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(source.classes)} classes of the images are not among the {len(classes)} of "
            f"the training images or the model: {first_few(unknown)}; labels are compared as texts, such as 001 and 1"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = np.array([number_of[name] for name in source.classes])
    if missing := [classes[number] for number in np.setdiff1d(np.arange(len(classes)), numbers)]:
        logger.warning(
            f"the images have only {len(source.classes)} of the model's {len(classes)} classes: none is of "
            f"{first_few(missing)}"
        )
    return Subset(source, np.arange(len(source)), list(classes), numbers)


def some_of_each_class(source: Source, count: int, seed: int) -> Subset:
    """Chooses `count` samples of every class at random by `seed`. A larger `count` adds samples to a smaller one.

    Raises:
        ValueError: a class has fewer samples.
    """
    generator = np.random.default_rng(seed)
    labels = np.asarray(source.labels)
    chosen = []
    for number, name in enumerate(source.classes):
        samples = generator.permutation(np.flatnonzero(labels == number))
        if not len(samples) and has_ids(source):  # an output without images (--nb_classes)
            continue
        if len(samples) < count:
            raise ValueError(f"train_per_class={count}: the class {name} has {len(samples)} images")
        chosen.append(samples[:count])
    return Subset(source, np.sort(np.concatenate(chosen)))


def first_rows(source: Source) -> np.ndarray:
    """Returns the samples whose file has no earlier row in the list. Names of other samples may repeat."""
    if not isinstance(extra_inputs.original(source), Listing):
        return np.arange(len(source))
    first: dict[str, int] = {}
    for index in range(len(source)):
        first.setdefault(source.name(index), index)
    return np.fromiter(first.values(), int)


def hold_out(source: Source, share: float, seed: int, flag: str) -> tuple[Subset, Subset]:
    """Splits a source at random by `seed` into a training part and a held-out part. Logs the size of the latter.

    Args:
        share: the fraction of the samples that is held out, rounded so that both parts have at least one.
        flag: the flag that holds out images, with its value, for log and error.

    Returns:
        The training part and the held-out part.

    Raises:
        ValueError: there are fewer than two samples, or a list has a file in several rows, which both parts would have.
    """
    total = len(source)
    if total < 2:
        raise ValueError(f"{flag} needs at least 2 images, and there is {total}")
    if len(first_rows(source)) < total:
        name, count = Counter(map(source.name, range(total))).most_common(1)[0]
        raise ValueError(
            f"{flag}: {name} is in {count} rows of the list, and both parts may have it; give each image one row"
        )
    count = min(max(round(share * total), 1), total - 1)
    logger.info(f"{flag}: {count:,} of {total:,} training images are held out")
    order = np.random.default_rng(seed).permutation(total)
    parts = Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))
    _warn_of_unknown_classes(*parts, flag)
    return parts


def _warn_of_unknown_classes(train: Source, held_out: Source, flag: str) -> None:
    labels = np.asarray(held_out.labels)
    if not held_out.classes or labels.ndim > 1 or not np.issubdtype(labels.dtype, np.integer):
        return
    unknown = int((~np.isin(labels, train.labels)).sum())
    if unknown:
        logger.warning(
            f"{flag}: {counted(unknown, 'held-out image')} of {len(labels):,} can't be classified, because no training "
            f"image is of the class"
        )


def identity(chosen: Source, total: int) -> str:
    """Describes a part of `total` images for comparisons: its size, and a checksum of the names of its files.

    The names have no folders: the images of a moved dataset are the same.
    """
    names = "\n".join(chosen.name(index).rpartition("/")[2] for index in range(len(chosen)))
    return f"{len(chosen):,} of {total:,} images, with the checksum {zlib.crc32(names.encode()):08x}"


def statistics(source: Source, task: str) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each target in fp64, by which `standardized` labels are made.

    Raises:
        ValueError: a target is the same for all images.
    """
    if task == MULTILABEL:
        return [0.0] * len(source.classes), [1.0] * len(source.classes)
    numbers = np.asarray(source.labels, dtype=np.float64)
    for name, column in zip(source.classes, numbers.T, strict=True):
        if np.ptp(column) == 0:  # its standard deviation may be a rounding error
            raise ValueError(f"task=regression: {name} is the same for all training images: omit this label")
    return numbers.mean(axis=0).tolist(), numbers.std(axis=0).tolist()


def standardized(source: Source, mean: Sequence[float], std: Sequence[float]) -> Source:
    """Returns a source with labels in fp32, of mean 0 and standard deviation 1 if `mean` and `std` are theirs."""
    labels = (np.asarray(source.labels, dtype=np.float64) - mean) / std
    return Targets(source, source.classes, labels.astype(np.float32))
