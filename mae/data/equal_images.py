"""Held-out images that equal training images. With them, scores are not those of new images."""

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mae import parallel
from mae.data.kinds.listing import Files, Listing
from mae.data.pixels import BadImage
from mae.data.source import Source, whole
from mae.plurals import counted

logger = logging.getLogger(__name__)

SECONDS = 30  # of a comparison of files: ImageNet takes longer, and nobody waits for it at each start


def sentence(train: Source, val: Source, known: Iterable[Hashable], seen: Iterable[Hashable]) -> str:
    """Returns how many held-out images equal training images, and how many of them have another label; "" if none does.

    Args:
        known: a digest of each training image (m,), which is the same for equal images only. None: it equals no image.
        seen: a digest of each held-out image (n,).
    """
    copies: dict[Hashable, list[int]] = {}
    for index, digest in enumerate(known):
        copies.setdefault(digest, []).append(index)
    equal = [(index, copies[digest]) for index, digest in enumerate(seen) if digest is not None and digest in copies]
    if not equal:
        return ""
    others = sum(any(_label(train, copy) != _label(val, index) for copy in found) for index, found in equal)
    verb = "equals" if len(equal) == 1 else "equal"
    return (
        f"{len(equal):,} of {counted(len(val), 'held-out image')} {verb} training images, {others:,} with another "
        f"label: scores are not those of new images"
    )


def _label(source: Source, index: int) -> Any:
    """Returns the label of a sample, by the names of classes or targets: the numbers of two datasets may differ."""
    label = np.asarray(source.labels)[index]
    if label.ndim:
        return {name: value for name, value in zip(source.classes, label.tolist(), strict=True) if value}
    return source.classes[label] if source.classes and label >= 0 else None


def of_pictures(pictures: np.ndarray) -> np.ndarray:
    """Returns a digest of each picture (n,) of (n, c·h·w)."""
    hashes = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in pictures)
    return np.frombuffer(hashes, np.uint64)


def in_files(train: Source, val: Source) -> str:
    """Returns the `sentence` on equal image files: their sizes are compared first. It is "" for other datasets.

    It is also "" if the comparison takes more than SECONDS, which the log says.
    """
    listings, indices = zip(*map(whole, (train, val)), strict=True)
    if not all(isinstance(listing, Listing) for listing in listings):
        return ""
    parts = [(listing.files, some.tolist()) for listing, some in zip(listings, indices, strict=True)]
    end = time.monotonic() + SECONDS
    try:
        of_train, of_val = [_of_each(files.size, some, "sizes", end) for files, some in parts]
        shared = ({*of_train} & {*of_val}) - {None}
        known, seen = (
            _digests(files, some, [size in shared for size in sizes], end)
            for (files, some), sizes in zip(parts, (of_train, of_val), strict=True)
        )
    except TimeoutError:
        logger.info(f"held-out images are not compared with training images: this takes more than {SECONDS} s")
        return ""
    return sentence(train, val, known, seen)


def _of_each(function: Callable[[int], Any], indices: Sequence[int], what: str, end: float) -> list[Any]:
    """Returns the values of a function of files; None for one that can't be read.

    Raises:
        TimeoutError: the time is after `end`.
    """
    values: list[Any] = []
    for index in tqdm(indices, f"comparing {what}", unit="image", leave=False, disable=None, delay=1):
        if time.monotonic() > end:
            raise TimeoutError
        try:
            values.append(function(index))
        except (OSError, BadImage):
            values.append(None)
    return values


def _digests(files: Files, indices: Sequence[int], are_needed: Sequence[bool], end: float) -> list[bytes | None]:
    """Returns the digests of the files that are needed; None for the others."""
    needed = [index for index, is_needed in zip(indices, are_needed, strict=True) if is_needed]
    found = iter(_of_each(lambda index: hashlib.blake2b(files.read(index)).digest(), needed, "files", end))
    return [next(found) if is_needed else None for is_needed in are_needed]


def warn(train: Source, val: Source) -> None:
    """Logs a warning if held-out image files equal training images."""
    if parallel.is_main() and (text := in_files(train, val)):
        logger.warning(text)
