"""Folders of image files, flat or nested."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from util.cli.advice import AdvisedError, Remedy
from util.data.decode import SUFFIXES
from util.data.sources import KINDS, Files, classes_of
from util.files.untrusted import printable

logger = logging.getLogger(__name__)


def find_files(root: Path, kind: str = "images") -> Files:
    """Finds the image files in a folder and its subfolders, sorted by name. Hidden files and folders are skipped.

    If all images are in subfolders, the top-level subfolders are the classes, sorted by name.

    Args:
        kind: what the files are, for the log.

    Raises:
        ValueError: the folder contains no images.
    """
    started = time.perf_counter()
    start = len(os.path.join(root, ""))  # the paths begin with the root; os.path.relpath takes 5 µs for each
    names = sorted(path[start:] for path in image_files(str(root)))
    if not names:
        shards = Remedy({"dataset": f"wds:{root}/*.tar"}, "{} reads shards of WebDataset")
        raise AdvisedError(
            f"there are no images in it (searched all subfolders for {KINDS})",
            *[shards] * any(root.glob("*.tar")),
            about={"data_path": root},
        )
    folders = [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and _is_folder(entry)]
    logger.info(f"{len(names):,} {kind} under {root}, found in {time.perf_counter() - started:.1f} s")
    return Files(root, names, *classes_of(names, folders))


def image_files(root: str) -> Iterator[str]:
    """Yields the paths of the image files below `root`. Links to folders are followed.

    Within each subfolder of `root`, a folder is visited once. Links that form a cycle therefore end.
    """
    waiting = [(root, {_identity(root)})]
    while waiting:
        folder, ancestors = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    below = {*ancestors} if folder == root else ancestors
                    if _identity(entry.path) in below:
                        logger.warning(f"{printable(entry.path)} links to a folder that is already included; skipped")
                        continue
                    below.add(_identity(entry.path))
                    waiting.append((entry.path, below))
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_symlink() or entry.is_file()):
                    yield entry.path


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
