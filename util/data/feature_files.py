"""Features in a file that is mapped into memory. An interrupted computation resumes."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from util.cli import advice
from util.files import atomic, locks

logger = logging.getLogger(__name__)

NOTE = "done.json"  # the progress
SAVE_EVERY = 20  # batches between updates of the progress


def write(
    folder: Path,
    settings: dict[str, Any],
    count: int,
    compute_from: Callable[[int], Iterable[np.ndarray]],
    dtype: type[np.floating] = np.float32,
) -> np.ndarray:
    """Computes features (count, ...), appends them to a file, and maps the file into memory.

    Args:
        folder: folder of the file and its progress. If it exists with the same settings, the computation is resumed.
        settings: plain values on which the features depend.
        count: number of images.
        compute_from: returns the features of the images from a number on, in batches (B, ...).
        dtype: type of the stored values.

    Raises:
        OSError: the disk is full. The same call resumes the computation.
        ValueError: another process computes the features.
    """
    with locks.locked(folder):
        return _write(folder, settings, count, compute_from, dtype)


def _write(
    folder: Path,
    settings: dict[str, Any],
    count: int,
    compute_from: Callable[[int], Iterable[np.ndarray]],
    dtype: type[np.floating],
) -> np.ndarray:
    rows, size = folder / f"features.f{8 * np.dtype(dtype).itemsize}", np.dtype(dtype).itemsize
    done, shape = _progress(folder, rows, settings, size)
    if done:
        logger.info(f"resuming after {done:,} of {count:,} images")
    with atomic.writing(folder):
        if not done:
            (folder / NOTE).unlink(missing_ok=True)  # of other settings
        file = rows.open("ab", buffering=0)  # not mapped: a full disk would abort the process
        file.truncate(size * done * math.prod(shape))  # removes features that the progress does not count
    with file, tqdm(total=count, initial=done, desc="features", unit="image", disable=None) as bar:
        for number, features in enumerate(compute_from(done) if done < count else [], start=1):
            shape, done = list(features.shape[1:]), done + len(features)
            bar.update(len(features))
            with atomic.writing(folder):
                left = memoryview(features.astype(dtype, copy=False).tobytes())
                while left:
                    left = left[file.write(left) :]
                if number % SAVE_EVERY == 0 or done == count:
                    os.fsync(file.fileno())
                    note = {"settings": settings, "done": done, "shape": shape}
                    atomic.write_text(folder / NOTE, json.dumps(note))
    # A shared mapping that may be written to: torch warns of others, and a private one would count as used memory.
    return np.memmap(rows, dtype, "r+", shape=(done, *shape)) if done else np.empty(0, dtype)


def _progress(folder: Path, rows: Path, settings: dict[str, Any], size: int) -> tuple[int, list[int]]:
    """Returns the number of stored images, and the shape of the features of an image."""
    if not (folder / NOTE).exists():
        return 0, []
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        theirs, done, shape = note["settings"], int(note["done"]), list(note["shape"])
        complete = rows.stat().st_size >= size * done * math.prod(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        theirs, done, shape, complete = {}, 0, [], False
    if complete and theirs == settings:
        return done, shape
    reason = advice.changes(theirs, settings) if complete else "damaged"
    logger.warning(f"{folder} can't be resumed ({reason}): starting from the beginning")
    return 0, []
