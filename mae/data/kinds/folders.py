"""Image files of folders: which files of a folder are images, and their classes."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mae.data.decode import SUFFIXES
from mae.data.kinds.listing import Files, Listing, folder_of
from mae.data.source import VALIDATION, first_few
from mae.files.untrusted import printable
from mae.plurals import counted
from mae.settings.arguments import in_words

logger = logging.getLogger(__name__)

KINDS = ", ".join(SUFFIXES)
# Suffixes of files that are no images. Other files that are not read may be images, and are named in a warning.
SIDE_FILES = {".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".mat", ".db", ".ini"}
SPLITS = {"training", *VALIDATION, "testing"}  # beside train/, they are known
LOST = "lost+found"  # a folder of the file system, which only the administrator can read


class NoValidation(ValueError):
    """The validation set of a dataset was asked for, which has none."""


def check_split_names(folders: Iterable[str], split: str | None, path: Path) -> None:
    """Raises ValueError if folders are splits of a dataset, and that of `split` has another name."""
    names = {folder.lower(): folder for folder in folders}
    other = names.get(split or "", split)
    if split == "val" and split not in names:  # else, training images would take its place
        other = next((names[name] for name in VALIDATION if name in names), split)
    if other != split and "train" in names and not names.keys().isdisjoint(VALIDATION):
        raise ValueError(f"data_path={path}: there is no folder {split}/ in it; rename {other}/ to {split}/")


def no_split(path: Path, split: str, has_train: bool) -> ValueError:
    """Returns the error about a folder or archive without a split."""
    missing = [split] if has_train or split == "train" else ["train", split]
    folders = "this folder" if len(missing) == 1 else f"train/ and {split}/"
    listed = " ".join(f"{name}_list=FILE" for name in missing)
    reason = ", and its images may be those of the validation set" if split == "train" else ""
    kind = NoValidation if split == "val" else ValueError
    return kind(f"data_path={path}: there is no folder {split}/ in it{reason}: add {folders}, or give {listed}")


def warn_of_inner_splits(names: Iterable[str], path: Path) -> None:
    """Logs a warning if a folder within a whole dataset has train/ and val/, whose images all train."""
    inner = {tuple(name.split("/")[:2]) for name in names}
    for top in sorted(top for top, *below in inner if below == ["train"]):
        if held_out := [name for name in VALIDATION if (top, name) in inner]:
            folders = f"train/ and {held_out[0]}/"
            logger.warning(f"{path}: its folder {printable(top)} has {folders}, and the images of both train")


def classes_of(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Returns classes and labels by the first folder of each name; no classes if a name has no folder.

    Args:
        folders: class folders, including those without images.
    """
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not all(first):
        if strays := strays_of(names):
            logger.info(f"the folders are no classes, because these images are in none: {strays}")
        return [], np.full(len(names), -1)
    classes = sorted({*first, *folders})
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLITS:
        logger.warning(
            f"the folders {', '.join(classes)} are splits, and no classes: their images are taken together. Rename "
            f"them to train/ and val/"
        )
        return [], np.full(len(names), -1)
    for empty in sorted(set(folders) - set(first)):
        logger.warning(f"the class folder {printable(empty)} contains no images; it still counts as a class")
    numbers = {name: number for number, name in enumerate(classes)}
    return [printable(name) for name in classes], np.array([numbers[name] for name in first])


def strays_of(names: Iterable[str]) -> str:
    """Returns the names without a folder for a message; an empty text if all or none are in folders."""
    names = list(names)
    strays = [name for name in names if "/" not in name]
    return first_few([printable(name) for name in strays]) if len(strays) < len(names) else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is skipped: a dotfile, such as the ._ files of macOS, or its folder __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def log_listing(text: str, count: int, others: Iterable[str]) -> None:
    """Logs how many images a listing has found, and how many files it does not read, by suffix.

    Args:
        text: the images, and where they are.
        count: their number.
        others: the names of the files that are not read. The line is a warning if some may be images.
    """
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in others)
    total = sum(suffixes.values())
    if not total:
        logger.info(text)
        return
    kinds = [f"{number:,} {printable(suffix) or 'without a suffix'}" for suffix, number in suffixes.most_common()]
    line = f"{text}; {total:,} of {total + count:,} files are not read: {first_few(kinds)}"
    if suffixes.keys() <= SIDE_FILES:
        logger.info(line)
    else:
        logger.warning(f"{line} (images have a suffix {KINDS})")


def find_files(root: Path, kind: str = "image") -> Listing:
    """Finds the image files in a folder and its subfolders, sorted by name. Hidden files and folders are skipped.

    If all images are in subfolders, the top-level subfolders are the classes, sorted by name.

    Args:
        kind: what a file is, for the log.

    Raises:
        ValueError: the folder contains no images.
        PermissionError: as in `files_below`.
    """
    started = time.perf_counter()
    start = len(os.path.join(root, ""))  # the paths begin with the root; os.path.relpath takes 5 µs for each
    images, others = files_below(str(root))
    names = sorted(path[start:] for path in images)
    if not names:
        shards = f": {in_words({'dataset': f'wds:{root}/*.tar'})} reads shards of WebDataset"
        shards = shards if any(root.glob("*.tar")) else ""
        raise ValueError(f"data_path={root}: there are no images in it (searched all subfolders for {KINDS}){shards}")
    folders = [
        entry.name for entry in os.scandir(root)
        if not is_hidden(entry.name) and entry.name != LOST and _is_folder(entry)
    ]  # fmt: skip
    text = f"{counted(len(names), kind)} under {root}, found in {time.perf_counter() - started:.1f} s"
    log_listing(text, len(names), others)
    return Listing(Files(root, names), *classes_of(names, folders))


def with_missing(files: Listing, names: Sequence[str]) -> Listing:
    """Returns the files of a folder and those that have disappeared from it, which can't be read.

    Other files are returned as they are.

    Args:
        names: the sorted names of the files that the folder had. If it has others now, `files` are returned.
    """
    folder = folder_of(files)
    if folder is None:
        return files
    missing = set(names).difference(files.names)
    if not missing:
        return files
    if len(names) != len(files) + len(missing):
        logger.warning(
            f"{len(missing):,} images have disappeared from {folder.root} within an epoch, and others were added: the "
            f"rest of this epoch reads some images twice or not at all"
        )
        return files
    logger.warning(
        f"{len(missing):,} of {len(names):,} images have disappeared from {folder.root} within an epoch, and are "
        f"images that can't be read: {first_few([printable(name) for name in sorted(missing)])}"
    )
    return Listing(Files(folder.root, names), *classes_of(names, files.classes))


def files_below(root: str) -> tuple[list[str], list[str]]:
    """Returns the paths of the images below `root`, and of the other files. Links to folders are followed.

    Within each subfolder of `root`, a folder is visited once. Links that form a cycle therefore end. A folder without
    permission is skipped with a warning, unless it may be a class.

    Raises:
        PermissionError: `root` or a class folder can't be read.
    """
    images: list[str] = []
    others: list[str] = []
    refused: list[PermissionError] = []
    waiting = [(root, {_identity(root)})]
    while waiting:
        folder, ancestors = waiting.pop()
        try:
            entries = os.scandir(folder)
        except PermissionError as denied:
            refused.append(denied)
            continue
        with entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    below = {*ancestors} if folder == root else ancestors
                    if _identity(entry.path) in below:
                        logger.warning(f"{printable(entry.path)} links to a folder that is already included; skipped")
                        continue
                    below.add(_identity(entry.path))
                    waiting.append((entry.path, below))
                elif entry.is_symlink() or entry.is_file():
                    (images if is_image(entry.name) else others).append(entry.path)
    are_in_classes = bool(refused) and not any(os.path.dirname(path) == root for path in images)
    for error in refused:
        above, name = os.path.split(error.filename)
        if error.filename == root or (are_in_classes and above == root and name != LOST):
            raise error
        logger.warning(f"{printable(error.filename)}: {error.strerror}; the folder is skipped")
    return images, others


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
