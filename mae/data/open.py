"""Opens a dataset of any kind. The module of a kind is imported when it is used."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mae import parallel
from mae.data.kinds.folders import NoValidation, check_split_names, find_files, no_split, warn_of_inner_splits
from mae.data.kinds.listing import Listing
from mae.data.kinds.registry import KINDS, kind_of
from mae.data.source import OpenDataset, Source, Stream
from mae.files.untrusted import printable
from mae.settings import DataSpec
from mae.settings.choices import CLASSIFICATION

if TYPE_CHECKING:
    from mae.data.segmentation_masks import MaskFormat

logger = logging.getLogger(__name__)

LISTS = (".csv", ".json", ".txt")
# Names of folders that are beside each other in datasets for segmentation, in lower case.
IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations")
# The folders or files that torchvision makes in the folder of a dataset, for a warning.
LAYOUTS = {
    "cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100", "stl10_binary": "STL10",
    "MNIST/raw": "MNIST", "FashionMNIST/raw": "FashionMNIST", "KMNIST/raw": "KMNIST", "train_32x32.mat": "SVHN",
    "flowers-102/jpg": "Flowers102", "food-101/images": "Food101", "oxford-iiit-pet/images": "OxfordIIITPet",
    "dtd/dtd": "DTD", "fgvc-aircraft-2013b/data": "FGVCAircraft", "eurosat/2750": "EuroSAT", "gtsrb/GTSRB": "GTSRB",
    "caltech101/101_ObjectCategories": "Caltech101", "SUN397/ClassName.txt": "SUN397",
}  # fmt: skip


def dataset_in(root: Path) -> str | None:
    """Returns the name of a dataset that torchvision stored in a folder or the folder above, if any."""
    for folder in (root, root.parent):
        for entry, name in LAYOUTS.items():
            if (folder / entry).exists() and (folder == root or root.name == Path(entry).parts[0]):
                return name
    return None


def open_source(
    data: DataSpec, split: str, *, task: str | None = CLASSIFICATION, label_columns: Sequence[str] | None = None,
    masks: "MaskFormat | None" = None, function: OpenDataset | None = None,
) -> Source | Stream:  # fmt: skip
    """Opens a dataset of any kind.

    All processes call it. Rank 0 lists the images of folders, lists, archives and shards; the others receive the list.

    Args:
        data: names the dataset. `data_path`: a folder of images, a folder that contains the folder `split`, or a tar or
            zip file of either; with a list, the folder or the archive of its relative paths; with a dataset of
            torchvision, the folder with its files. `train_list` and `val_list`: lists of image files. `dataset`: a
            dataset of torchvision, hf:NAME_OR_FOLDER[#IMAGE[,LABEL]], wds:SHARDS (`num_images` replaces counting them),
            or py:MODULE:FUNCTION.
        split: "train", "val", or the name of another split. A folder or archive without splits is for training; with
            `val_list`, it is refused, because the list may name some of its images.
        task: what the labels mean. Lists and py: have other labels than classes. None: the labels of lists and py: are
            not read.
        label_columns: the columns of the list with the labels.
        masks: decodes the segmentation masks of the images, which are their labels, as in `pairs.open_pairs`. None: the
            images have no masks.
        function: the function of py:, instead of importing it.

    Raises:
        ValueError: no dataset is given, the dataset does not exist, or it has no images.
    """
    file_list = {"train": data.train_list, "val": data.val_list}.get(split)
    _warn_of_unused(data, bool(data.train_list or data.val_list), label_columns)
    if masks:
        from mae.data.kinds.pairs import open_pairs

        return open_pairs(data, split, masks, function)
    if file_list and data.dataset:
        raise ValueError(f"`{split}_list` and `dataset` exclude each other; give one of them")
    if data.dataset:
        kind, name = kind_of(data.dataset)
        opened: Source | Stream = KINDS[kind].function(name, split, data, task, function)
        return opened
    root = Path(data.data_path) if data.data_path else None
    if file_list:
        from mae.data.kinds.lists import read_list

        setting = f"`{split}_list`"
        return parallel.from_rank_0(lambda: read_list(Path(file_list), root, setting, task, label_columns, data.extras))
    if root is None and data.train_list and split == "val":
        raise NoValidation("`val_list` is needed, or `data_path`, a folder that contains val/")
    if root is None:
        raise ValueError(
            "`data_path` is needed: a folder of images, a folder that contains train/, or a tar or zip file of either "
            "(or give `train_list` or `dataset`)"
        )
    return parallel.from_rank_0(lambda: _open_path(root, split, not data.val_list or bool(data.val_fraction)))


def _warn_of_unused(data: DataSpec, is_list: bool, label_columns: Sequence[str] | None) -> None:
    """Logs a warning for each setting that has no effect with the kind of the dataset."""
    used = KINDS[kind_of(data.dataset)[0]].uses if data.dataset else ("data_path",)
    for name, value, counts in (
        ("download", data.download, "download" in used),
        ("num_images", data.num_images, "num_images" in used),
        ("data_path", data.data_path, "data_path" in used),
        ("label_columns", label_columns, is_list),
        ("extras", data.extras, is_list),
    ):
        if value and not counts:
            logger.warning(f"`{name}` has no effect with this dataset")


def _open_path(root: Path, split: str, takes_all: bool) -> Listing:
    """Opens a folder or an archive; `takes_all`: without splits, all of its images are for training.

    Raises:
        ValueError: there is none, it has no images, or it has masks, which would be images of another class.
    """
    files = _files_of(root, split, takes_all)
    if masks := _masks_among(files.names):
        raise ValueError(
            f"data_path={root}: its folders {' and '.join(map(printable, masks))} are those of a segmentation, and "
            f"masks are no images: give the folder of the images, or a list of them as `train_list`"
        )
    return files


def _masks_among(names: Iterable[str]) -> list[str]:
    """Returns two folders beside each other of which one has images and the other masks, by their names; else []."""
    folders = {name.rpartition("/")[0] for name in names} - {""}
    paths = {tuple(folder.split("/")[:depth]) for folder in folders for depth in range(1, folder.count("/") + 2)}
    beside: dict[tuple[str, ...], dict[str, str]] = {}
    for *above, name in paths:
        beside.setdefault(tuple(above), {})[name.lower()] = name
    for found in beside.values():
        images = [found[name] for name in IMAGES if name in found]
        masks = [found[name] for name in MASKS if name in found]
        if images and masks:
            return [images[0], masks[0]]
    return []


def _files_of(root: Path, split: str, takes_all: bool) -> Listing:
    if root.is_file():
        if root.suffix.lower() in LISTS:
            raise ValueError(f"data_path={root}: it is no folder or archive; give a list as {split}_list={root}")
        from mae.data.kinds.archives import open_archive

        return open_archive(root, split, whole=takes_all)
    if not root.is_dir():
        raise ValueError(f"data_path={root}: there is no such folder or archive")
    files = _files_of_split(root, split, takes_all)
    if name := dataset_in(root):
        logger.warning(
            f"{root} has the files of torchvision's dataset {name}, and is read without its splits and labels"
        )
    return files


def _files_of_split(root: Path, split: str, takes_all: bool) -> Listing:
    if (root / split).is_dir():
        return find_files(root / split)
    check_split_names(os.listdir(root), split, root)
    if split != "train" or (root / "val").is_dir() or not takes_all:  # never the images of the other split
        raise no_split(root, split, (root / "train").is_dir())
    files = find_files(root)
    warn_of_inner_splits(files.names, root)
    return files
