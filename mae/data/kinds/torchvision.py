"""Datasets of torchvision, chosen by the name of their class."""

import inspect
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.data.item import Item
from mae.data.kinds.folders import SPLITS, NoValidation
from mae.data.pixels import BadImage
from mae.data.source import VALIDATION, NumberedItems, OpenDataset, Source, names_of, version_of
from mae.files.untrusted import read_file
from mae.settings import DataSpec

logger = logging.getLogger(__name__)

# Splits that contain images of others.
CONTAINED = {"trainval": ("val",), "all": VALIDATION, "10fold": VALIDATION}


class TorchvisionSet(NumberedItems):
    """A dataset of torchvision.

    Args:
        name: the name of its class, such as CIFAR10, or CLASS:SPLIT for a split or version of the class
            (STL10:unlabeled, INaturalist:2018).
        split: "train" or "val". Ignored for the training set if `name` has a split, and for the validation set if that
            split is one for validation. Otherwise, the validation set has none of its images.
        root: the folder with the files of the dataset.
        download: download missing files to `root`.

    Raises:
        ValueError: the class or split does not exist, or torchvision can't open the files.
    """

    def __init__(self, name: str, split: str, root: str | None, download: bool) -> None:
        import torchvision  # takes more than a second

        self.title = name
        self.root = root
        name, _, part = name.partition(":")
        self.is_validation = part in VALIDATION
        self.split = part if part in names_of(split) else split  # a part for validation is not replaced by another
        make = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(make):
            raise ValueError(f"dataset={name}: torchvision has no dataset of this name, such as CIFAR10")
        takes = _parameters(make)
        arguments: dict[str, Any] = {"root": root} if root and "root" in takes else {}
        if "small" in takes and root and any(Path(root).glob("*_256*")):  # Places365 of 256 pixels
            arguments["small"] = True
        if "loader" in takes:
            arguments["loader"] = read_file  # returns bytes, which our own decoder decodes
        parts = self._parts(make, takes, part)
        if parallel.is_main() and download and "download" in takes:
            self._open(make, arguments | {"download": True}, parts)
        parallel.barrier()
        self.images = self._open(make, arguments, parts)
        listed = _listed_labels(self.images)
        self.classes = _class_names(self.images, listed)
        if len(self.classes) > 1 and {name.lower() for name in self.classes} <= {"train", *SPLITS}:
            folders = ", ".join(self.classes)
            raise ValueError(f"dataset={self.title}: {folders} are splits, and no classes; omit `dataset`")
        self.has_ids = bool(self.classes) and not _listed_names(self.images)
        self._labels = listed if self.classes else np.full(len(self), -1)

    @property
    def labels(self) -> np.ndarray:
        """Returns the labels of all samples, (n,). If the dataset does not list them, all samples are read once."""
        if self._labels is None:
            logger.info(f"{self.title} does not list its labels: reading all {len(self):,} samples to collect them")
            self._labels = np.array([self[index].label for index in range(len(self))])
        return self._labels

    def _parts(self, make: type, takes: Any, part: str) -> list[dict[str, Any]]:
        """Returns candidate arguments that select a split. The first that the class accepts is used."""
        split = self.split
        chooser = next((name for name in ("split", "version", "image_set") if name in takes), None)
        if part and not chooser:
            raise ValueError(f"dataset={self.title}: {make.__name__} has no splits of its own")
        selected = {chooser: part} if chooser and part else {}
        if "train" in takes and split in ("train", *VALIDATION):
            return [selected | {"train": split == "train"}]
        if split in ("train", part):  # "train" first, because the default split may include the images of "val"
            return [selected] if selected or not chooser else [{chooser: "train"}, {}]
        others = [name for name in names_of(split) if name not in CONTAINED.get(part, ())]
        if not chooser or not others or (selected and chooser == "version"):
            raise self._no_validation()
        return [{chooser: name} for name in others]

    def _no_validation(self) -> NoValidation:
        name, _, part = self.title.partition(":")
        reason = f"of other images; give dataset={name}" if part in CONTAINED else "of it"
        return NoValidation(f"dataset={self.title}: torchvision has no {self.split} split {reason}")

    def _open(self, make: type, arguments: dict[str, Any], parts: list[dict[str, Any]]) -> Any:
        for part in parts:
            try:
                images = make(**arguments, **part)
            except Exception as error:  # classes raise any exception for missing files
                if isinstance(error, ValueError) and part is not parts[-1]:
                    continue  # the class has no such split
                if self.split == "val" and str(error).startswith("Unknown value"):
                    raise self._no_validation() from error
                raise ValueError(
                    f"dataset={self.title}: torchvision reports: {' '.join(str(error).split())} (`data_path` is the "
                    f"folder with the files, and `download` downloads them to it)"
                ) from error
            if len(parts) > 1 or ":" in self.title:
                used = ", ".join(f"{name}={value}" for name, value in part.items()) or "its default split"
                logger.info(f"{self.title}: the {self.split} images are those of {used}")
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
    def files_version(self) -> str:  # of all splits, whose samples have the same numbers
        return f"{self.split} {version_of(self.root)}" if self.root else self.split


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


def require_training(images: Any) -> None:
    """Raises ValueError if training images are a part for validation of a dataset, whose images validate, too."""
    if isinstance(images, TorchvisionSet) and images.is_validation:
        name = images.title.partition(":")[0]
        raise ValueError(f"dataset={images.title}: its images would train and validate; give dataset={name}")


def open_dataset(name: str, split: str, data: DataSpec, task: str | None, function: OpenDataset | None) -> Source:
    """Opens a dataset, as an entry of `mae.data.kinds.registry.KINDS`."""
    return TorchvisionSet(name, split, data.data_path, data.download)
