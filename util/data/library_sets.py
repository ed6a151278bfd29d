"""Datasets of libraries: of torchvision, chosen by the name of their class, and map-style datasets of Hugging Face."""

import inspect
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from util import dist
from util.cli.advice import AdvisedError, Remedy, did_you_mean
from util.data.decode import BadImage, Picture
from util.data.sources import VALIDATION, names_of, version_of
from util.files.untrusted import read_file

logger = logging.getLogger(__name__)

# The folders or files that torchvision makes in the folder of a dataset, for a hint to those who give this folder.
LAYOUTS = {
    "cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100", "stl10_binary": "STL10",
    "MNIST/raw": "MNIST", "FashionMNIST/raw": "FashionMNIST", "KMNIST/raw": "KMNIST", "train_32x32.mat": "SVHN",
    "flowers-102/jpg": "Flowers102", "food-101/images": "Food101", "oxford-iiit-pet/images": "OxfordIIITPet",
    "dtd/dtd": "DTD", "fgvc-aircraft-2013b/data": "FGVCAircraft", "eurosat/2750": "EuroSAT", "gtsrb/GTSRB": "GTSRB",
    "caltech101/101_ObjectCategories": "Caltech101", "SUN397/ClassName.txt": "SUN397",
}  # fmt: skip


def dataset_in(root: Path) -> tuple[str, Path] | None:
    """Returns name and folder of a dataset that torchvision stored in a folder or the folder above, if any."""
    for folder in (root, root.parent):
        for entry, name in LAYOUTS.items():
            if (folder / entry).exists() and (folder == root or root.name == Path(entry).parts[0]):
                return name, folder
    return None


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
        ValueError: the class or split does not exist, `root` is missing, or torchvision can't open the files.
    """

    def __init__(self, name: str, split: str, root: str | None, download: bool) -> None:
        import torchvision  # takes more than a second

        self.title, self.root = name, root
        name, _, part = name.partition(":")
        make = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(make):
            near = did_you_mean(name, torchvision.datasets.__all__) or " (CIFAR10, Flowers102, ...)"
            raise ValueError(f"--dataset {name}: torchvision has no dataset of this name{near}")
        takes = _parameters(make)
        arguments: dict[str, Any] = {}
        if "root" in takes:
            if not root:
                raise ValueError(
                    f"--dataset {name} needs --data_path: the folder with its files, or for its files with --download"
                )
            arguments["root"] = root
        if "small" in takes and any(Path(arguments["root"]).glob("*_256*")):  # Places365 of 256 pixels
            arguments["small"] = True
        if "loader" in takes:
            arguments["loader"] = read_file  # returns bytes, which our own decoder decodes
        parts = self._parts(make, takes, split, part)
        if dist.is_main() and download and "download" in takes:
            self._open(make, arguments | {"download": True}, parts)
        dist.barrier()
        self.images = self._open(make, arguments, parts)
        listed = _listed_labels(self.images)
        self.classes = _class_names(self.images, listed)
        self.has_ids = bool(self.classes) and not _own_names(self.images)
        self._labels = listed if self.classes else np.full(len(self), -1)

    @property
    def labels(self) -> np.ndarray:
        """Returns the labels of all samples, (n,). If the dataset does not list them, all samples are read once."""
        if self._labels is None:
            logger.info(f"{self.title} does not list its labels: reading all {len(self):,} samples to collect them")
            self._labels = np.array([self[index][1] for index in range(len(self))])
        return self._labels

    def _parts(self, make: type, takes: Any, split: str, part: str) -> list[dict[str, Any]]:
        """Returns candidate arguments that select a split. The first that the class accepts is used."""
        chooser = next((name for name in ("split", "version", "image_set") if name in takes), None)
        if part and not chooser:
            raise ValueError(f"--dataset {self.title}: {make.__name__} has no splits of its own")
        own = {chooser: part} if chooser and part else {}
        if "train" in takes and split in ("train", *VALIDATION):
            return [own | {"train": split == "train"}]
        if split == "train":  # "train" first, because the default split may include the images of "val"
            return [own] if own or not chooser else [{chooser: "train"}, {}]
        if not chooser or (own and chooser == "version"):
            raise AdvisedError(
                f"torchvision has no {split} split of it", Remedy({"val_list": "FILE"}), about={"dataset": self.title}
            )
        return [{chooser: name} for name in names_of(split)]

    def _open(self, make: type, arguments: dict[str, Any], parts: list[dict[str, Any]]) -> Any:
        for part in parts:
            try:
                return make(**arguments, **part)
            except Exception as error:  # classes raise any exception for missing files
                if isinstance(error, ValueError) and part is not parts[-1]:
                    continue  # the class has no such split
                raise ValueError(
                    f"--dataset {self.title}: torchvision reports: {' '.join(str(error).split())} (--data_path is the "
                    f"folder with the files, and --download downloads them to it)"
                ) from error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes | Picture, int]:
        try:
            image, label = self.images[index][:2]
        except OSError:
            raise
        except Exception as error:
            raise BadImage(f"torchvision can't read it ({type(error).__name__}: {error})") from error
        return image, int(label) if isinstance(label, (int, np.integer)) and self.classes else -1

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
        if listed is not None and len(listed) == len(images) and np.asarray(listed).dtype.kind in "iu":
            return np.asarray(listed).reshape(len(images), -1)[:, 0].astype(np.int64)
    return None


def _class_names(images: Any, listed: np.ndarray | None) -> list[str]:
    return _own_names(images) or ([] if listed is None else [str(n) for n in range(int(listed.max()) + 1)])


def _own_names(images: Any) -> list[str]:
    """Returns the names of the classes that a dataset of torchvision has."""
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(images, attribute, None)
        if isinstance(names, (list, tuple)) and names:
            return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    return []


class HuggingFaceSet(LibrarySet):
    """A map-style dataset of Hugging Face.

    Args:
        name: its name on the hub, or a folder of Parquet files, of images, or written by `save_to_disk`.
        split: "train" or "val".

    Raises:
        ValueError: the package `datasets` is not installed or can't open the dataset, or the dataset has no such split
            or no column of images.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError('--dataset hf: needs the package datasets: pip install ".[hf]"') from error
        self.title = f"hf:{name}"
        if not name:
            raise ValueError("--dataset hf: give hf:NAME or hf:FOLDER")
        if dist.is_main():
            self._load(datasets, name)  # the other processes use the prepared files
        dist.barrier()
        parts = self._load(datasets, name)
        available = [part for part in names_of(split) if part in parts]
        if not available:
            raise ValueError(f"--dataset {self.title}: it has no {split} split, only {', '.join(parts)}")
        table = parts[available[0]]
        features = table.features
        image = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"--dataset {self.title}: no column contains images: {', '.join(map(str, features))}")
        label = next((c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        self.classes = list(features[label].names) if label else []
        self.labels = np.array([-1 if n is None else n for n in table[label]] if label else [-1] * len(table))
        self.table = table.select_columns([image, *([label] if label else [])])
        self.table = self.table.cast_column(image, datasets.Image(decode=False))
        self.image, self.label = image, label

    def _load(self, datasets: Any, name: str) -> Any:
        try:
            if (Path(name) / "dataset_dict.json").exists():
                return datasets.load_from_disk(name)
            if (Path(name) / "dataset_info.json").exists() and (Path(name) / "state.json").exists():
                return {"train": datasets.load_from_disk(name)}
            return datasets.load_dataset(name)
        except Exception as error:  # the library raises any exception for files that it can't read
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ValueError(f"--dataset {self.title}: {reason}") from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self.table[index]
        image, label = row[self.image], row[self.label] if self.label else -1
        if image is None:
            raise BadImage("this row has no image")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return data, -1 if label is None else label

    @cached_property
    def files_version(self) -> str:  # of the prepared files; the library prepares a changed dataset anew
        files = [file["filename"] for file in self.table.cache_files]
        return " ".join(f"{file} {version_of(file)}" for file in files)
