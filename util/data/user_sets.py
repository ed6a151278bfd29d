"""Datasets of the user's code: --dataset py:package.module:function, or `main(args, source=function)`."""

import contextlib
import inspect
import logging
import os
import secrets
import weakref
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from util.cli import entry_point
from util.cli.user_code import import_object
from util.data.decode import BadImage, Picture
from util.data.library_sets import LibrarySet
from util.data.sources import version_of
from util.files.untrusted import printable, read_file

logger = logging.getLogger(__name__)

PREFIX = "py:"
_SETS: "weakref.WeakSet[UserSet]" = weakref.WeakSet()  # of this process
OpenDataset = Callable[[str, str | None], Any]  # split ("train" or "val"), data_path -> a map-style dataset


def _close_all() -> None:
    for one in list(_SETS):
        one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_all)


def with_source(args: Namespace, source: OpenDataset | None) -> Namespace:
    """Records the name of the function `source` in the settings of a run as --dataset.

    Raises:
        ValueError: the settings have a different dataset.
    """
    if source is None:
        return args
    named = source if hasattr(source, "__qualname__") else type(source)
    name = f"{PREFIX}{named.__module__}:{named.__qualname__}"
    if args.dataset not in (None, name):
        raise ValueError(f"--dataset {args.dataset} and source={name} exclude each other; give one of them")
    return entry_point.changed(args, {"dataset": name})


class UserSet(LibrarySet):
    """A map-style dataset of the user's code.

    The function is called in every process that reads samples, and before a fork, the dataset is deleted: its open
    files do not have to survive a fork. Items are (image, label), (image, label, extras), or a dict with the keys image
    and label. An image is a path, the bytes of an image file, a Pillow image, an array as `decode` takes it, or a
    tensor (c, H, W). A label is a number, or None.
    Optional attributes of the dataset: `classes`, `labels`, `name(index)`, `version(index)`.

    Args:
        function: returns the dataset of a split.
        split: "train" or "val".
        title: the value of --dataset.
        read_label: converts the label of an item. Default: a class number.

    Raises:
        ValueError: the function does not return a dataset, or its labels are not numbers of its classes.
    """

    def __init__(
        self, function: OpenDataset | None, split: str, data_path: str | None, title: str,
        read_label: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.title, self.data_path = f"{title} {split}", data_path
        self.flag = f"--dataset {title}"
        self.function = function or import_object(f"--dataset {PREFIX}", title.removeprefix(PREFIX))
        self.split = split
        self.read_label = read_label or self._class_number
        self.opened: Any = self._open()  # the dataset; None before the next access
        self.count = len(self.opened)
        self.start = secrets.token_hex(8)
        _SETS.add(self)
        if not self.count:
            raise ValueError(f"{self.flag}: the dataset of the split {split} is empty")
        with contextlib.suppress(OSError, BadImage):  # the script reports it when it reads the sample
            if self._parts(0)[2]:
                logger.warning(f"{self.title}: the extras of its samples have no effect yet")

    @property
    def images(self) -> Any:
        """The dataset of this process."""
        if self.opened is None:
            self.opened = self._open()
            if len(self.opened) != self.count:
                raise ValueError(
                    f"{self.flag}: the split {self.split} had {self.count} samples, and has {len(self.opened)} when it "
                    f"is opened again: return the same dataset in each process"
                )
        return self.opened

    def close(self) -> None:
        """Deletes the dataset. The next access opens it again."""
        self.opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None}

    def _open(self) -> Any:
        if not callable(self.function):
            raise ValueError(f"{self.flag} is a {type(self.function).__name__}: give a function(split, data_path)")
        try:
            inspect.signature(self.function).bind(self.split, self.data_path)
        except TypeError as error:
            raise ValueError(f"{self.flag}: it is called with (split, data_path), and takes others: {error}") from error
        images = self.function(self.split, self.data_path)
        if not (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
            raise ValueError(
                f"{self.flag} returned a {type(images).__name__}: return a dataset with __len__ and __getitem__"
            )
        return images

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[bytes | Picture | np.ndarray, Any]:
        image, label, _ = self._parts(index)
        number = self.read_label(label)
        if self.read_label == self._class_number and self._listed is not None and number != self._listed[index]:
            raise ValueError(f"{self.name(index)}: its label is {number}, and labels[{index}] is {self._listed[index]}")
        return read_file(image) if isinstance(image, str | Path) else image, number

    def _parts(self, index: int) -> tuple[Any, Any, Any]:
        """Returns the image, the label and the extras of an item."""
        item = self.images[index]
        if isinstance(item, Mapping) and "image" in item:
            item = (item["image"], item.get("label"), item.keys() - {"image", "label"})
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise ValueError(
                f"{self.name(index)} is a {type(item).__name__}: return (image, label), (image, label, extras), or a "
                f"dict with the keys image and label"
            )
        return item[0], item[1], item[2] if len(item) == 3 else None

    def _class_number(self, label: Any) -> int:
        value = -1 if label is None else np.asarray(label)
        if np.ndim(value) or np.asarray(value).dtype.kind not in "iub":
            kind = f"array of shape {np.shape(value)}" if np.ndim(value) else f"{type(label).__name__} {label}"
            raise ValueError(f"{self.flag}: a label is the {printable(str(kind))}: give the number of a class, or None")
        return int(value)

    @cached_property
    def _listed(self) -> np.ndarray | None:
        """The attribute `labels` of the dataset, (n,)."""
        listed = getattr(self.images, "labels", None)
        if listed is None:
            return None
        labels = np.asarray(listed.cpu() if isinstance(listed, Tensor) else listed)
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.flag}: its labels are {labels.dtype} of shape {labels.shape}: give {self.count} class numbers"
            )
        return labels.astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all samples, (n,). If the dataset does not list them, all samples are read once."""
        if self._listed is not None:
            return self._listed
        logger.info(f"{self.title} has no attribute labels: reading all {self.count:,} samples to collect them")
        return np.array([self._label(index) for index in range(self.count)])

    def _label(self, index: int) -> int:
        try:
            return self._class_number(self._parts(index)[1])
        except (BadImage, OSError) as error:
            raise ValueError(f"{self.name(index)}: {error}; the dataset needs the attribute labels") from error

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes; default: their numbers. Empty if no sample has a label."""
        count = int(self.labels.max()) + 1
        names = getattr(self.images, "classes", None)
        names = list(map(str, range(count) if names is None else names))
        if count > len(names):
            raise ValueError(f"{self.flag}: a label is {count - 1}, and there are {len(names)} classes")
        return names

    def name(self, index: int) -> str:
        """Returns `name(index)` of the dataset; default: its name and the number of the sample."""
        own = getattr(self.images, "name", None)
        return printable(str(own(index))) if callable(own) else super().name(index)

    def version(self, index: int) -> str:
        """Returns `version(index)` of the dataset; default: the version of the files in `data_path` and of the code."""
        own = getattr(self.images, "version", None)
        return str(own(index)) if callable(own) else self.files_version

    @cached_property
    def files_version(self) -> str:
        """Without `data_path`, it is new for each start: changed images can't be noticed."""
        code = version_of(inspect.getsourcefile(inspect.unwrap(self.function)) or "")
        return f"{code} {version_of(self.data_path) if self.data_path else self.start}"
