"""Images with segmentation masks: a folder or archive of two layouts, two folders, a CSV file, VOC, a dataset."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mae.data.generators import preserve_generators
from mae.data.item import IGNORED, Item
from mae.data.kinds.archives import Archive
from mae.data.kinds.folders import Files, find_files
from mae.data.kinds.lists import read_pairs, require_first
from mae.data.kinds.objects import UserSet, read_named
from mae.data.kinds.torchvision import TorchvisionSet
from mae.data.masks import MaskFormat, as_mask
from mae.data.pixels import BadImage
from mae.data.source import OpenDataset, Source, evenly_spaced, first_few
from mae.files.untrusted import printable
from mae.settings import DataSpec
from mae.user_code import DATASET

logger = logging.getLogger(__name__)

MASKS_READ = 200  # in search of a second class
# The folders of images and masks of each split.
LAYOUTS = {
    "train": (("images/training", "annotations/training"), ("train/images", "train/masks")),
    "val": (("images/validation", "annotations/validation"), ("val/images", "val/masks")),
}
FOLDERS = tuple(f"/{folder}/" for layouts in LAYOUTS.values() for layout in layouts for folder in layout)


class UserPairs(UserSet):
    """Images and masks of a dataset of the user's code: the label of an item is a mask, or its path.

    Args:
        mask_format: decodes the masks.
    """

    def __init__(
        self, function: OpenDataset | None, split: str, data_path: str | None, name: str, mask_format: MaskFormat
    ) -> None:
        self.mask_format = mask_format
        super().__init__(function, split, data_path, name)
        if self.maps:
            raise ValueError(f"{self.setting}: its maps {', '.join(self.maps)} do not follow the crops of segmentation")
        self.classes = list(mask_format.classes)
        self.labels = np.full(len(self), -1)  # the images have no label as a whole

    def label_of(self, index: int, label: Any) -> Tensor:
        """Returns the mask of an item, a `tv_tensors.Mask` (H, W).

        Raises:
            BadImage: the mask can't be read, or has a value that is not a class.
        """
        try:
            return as_mask(self.mask_format.decode(read_named(label) if isinstance(label, str | Path) else label))
        except BadImage as error:
            raise BadImage(f"its mask: {error}") from error


@dataclass(frozen=True)
class Pairs:
    """Images and their masks, of one source or two.

    Args:
        images: the images.
        masks: the masks.
        indices: (n, 2), the indices of each pair in `images` and `masks`.
        mask_format: decodes the masks.
    """

    images: Files | Archive
    masks: Files | Archive
    indices: np.ndarray
    mask_format: MaskFormat

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return list(self.mask_format.classes)

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels (n,): the images have none as a whole."""
        return np.full(len(self), -1)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        """Returns the image file of a pair and its mask, a `tv_tensors.Mask` (H, W).

        Raises:
            OSError: the image can't be read.
            BadImage: the mask can't be read, or has a value that is not a class.
        """
        item = self.images[self.indices[index, 0]]
        try:
            return item._replace(label=as_mask(self.mask_format.decode(self.masks[self.indices[index, 1]].image)))
        except (BadImage, OSError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            mask = self.masks.name(self.indices[index, 1])
            raise BadImage(f"its mask {mask}: {reason}") from error

    def name(self, index: int) -> str:
        """Returns the name of the image."""
        return self.images.name(self.indices[index, 0])

    def file_names(self) -> list[list[bytes]]:
        """As in `Source`: of the images and of their masks."""
        images, masks = (source.names.encoded() for source in (self.images, self.masks))
        return [[images[index] for index in self.indices[:, 0]], [masks[index] for index in self.indices[:, 1]]]

    def version(self, index: int) -> str:
        """Returns the versions of image and mask."""
        return f"{self.images.version(self.indices[index, 0])} {self.masks.version(self.indices[index, 1])}"


def first_classes(pairs: Source) -> list[int]:
    """Returns the classes in evenly spaced masks, until there are two or more, or MASKS_READ masks have been read."""
    found: set[int] = set()
    with preserve_generators():  # a dataset of the user's code may use them
        for index in evenly_spaced(len(pairs), MASKS_READ):
            with suppress(BadImage, OSError):  # training reports or skips it
                found.update(pairs[index].label.unique().tolist())
            if len(found - {IGNORED}) > 1:
                break
    return sorted(found - {IGNORED})


def open_pairs(
    data: DataSpec, split: str, mask_format: MaskFormat, function: OpenDataset | None = None
) -> Pairs | UserPairs:
    """Opens images with masks.

    Args:
        data: names the dataset. `data_path`: a folder, or a tar or zip file, with the folders of LAYOUTS; else the
            start of these paths. `train_list` and `val_list`: a CSV file with the header `image,mask` and a row for
            each pair. `train_folders` and `val_folders`: the folder of the images and the folder of the masks, which
            have the same names except for suffixes. `dataset`: a dataset of torchvision with lists of image and mask
            files, or py:MODULE:FUNCTION.
        split: "train" or "val".
        mask_format: decodes the masks.
        function: the function of py:, instead of importing it.

    Raises:
        ValueError: no dataset is given, it has no images, or an image has no mask.
        OSError: the dataset can't be read.
    """
    root, dataset = Path(data.data_path) if data.data_path else None, data.dataset
    of_split = {"train": (data.train_list, data.train_folders), "val": (data.val_list, data.val_folders)}
    file_list, folders = of_split[split]
    if sum(map(bool, (file_list, folders, dataset))) > 1:
        raise ValueError(f"`{split}_list`, `{split}_folders` and `dataset` exclude each other; give one of them")
    if dataset and dataset.startswith(DATASET):
        return UserPairs(function, split, data.data_path, dataset, mask_format)
    if dataset:
        opened = TorchvisionSet(dataset, split, data.data_path, data.download).images
        return _listed(Path(), opened.images, opened.masks, mask_format)
    if file_list:
        listed = read_pairs(Path(file_list), f"`{split}_list`")
        # With an archive, paths are relative to the folder of the list, as in mae.data.
        start = root if root and not root.is_file() else Path(file_list).parent
        for names in listed:
            require_first(f"{split}_list={file_list}", str(start / names[0]))
        return _listed(start, *listed, mask_format)
    if folders:
        images_folder, masks_folder = (root / folder if root else Path(folder) for folder in folders)
        return _of_folders(images_folder, masks_folder, split, mask_format)
    if root is None:
        raise ValueError(
            f"`data_path` is needed: a folder or an archive with {_layouts_of(split)} (or give `{split}_folders`, "
            f"`{split}_list` or `dataset`)"
        )
    kind = "images and masks"
    files = find_files(root, kind) if root.is_dir() else Archive(root, None, enclosing=True, kind=kind)
    return Pairs(files, files, _of_layout(files, root, split), mask_format)


def _of_folders(images: Path, masks: Path, split: str, mask_format: MaskFormat) -> Pairs:
    """Returns the images of a folder with the masks of the same names of another."""
    image_files, mask_files = find_files(images, "images"), find_files(masks, "masks")
    indices = _matched(_by_key(image_files, split), _by_key(mask_files, split), image_files, str(masks), split)
    return Pairs(image_files, mask_files, indices, mask_format)


def _layouts_of(split: str) -> str:
    return ", or ".join(" and ".join(layout) for layout in LAYOUTS[split])


def _of_layout(files: Files | Archive, root: Path, split: str) -> np.ndarray:
    """Returns the indices of the images of a split and of their masks, (n, 2).

    Raises:
        ValueError: there are no images in the folders of a layout.
    """
    if outside := [name for name in files.names if not any(folder in f"/{name}" for folder in FOLDERS)]:
        logger.warning(
            f"{len(outside):,} of {len(files):,} files are not used, because they are in no folder of a layout "
            f"({', '.join(FOLDERS)}): {first_few([printable(name) for name in outside])}"
        )
    for images_folder, masks_folder in LAYOUTS[split]:
        if images := _by_key(files, split, images_folder):
            return _matched(images, _by_key(files, split, masks_folder), files, masks_folder, split)
    raise ValueError(
        f"data_path={root}: there are no images for {split} in it (looked for {_layouts_of(split)}): give "
        f"{split}_folders=[IMAGES, MASKS] or {split}_list=CSV"
    )


def _listed(root: Path, images: list[str], masks: list[str], mask_format: MaskFormat) -> Pairs:
    image_files, mask_files = (Files(root, names, [], np.full(len(names), -1)) for names in (images, masks))
    indices = np.repeat(np.arange(len(images))[:, None], 2, axis=1)
    return Pairs(image_files, mask_files, indices, mask_format)


def _by_key(files: Files | Archive, split: str, folder: str = "") -> dict[str, int]:
    """Returns the indices of the files in a folder by their names without the folder and the suffix.

    Raises:
        ValueError: two files have the same name.
    """
    index_of: dict[str, int] = {}
    for index, name in enumerate(files.names):
        above, found, below = f"/{name}".partition(f"/{folder}/" if folder else "/")
        if not found:
            continue
        key = f"{above}/{below.rpartition('.')[0]}"
        if key in index_of:
            raise ValueError(
                f"{files.name(index_of[key])} and {files.name(index)} have the same name except for the suffix: remove "
                f"one, or list the pairs in a CSV file (`{split}_list`)"
            )
        index_of[key] = index
    return index_of


def _matched(
    images: Mapping[str, int], masks: Mapping[str, int], files: Files | Archive, masks_folder: str, split: str
) -> np.ndarray:
    """Returns the indices of the images and of their masks, (n, 2).

    Raises:
        ValueError: an image has no mask.
    """
    if unused := [printable(key) for key in masks if key not in images]:
        logger.warning(f"{len(unused):,} masks for {split} have no image of the same name: {first_few(unused)}")
    if missing := [key for key in images if key not in masks]:
        raise ValueError(
            f"{len(missing):,} of {len(images):,} images have no mask of the same name in {masks_folder}, such as "
            f"{files.name(images[missing[0]])}: add the masks, or list the pairs in a CSV file (`{split}_list`)"
        )
    return np.array([(index, masks[key]) for key, index in images.items()])
