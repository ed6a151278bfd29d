"""Folders of image files, flat or nested."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from util.cli.advice import advised
from util.data.decode import SUFFIXES
from util.data.sources import KINDS, Files, classes_of
from util.files.untrusted import printable

logger = logging.getLogger(__name__)


def find_files(root: Path) -> Files:
    """The image files below a folder, nested or flat, in the order of their names; hidden ones are skipped.

    If all of them lie in sub-folders, these are the classes, in the order of their names.

    Raises:
        ValueError: no image there.
    """
    started = time.perf_counter()
    names = sorted(os.path.relpath(path, root) for path in image_files(str(root)))
    if not names:
        error = ValueError(f"--data_path: no images under {root} (looked in all its folders for {KINDS})")
        shards = any(root.glob("*.tar"))
        raise advised(error, f"--dataset wds:{root}/*.tar reads shards of WebDataset") if shards else error
    folders = [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and _is_folder(entry)]
    logger.info(f"{len(names):,} images under {root}, found in {time.perf_counter() - started:.1f} s")
    return Files(root, names, *classes_of(names, folders))


def image_files(root: str) -> Iterator[str]:
    """Follows links to folders; each folder counts once below every folder of `root`."""
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
