"""Map-style datasets of Hugging Face."""

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.data.item import Item
from mae.data.kinds.folders import NoValidation
from mae.data.kinds.lists import LABEL_COLUMNS, are_ids, number_labels
from mae.data.pixels import BadImage
from mae.data.source import NumberedItems, OpenDataset, Source, first_few, names_of, version_of
from mae.files.untrusted import read_file
from mae.settings import DataSpec

logger = logging.getLogger(__name__)

LABELS = (*LABEL_COLUMNS, "labels")  # names of columns of Hugging Face in which integers and texts are labels
PLAIN_TYPES = re.compile(r"u?int\d+|bool|(large_)?string")


class HuggingFaceSet(NumberedItems):
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
            kind = NoValidation if split == "val" and [*parts] == ["train"] else ValueError
            raise kind(f"dataset={self.title}: it has no {split} split, only {', '.join(parts)}")
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
            self.classes = []
            self.labels = np.full(len(self), -1)
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
        classes, labels[known] = number_labels([str(values[index]) for index in known])
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
    def paths(self) -> list[str | None]:
        """The file of each image that the prepared files only name; else None."""
        images = self.table.with_format("arrow")[:][self.image]  # of a mapped file: no bytes are read
        columns = dict(zip((field.name for field in images.type), images.flatten(), strict=True))
        are_named = columns["bytes"].is_null().to_pylist()
        return [path if named else None for path, named in zip(columns["path"].to_pylist(), are_named, strict=True)]

    def version(self, index: int) -> str:
        """Returns the version of the prepared files, and of the file of an image that they only name."""
        path = self.paths[index]
        return f"{self.files_version} {version_of(path)}" if path else self.files_version

    @cached_property
    def files_version(self) -> str:  # of the prepared files; the library prepares a changed dataset anew
        files = [file["filename"] for file in self.table.cache_files]
        return " ".join(f"{file} {version_of(file)}" for file in files)


def open_dataset(name: str, split: str, data: DataSpec, task: str | None, function: OpenDataset | None) -> Source:
    """Opens a dataset, as an entry of `mae.data.kinds.registry.KINDS`."""
    return HuggingFaceSet(name, split)
