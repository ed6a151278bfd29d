"""What a classifier needs of a dataset: its classes, and parts of it."""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from util.data.decode import Picture
from util.data.sources import Source, first_few
from util.data.webdataset_shards import Shards

logger = logging.getLogger(__name__)


class Subset:
    """A part of a source; or all of it, with labels that count other classes.

    Args:
        indices: of the samples that are taken.
        classes: that the labels count from now on, and
        numbers: for each of the source's own labels, its new one; None leaves them as they are.
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

    def __getitem__(self, index: int) -> tuple[bytes | Picture, int]:
        data, label = self.source[int(self.indices[index])]
        return data, label if self.numbers is None else int(self.numbers[label])

    def name(self, index: int) -> str:
        """As the source calls the sample."""
        return self.source.name(int(self.indices[index]))


def check_classes(train: Source, val: Source, nb_classes: int | None) -> list[str]:
    """The classes of a training and a validation set, which must be the same.

    Raises:
        ValueError: they differ, or `nb_classes` is another number.
    """
    only_train, only_val = sorted(set(train.classes) - set(val.classes)), sorted(set(val.classes) - set(train.classes))
    if only_train or only_val:
        raise ValueError(
            "training and validation set have different classes: "
            + "; ".join(
                f"only {side}: {first_few(own)}" for side, own in (("train", only_train), ("val", only_val)) if own
            )
        )
    if nb_classes not in (None, len(train.classes)):
        raise ValueError(f"the data has {len(train.classes)} classes, and --nb_classes is {nb_classes}; leave it out")
    return train.classes


def open_pair(
    open_split: Callable[..., Source | Shards],
    train_list: str | None,
    val_list: str | None,
    *,
    nb_classes: int | None,
    train_per_class: int | None,
    seed: int,
) -> tuple[Source, Source]:
    """The images to train and to validate on, with labels that count the same classes.

    Args:
        open_split: `datasets.open_source`, with what both have in common given.
        nb_classes: what the number of classes must be, if given.
        train_per_class: so many training images of each class, drawn by `seed`; None: all.

    Raises:
        ValueError: either has no labels, or their classes differ, or a class has too few images.
    """
    train = require(open_split("train", file_list=train_list), "train")
    val = require(open_split("val", file_list=val_list), "val")
    classes = check_classes(train, val, nb_classes)
    chosen = some_of_each_class(train, train_per_class, seed) if train_per_class else train
    return chosen, counted_as(val, classes)


def require(source: Source | Shards, split: str) -> Source:
    """The source itself, if all its images have labels.

    Raises:
        ValueError: they have none, or it is a stream, which has no end that an evaluation could reach.
    """
    if isinstance(source, Shards):
        raise ValueError(f"{source.title}: streamed shards serve pre-training only; unpack them, or pack a zip file")
    if not source.classes or (np.asarray(source.labels) < 0).any():
        raise ValueError(
            f"the images of {split} have no classes, which supervised training and evaluation need: give class "
            f"folders ({split}/CLASS/IMAGE), or a --{split}_list with labels"
        )
    return source


def counted_as(source: Source, classes: Sequence[str]) -> Source:
    """A source whose labels count a model's classes, of which it may lack some.

    Raises:
        ValueError: it has a class that the model does not have.
    """
    if source.classes == list(classes):
        return source
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(source.classes)} classes of the images are none of the model's "
            f"{len(classes)}: {first_few(unknown)}"
        )
    logger.warning(f"the images are of {len(source.classes)} of the model's {len(classes)} classes")
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = np.array([number_of[name] for name in source.classes])
    return Subset(source, np.arange(len(source)), list(classes), numbers)


def some_of_each_class(source: Source, count: int, seed: int) -> Subset:
    """`count` samples of every class, drawn by `seed`; a greater count holds the same ones and more.

    Raises:
        ValueError: a class has fewer.
    """
    generator = np.random.default_rng(seed)
    labels, chosen = np.asarray(source.labels), []
    for number, name in enumerate(source.classes):
        own = generator.permutation(np.flatnonzero(labels == number))
        if len(own) < count:
            raise ValueError(f"--train_per_class {count}: the class {name} has {len(own)} images")
        chosen.append(own[:count])
    return Subset(source, np.sort(np.concatenate(chosen)))


def hold_out(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """A source in two: the larger part, and a `share` of it, drawn by `seed`.

    Raises:
        ValueError: nothing would be held out.
    """
    if not round(share * len(source)):
        raise ValueError(f"--held_out {share}: of {len(source)} images none would be held out; give a larger fraction")
    order = np.random.default_rng(seed).permutation(len(source))
    count = round(share * len(source))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))
