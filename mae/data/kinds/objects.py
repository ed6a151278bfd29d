"""Datasets of the user's code: --dataset py:package.module:function, or `main(args, source=function)`."""

import contextlib
import logging
import operator
import os
import secrets
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.data import decode, extra_inputs
from mae.data.decode import MAX_BAD_IN_A_ROW
from mae.data.generators import preserve_generators, seed_generators
from mae.data.item import Item
from mae.data.pixels import BadImage, size_of
from mae.data.source import NumberedItems, OpenDataset, first_few, version_of
from mae.files.untrusted import printable, read_file
from mae.user_code import DATASET, call, import_object

logger = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000  # without names: their names are those of all numbers


class UserSet(NumberedItems):
    """A map-style dataset of the user's code.

    Every process that reads samples calls the function, with the same random numbers for each call and each split. Open
    files therefore do not have to survive a fork.

    Items are (image, label), (image, label, inputs), or a dict with the keys image, label and valid (booleans (H, W),
    True for valid pixels; default: all). Inputs are a dict of numbers, arrays or tensors, equal in names and shapes for
    all items: inputs of the model besides the image. In a dict, they are the other keys. Inputs that the attribute
    `maps` of the dataset names are maps of the image (H, W), which follow its crops and flips.
    An image is a path, the bytes of an image file, a Pillow image, an array as `decode` takes it, or a tensor
    (c, H, W). A label is the number of a class, or None. Optional attributes of the dataset: `classes`, `labels`,
    `maps`, `name(index)`, `version(index)`.

    Args:
        function: returns the dataset of a split. None: it is imported.
        split: "train" or "val".
        data_path: the second argument of the function.
        name: the value of --dataset.
        reads_labels: else all labels are -1, and none is checked.

    Raises:
        ValueError: the function does not exist, or the dataset is empty.
        OSError: the function can't read a file.
        RuntimeError: as in `user_code.call`.
    """

    runs_code = True

    def __init__(
        self, function: OpenDataset | None, split: str, data_path: str | None, name: str, reads_labels: bool = True
    ) -> None:
        self.reads_labels = reads_labels
        self.title = f"{name.removeprefix(DATASET)} ({split})"
        self.setting = f"dataset={name}"
        self.split = split
        self.data_path = data_path
        self.function = function or import_object(f"dataset={DATASET}", name.removeprefix(DATASET))
        self.opened = self._open()
        self.process = os.getpid()
        self.count = len(self.opened)
        self.maps = tuple(getattr(self.opened, "maps", ()))
        self.start = secrets.token_hex(8)
        if not self.count:
            raise ValueError(f"{self.setting}: the dataset of the split {split} is empty")

    @property
    def dataset(self) -> Any:
        """The dataset of this process. A worker process opens its own."""
        if self.process != os.getpid():
            # closes the files that a fork has copied
            self.opened = None
            self.process = os.getpid()
            self.opened = self._open()
            if len(self.opened) != self.count:
                raise ValueError(
                    f"{self.setting}: the dataset of the split {self.split} had {self.count} samples, and has "
                    f"{len(self.opened)} when it is opened again: return the same dataset in each process"
                )
        return self.opened

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None, "process": None}

    def _open(self) -> Any:
        with preserve_generators():
            seed_generators(0)
            return call(self.setting, self.function, self.split, self.data_path, expected=BadImage)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        item = self._read(index)
        inputs = self._inputs(index, item.inputs)
        if shapes_of(inputs) != self.input_shapes:
            raise ValueError(
                f"{self.describe(index)}: its inputs have the shapes {shapes_of(inputs)}, and those of the first item "
                f"{self.input_shapes}: give the same for each item"
            )
        valid = self._valid(index, item.valid)
        return Item(self._image(index, item.image), self.label_of(index, item.label), valid, inputs)

    def describe(self, index: int) -> str:
        """Returns the item and the dataset, for messages."""
        return f"item {index} of {self.title}"

    def _read(self, index: int) -> Item:
        """Returns an item as the dataset returns it."""
        item = call(self.describe(index), operator.getitem, self.dataset, index, expected=BadImage)
        if isinstance(item, Mapping) and "image" in item:
            inputs = {name: value for name, value in item.items() if name not in ("image", "label", "valid")}
            return Item(item["image"], item.get("label"), item.get("valid"), inputs)
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise ValueError(
                f"{self.describe(index)} is {_kind(item)}: return (image, label), (image, label, inputs), or a "
                f"dict with the keys image and label"
            )
        image, label = item[:2]
        return Item(image, label, inputs=(item[2] if len(item) == 3 else None) or {})

    def _image(self, index: int, image: Any) -> Any:
        if isinstance(image, str | Path):
            return read_named(image)
        if isinstance(image, bytearray | memoryview):
            return bytes(image)
        if not isinstance(image, bytes | np.ndarray | Tensor | Image.Image):
            raise ValueError(f"{self.describe(index)}: its image is {_kind(image)}")
        return image

    def _valid(self, index: int, valid: Any) -> Tensor | None:
        if valid is None:
            return None
        pixels = torch.as_tensor(valid)
        if pixels.is_floating_point():
            raise ValueError(f"{self.describe(index)}: valid is {pixels.dtype}: give booleans, True for valid pixels")
        return pixels != 0

    def _inputs(self, index: int, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the inputs of an item as tensors, of which maps have the type that follows the crops.

        Raises:
            ValueError: an input is no number, or can't have its name.
        """
        tensors = {}
        for name, value in inputs.items():
            try:
                extra_inputs.check_name(name)
                tensors[str(name)] = extra_inputs.to_tensor(value)
            except ValueError as error:
                raise ValueError(f"{self.describe(index)}: its {name} ({_kind(value)}): {error}") from error
        for name in self.maps:
            from torchvision import tv_tensors  # takes more than a second

            if name not in tensors or tensors[name].ndim != 2:
                shape = tuple(tensors[name].shape) if name in tensors else "none"
                raise ValueError(f"{self.describe(index)}: its map {name} has the shape {shape}: give (H, W)")
            tensors[name] = tv_tensors.Image(tensors[name])
        return tensors

    @cached_property
    def input_shapes(self) -> dict[str, str]:
        """Names and shapes of the inputs of the first item that can be read."""
        with preserve_generators():
            for index in range(min(self.count, MAX_BAD_IN_A_ROW)):
                with contextlib.suppress(OSError, BadImage):  # the script reports it when it reads the item
                    item = self._read(index)
                    inputs = self._inputs(index, item.inputs)
                    self._warn_of_maps(self._image(index, item.image), inputs)
                    return shapes_of(inputs)
        return {}

    def _warn_of_maps(self, image: Any, inputs: Mapping[str, Tensor]) -> None:
        """Logs a warning if an input has the size of the image, and is not declared as a map."""
        sizes = _sizes_of(image) if any(value.ndim > 1 for value in inputs.values()) else set()
        for name, value in inputs.items():
            shape = tuple(value.shape)
            if name not in self.maps and len(shape) > 1 and not sizes.isdisjoint((shape[:2], shape[-2:])):
                logger.warning(
                    f"{self.setting}: its input {name} has the size of the image, and does not follow its crops and "
                    f"flips: name it in the attribute maps of the dataset, such as maps = ({name!r},), or make it a "
                    f"channel of the image"
                )

    def label_of(self, index: int, label: Any) -> Any:
        """Returns the label of an item, converted to the number of a class; -1 for None.

        It is also -1 for vectors and floats. Pre-training does not use them, and `labels` refuses them.

        Raises:
            ValueError: the label differs from the attribute `labels`, or from the label that `labels` has read.
        """
        if not self.reads_labels:
            return -1
        value = np.asarray(-1 if label is None else label)
        if self._listed is not None and not self._are_classes(self._listed):
            return -1
        if value.ndim or value.dtype.kind not in "iub":
            if self._listed is not None:
                raise ValueError(
                    f"{self.describe(index)}: its label is {printable(str(label))[:80]}, and no class number"
                )
            return -1
        self._require_known(index, value.astype(np.int64))
        return int(value)

    def _require_known(self, index: int, label: np.ndarray) -> None:
        """Raises ValueError if a label differs from the attribute `labels`, or from the label that was read before.

        They are compared in the precision of the label.
        """
        known = self._listed
        remedy = ""
        if known is None and "labels" in vars(self) and (self.labels.ndim > 1 or self.labels[index] != -1):
            known = self.labels
            remedy = ": return the same dataset in each process"
        if known is not None and not np.array_equal(label, known[index].astype(label.dtype)):
            raise ValueError(
                f"{self.describe(index)}: its label is {label}, and labels[{index}] is {known[index]}{remedy}"
            )

    @cached_property
    def _listed(self) -> np.ndarray | None:
        """The attribute `labels` of the dataset, (n,) if it has class numbers."""
        listed = getattr(self.dataset, "labels", None)
        if listed is None:
            return None
        labels = np.asarray(listed.cpu() if isinstance(listed, Tensor) else listed)
        return labels.astype(np.int64) if self._are_classes(labels) else labels

    def _are_classes(self, labels: np.ndarray) -> bool:
        return labels.shape == (self.count,) and labels.dtype.kind in "iu"

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all samples, (n,). If the dataset does not list them, all samples are read once."""
        if not self.reads_labels:
            return np.full(len(self), -1)
        if self._listed is not None:
            if not self._are_classes(self._listed):
                raise ValueError(
                    f"{self.setting}: its labels are {self._listed.dtype} of shape {self._listed.shape}: give "
                    f"{self.count} class numbers"
                )
            return self._listed
        logger.info(f"{self.title} has no attribute labels: reading all {self.count:,} samples to collect them")
        labels = np.full(len(self), -1)
        unreadable = list[str]()
        for index in range(len(self)):
            try:
                labels[index] = self._class_of(index, self._read(index).label)
            except (BadImage, OSError) as error:
                unreadable.append(f"{self.name(index)} ({error})")
        if unreadable:
            logger.warning(
                f"{first_few(unreadable)} can't be read, and without the attribute labels of the dataset, they have "
                f"no label"
            )
        return labels

    def _class_of(self, index: int, label: Any) -> int:
        """Returns the class of a label, -1 for None. Raises ValueError if the label is no number of a class."""
        value = np.asarray(-1 if label is None else label)
        if value.ndim or value.dtype.kind not in "iub":
            kind = f"an array of shape {value.shape}" if value.ndim else f"the {type(label).__name__} {label}"
            raise ValueError(
                f"{self.describe(index)}: its label is {printable(kind)}: give a class number, or None (vectors "
                f"and numbers are for main_finetune.py `task`)"
            )
        return int(value)

    @property
    def has_ids(self) -> bool:
        """As in `Source`."""
        return getattr(self.dataset, "classes", None) is None

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes or targets; default: their numbers. Empty if no sample has a label."""
        are_vectors = self.labels.ndim > 1
        given = getattr(self.dataset, "classes", None)
        count = self.labels.shape[1] if are_vectors else int(self.labels.max()) + 1
        if given is None and count > MOST_CLASSES:
            raise ValueError(f"{self.setting}: its highest label is {count - 1}: number the classes from 0")
        names = list(map(str, range(count) if given is None else given))
        lacks_names = count > len(names) or (are_vectors and count < len(names)) or isinstance(given, str)
        if lacks_names or len(set(names)) < len(names):
            labels = f"labels have {count} numbers" if are_vectors else f"highest label is {count - 1}"
            raise ValueError(
                f"{self.setting}: its classes are {len(names)} names, {len(set(names))} of them different, and its "
                f"{labels}: give one name for each"
            )
        return names

    def name(self, index: int) -> str:
        """Returns `name(index)` of the dataset; default: the number of the item and the name of the dataset."""
        name = getattr(self.dataset, "name", None)
        return printable(str(name(index))) if callable(name) else self.describe(index)

    def file_names(self) -> list[list[bytes]]:
        """As in `Source`: the names that the dataset gives."""
        name = getattr(self.dataset, "name", None)
        return [[os.fsencode(str(name(index))) for index in range(len(self))]] if callable(name) else []

    def version(self, index: int) -> str:
        """Returns `version(index)` of the dataset; default: the version of the files in `data_path` and of the code."""
        version = getattr(self.dataset, "version", None)
        return str(version(index)) if callable(version) else self.files_version

    @cached_property
    def files_version(self) -> str:
        """The version of `data_path` and of the code. Without `data_path`, it is new for each start."""
        modules = {getattr(one, "__module__", "") for one in (self.function, type(self.dataset))}
        files = sorted(getattr(sys.modules.get(name), "__file__", None) or "" for name in modules)
        code = " ".join(version_of(file) for file in files if file)
        if self.data_path:
            return f"{code} {version_of(self.data_path)}"
        logger.warning(
            f"{self.setting} has neither `data_path` nor version(index), which would show whether its samples have "
            f"changed: a resumed run computes stored features again"
        )
        return f"{code} {self.start}"


def shapes_of(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the names and shapes of the inputs of an item. A map has the size of its image."""
    return {
        name: str(tuple(value.shape)) if type(value) is Tensor else "(H, W)" for name, value in inputs.items()
    }  # fmt: skip


def _sizes_of(image: Any) -> set[tuple[int, ...]]:
    """Returns the (height, width) that an image may have: the model determines which axis of an array has channels."""
    with contextlib.suppress(Exception):  # decoders raise any exception; the script reports it when it reads the image
        picture: Any = decode.read(image, 3) if isinstance(image, bytes) else image
        if isinstance(picture, Image.Image):
            return {size_of(picture)}
        return {tuple(picture.shape[:2]), tuple(picture.shape[-2:])}
    return set()


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def read_named(path: str | Path) -> bytes:
    """Reads a file that an item of a dataset names.

    Raises:
        BadImage: the file can't be read; the message has its path.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise BadImage(f"{printable(str(path))}: {error.strerror or error}") from error
