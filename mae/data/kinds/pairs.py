"""Images with segmentation masks: a folder or archive of two layouts, two folders, a CSV file, VOC, a dataset."""

import logging
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mae.data.generators import preserve_generators
from mae.data.item import IGNORED
from mae.data.kinds.archives import open_archive
from mae.data.kinds.folders import find_files
from mae.data.kinds.listing import Files, Listing, MaskFiles
from mae.data.kinds.lists import read_list
from mae.data.kinds.objects import UserSet, read_named
from mae.data.kinds.torchvision import TorchvisionSet, require_training
from mae.data.pixels import BadImage
from mae.data.segmentation_masks import MaskFormat, as_mask
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
) -> Listing | UserPairs:
    """Opens images with masks.

    Args:
        data: names the dataset. `data_path`: a folder, or a tar or zip file, with the folders of LAYOUTS; else the
            start of these paths. `train_list` and `val_list`: a list with columns of images, masks and `extras`, as in
            `read_list`. `train_folders` and `val_folders`: the folder of the images and the folder of the masks, which
            have the same names except for suffixes. `dataset`: a dataset of torchvision with lists of image and mask
            files, or py:MODULE:FUNCTION.
        split: "train" or "val".
        mask_format: decodes the masks.
        function: the function of py:, instead of importing it.

    Raises:
        ValueError: no dataset is given, it has no images, its training images validate, or an image has no mask.
        OSError: the dataset can't be read.
    """
    root = Path(data.data_path) if data.data_path else None
    of_split = {"train": (data.train_list, data.train_folders), "val": (data.val_list, data.val_folders)}
    file_list, folders = of_split[split]
    if sum(map(bool, (file_list, folders, data.dataset))) > 1:
        raise ValueError(f"`{split}_list`, `{split}_folders` and `dataset` exclude each other; give one of them")
    if data.dataset and data.dataset.startswith(DATASET):
        return UserPairs(function, split, data.data_path, data.dataset, mask_format)
    if data.dataset:
        opened = TorchvisionSet(data.dataset, split, data.data_path, data.download)
        if split == "train":
            require_training(opened)
        images = opened.images
        return Listing(Files("", images.images), masks=MaskFiles(Files("", images.masks), mask_format))
    if file_list:
        return read_list(Path(file_list), root, f"`{split}_list`", None, input_columns=data.extras, masks=mask_format)
    if root is None and not folders:
        raise ValueError(
            f"`data_path` is needed: a folder or an archive with {_layouts_of(split)} (or give `{split}_folders`, "
            f"`{split}_list` or `dataset`)"
        )
    if folders and not (root and root.is_file()):
        paths = [root / folder if root else Path(folder) for folder in folders]
        images = _opened(paths[0], "image")
        masks = _opened(paths[1], "mask")
        indices = _matched(_by_key(images, split), _by_key(masks, split), images, str(paths[1]), split)
    else:
        assert root is not None
        images = masks = _opened(root, "file")
        indices = _of_folders(images, root, split, folders) if folders else _of_layout(images, root, split)
    mask_files = MaskFiles(masks.chosen(indices[:, 1].tolist()), mask_format)
    return Listing(images.chosen(indices[:, 0].tolist()), masks=mask_files)


def _opened(path: Path, kind: str) -> Files:
    """Finds the images in a folder or an archive."""
    found = find_files(path, kind) if path.is_dir() else open_archive(path, None, enclosing=True, kind=kind)
    return found.files


def _layouts_of(split: str) -> str:
    return ", or ".join(" and ".join(layout) for layout in LAYOUTS[split])


def _of_folders(files: Files, root: Path, split: str, folders: Sequence[str]) -> np.ndarray:
    """Returns the indices of the images in a folder of an archive and of their masks in another, (n, 2).

    The folders start at the top, or below folders that contain all images and masks, as in `members_named`.

    Raises:
        ValueError: a folder is not in the archive, or an image has no mask.
    """
    names = list(files.names)
    enclosing = posixpath.commonpath([posixpath.dirname(name) for name in names])
    for start in ("", *accumulate(enclosing.split("/"), posixpath.join)):
        paths = [posixpath.join(start, posixpath.normpath(folder).strip("/")) for folder in folders]
        exist = [any(name.startswith(f"{path}/") for name in names) for path in paths]
        if exist[0]:
            break
    if not all(exist):
        raise ValueError(f"data_path={root}: there is no folder {folders[exist.index(False)]} in it")
    return _matched(_by_key(files, split, paths[0]), _by_key(files, split, paths[1]), files, folders[1], split)


def _of_layout(files: Files, root: Path, split: str) -> np.ndarray:
    """Returns the indices of the images of a split and of their masks, (n, 2).

    Raises:
        ValueError: there are no images in the folders of a layout.
    """
    if outside := [name for name in files.names if not any(folder in f"/{name}" for folder in FOLDERS)]:
        logger.warning(
            f"{len(outside):,} of {len(files.names):,} files are not used, because they are in no folder of a layout "
            f"({', '.join(FOLDERS)}): {first_few([printable(name) for name in outside])}"
        )
    for images_folder, masks_folder in LAYOUTS[split]:
        if images := _by_key(files, split, images_folder, anywhere=True):
            masks = _by_key(files, split, masks_folder, anywhere=True)
            return _matched(images, masks, files, masks_folder, split)
    raise ValueError(
        f"data_path={root}: there are no images for {split} in it (looked for {_layouts_of(split)}): give "
        f"{split}_folders=[IMAGES, MASKS] or {split}_list=CSV"
    )


def _by_key(files: Files, split: str, folder: str = "", anywhere: bool = False) -> dict[str, int]:
    """Returns the indices of the files in a folder by their names without the folder and the suffix.

    Args:
        anywhere: the folder may be in other folders.

    Raises:
        ValueError: two files have the same name.
    """
    index_of: dict[str, int] = {}
    for index, name in enumerate(files.names):
        above, found, below = f"/{name}".partition(f"/{folder}/" if folder else "/")
        if not found or (above and not anywhere):
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
    images: Mapping[str, int], masks: Mapping[str, int], files: Files, masks_folder: str, split: str
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
