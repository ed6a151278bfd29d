"""Datasets of libraries: of torchvision, chosen by the name of their class, and map-style datasets of Hugging Face."""

import inspect
import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.data.decode import BadImage
from mae.data.item import Item
from mae.data.kinds.lists import LABEL_COLUMNS, are_ids, number_labels
from mae.data.source import VALIDATION, first_few, names_of, version_of
from mae.files.untrusted import read_file

logger = logging.getLogger(__name__)

LABELS = (*LABEL_COLUMNS, "labels")  # names of columns of Hugging Face in which integers and texts are labels
PLAIN_TYPES = re.compile(r"u?int\d+|bool|(large_)?string")


class LibrarySet:
    """The names of the samples of a library, and the version of its files."""

    title: str
    files_version: Any  # a cached property; of files that are read at once, an attribute that is set before

    def name(self, index: int) -> str:
        """Returns the name of the dataset and the number of the sample."""
        return f"{self.title}[{index}]"

    def version(self, index: int) -> str:
        """Returns the version of all files."""
        return self.files_version


class TorchvisionSet(LibrarySet):
    """A dataset of torchvision.

    Args:
        name: the name of its class, such as CIFAR10, or CLASS:SPLIT for a split or version of the class
            (STL10:unlabeled, INaturalist:2018).
        split: "train" or "val". Ignored for the training set if `name` has a split.
        root: the folder with the files of the dataset.
        download: download missing files to `root`.

    Raises:
        ValueError: the class or split does not exist, or torchvision can't open the files.
    """

    def __init__(self, name: str, split: str, root: str | None, download: bool) -> None:
        import torchvision  # takes more than a second

        self.title, self.root = name, root
        name, _, part = name.partition(":")
        make = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(make):
            raise ValueError(f"dataset={name}: torchvision has no dataset of this name, such as CIFAR10")
        takes = _parameters(make)
        arguments: dict[str, Any] = {"root": root} if root and "root" in takes else {}
        if "small" in takes and root and any(Path(root).glob("*_256*")):  # Places365 of 256 pixels
            arguments["small"] = True
        if "loader" in takes:
            arguments["loader"] = read_file  # returns bytes, which our own decoder decodes
        parts = self._parts(make, takes, split, part)
        if parallel.is_main() and download and "download" in takes:
            self._open(make, arguments | {"download": True}, parts)
        parallel.barrier()
        self.images = self._open(make, arguments, parts)
        listed = _listed_labels(self.images)
        self.classes = _class_names(self.images, listed)
        self.has_ids = bool(self.classes) and not _listed_names(self.images)
        self._labels = listed if self.classes else np.full(len(self), -1)

    @property
    def labels(self) -> np.ndarray:
        """Returns the labels of all samples, (n,). If the dataset does not list them, all samples are read once."""
        if self._labels is None:
            logger.info(f"{self.title} does not list its labels: reading all {len(self):,} samples to collect them")
            self._labels = np.array([self[index].label for index in range(len(self))])
        return self._labels

    def _parts(self, make: type, takes: Any, split: str, part: str) -> list[dict[str, Any]]:
        """Returns candidate arguments that select a split. The first that the class accepts is used."""
        chooser = next((name for name in ("split", "version", "image_set") if name in takes), None)
        if part and not chooser:
            raise ValueError(f"dataset={self.title}: {make.__name__} has no splits of its own")
        own = {chooser: part} if chooser and part else {}
        if "train" in takes and split in ("train", *VALIDATION):
            return [own | {"train": split == "train"}]
        if split == "train":  # "train" first, because the default split may include the images of "val"
            return [own] if own or not chooser else [{chooser: "train"}, {}]
        if not chooser or (own and chooser == "version"):
            raise ValueError(f"dataset={self.title}: torchvision has no {split} split of it: give val_list=FILE")
        return [{chooser: name} for name in names_of(split)]

    def _open(self, make: type, arguments: dict[str, Any], parts: list[dict[str, Any]]) -> Any:
        for part in parts:
            try:
                images = make(**arguments, **part)
            except Exception as error:  # classes raise any exception for missing files
                if isinstance(error, ValueError) and part is not parts[-1]:
                    continue  # the class has no such split
                raise ValueError(
                    f"dataset={self.title}: torchvision reports: {' '.join(str(error).split())} (`data_path` is the "
                    f"folder with the files, and `download` downloads them to it)"
                ) from error
            if part is not parts[0]:
                used = ", ".join(part.values()) or "default split"
                logger.info(f"{self.title}: it has no split {', '.join(parts[0].values())}; its {used} is used")
            return images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        try:
            image, label = self.images[index][:2]
        except OSError:
            raise
        except Exception as error:
            raise BadImage(f"torchvision can't read it ({type(error).__name__}: {error})") from error
        return Item(image, int(label) if isinstance(label, (int, np.integer)) and self.classes else -1)

    @cached_property
    def files_version(self) -> str:
        return version_of(self.root) if self.root else ""


def _parameters(make: type) -> set[str]:
    """Returns the parameters of a class, including those that it passes to its base classes."""
    names: set[str] = set()
    for base in make.__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _listed_labels(images: Any) -> np.ndarray | None:
    """Returns the labels that a dataset of torchvision lists, if they are one integer per sample."""
    for attribute in ("targets", "labels", "_labels"):
        listed = getattr(images, attribute, None)
        numbers = np.asarray([] if listed is None else listed)
        if numbers.size == len(images) and numbers.dtype.kind in "iu":
            return numbers.reshape(-1).astype(np.int64)
    return None


def _class_names(images: Any, listed: np.ndarray | None) -> list[str]:
    return _listed_names(images) or ([] if listed is None else [str(n) for n in range(int(listed.max()) + 1)])


def _listed_names(images: Any) -> list[str]:
    """Returns the names of the classes that a dataset of torchvision has."""
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(images, attribute, None)
        if isinstance(names, (list, tuple)) and names:
            return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    return []


class HuggingFaceSet(LibrarySet):
    """A map-style dataset of Hugging Face.

    The columns of images and labels are logged. Labels are class labels, integers or texts. A column of integers or
    texts has the name of a label, or is given, because it may be an id. Without a label, samples can pre-train.

    Args:
        name: its name on the hub, or a folder of Parquet files, of images, or written by `save_to_disk`; optionally
            with the columns: NAME#IMAGE or NAME#IMAGE,LABEL.
        split: "train" or "val".

    Attributes:
        no_labels: why the columns that may be the labels are not read, with the remedy; "" if there are none.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: the package can't open the dataset, or it has no such split or column, or several columns of images.
    """

    def __init__(self, name: str, split: str) -> None:
        import datasets  # pip install ".[hf]"

        self.title = f"hf:{name}"
        self.path, _, columns = (name, "", "") if Path(name).exists() else name.partition("#")
        if parallel.is_main():
            self._load(datasets)  # the other processes use the prepared files
        parallel.barrier()
        parts = self._load(datasets)
        available = [part for part in names_of(split) if part in parts]
        if not available:
            raise ValueError(f"dataset={self.title}: it has no {split} split, only {', '.join(parts)}")
        table = parts[available[0]]
        image, _, label = columns.partition(",")
        self.image = self._image_column(datasets, table.features, image)
        self.label, self.no_labels = self._label_column(datasets, table.features, label)
        self.table = table.select_columns([self.image, *([self.label] if self.label else [])])
        self.table = self.table.cast_column(self.image, datasets.Image(decode=False))
        names = getattr(table.features.get(self.label), "names", None)  # of class labels, whose numbers count outputs
        try:
            self.classes, self.labels = self._read_labels(names)
        except ValueError as error:  # pre-training needs no labels
            self.classes, self.labels = [], np.full(len(self), -1)
            self.no_labels = f"the column {self.label} is not read: {error}"
        self.has_ids = names is None and are_ids(self.classes)
        labels = self.no_labels or (f"labels of the column {self.label}" if self.label else "no labels")
        logger.info(f"{self.title}: split {available[0]}, images of the column {self.image}, {labels}")

    def _image_column(self, datasets: Any, features: Mapping[str, Any], given: str) -> str:
        """Returns the column of the images.

        Raises:
            ValueError: the given column has no images, or none is given and not exactly one has.
        """
        found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        if given in found or (not given and len(found) == 1):
            return given or found[0]
        columns = first_few(found) or "none"
        raise ValueError(f"dataset={self.title}: give hf:{self.path}#NAME with one of its columns of images: {columns}")

    def _label_column(self, datasets: Any, features: Mapping[str, Any], given: str) -> tuple[str, str]:
        """Returns the column of the labels, or "" and the value of `no_labels`.

        Raises:
            ValueError: the given column can't be labels.
        """
        found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [
            column
            for column, kind in features.items()
            if isinstance(kind, datasets.Value) and PLAIN_TYPES.fullmatch(kind.dtype)
        ]
        likely = found + [column for column in plain if column.lower() in LABELS]
        remedy = f"give hf:{self.path}#{self.image},NAME with one of the columns {first_few(likely or plain)}"
        if given and given not in found + plain:
            raise ValueError(f"dataset={self.title}: the column {given} contains no class labels; {remedy}")
        if given or len(likely) == 1:
            return given or likely[0], ""
        if likely:
            return "", f"several columns may be the labels; {remedy}"
        return "", f"no column is known to be the labels; {remedy}" if plain else ""

    def _load(self, datasets: Any) -> Any:
        name = self.path
        try:
            if (Path(name) / "dataset_dict.json").exists():
                return datasets.load_from_disk(name)
            if (Path(name) / "dataset_info.json").exists() and (Path(name) / "state.json").exists():
                return {"train": datasets.load_from_disk(name)}
            return datasets.load_dataset(name)
        except Exception as error:  # the library raises any exception for files that it can't read
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ValueError(f"dataset={self.title}: {reason}") from error

    def _read_labels(self, names: list[str] | None) -> tuple[list[str], np.ndarray]:
        """Returns the classes, and the labels (n,); -1 for rows without a label.

        Args:
            names: the names of class labels. None: labels are integers or texts.

        Raises:
            ValueError: the integers can't be numbers of classes.
        """
        labels = np.full(len(self), -1)
        values = self.table[self.label][:] if self.label else []
        if names is not None:
            labels[:] = [-1 if value is None else value for value in values]
            return names, labels
        known = [index for index, value in enumerate(values) if value not in (None, "", -1)]
        classes, labels[known] = number_labels([str(values[index]) for index in known], len(known))
        return classes, labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Item:
        image = self.table[index][self.image]
        if image is None:
            raise BadImage("this row has no image")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return Item(data, int(self.labels[index]))

    @cached_property
    def files_version(self) -> str:  # of the prepared files; the library prepares a changed dataset anew
        files = [file["filename"] for file in self.table.cache_files]
        return " ".join(f"{file} {version_of(file)}" for file in files)
