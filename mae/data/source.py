"""The interface of datasets: `Source`, and `Stream` without random access. `mae/data/kinds` has a file for each kind.

A source lists its samples once, in the training process. The worker processes share the memory of this list.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypeIs

from mae.data.item import Item

# Names of validation splits in torchvision and Hugging Face, in the order of preference.
VALIDATION = ("val", "valid", "validation", "2021_valid", "test")


class Source(Protocol):
    """A dataset. Its items have images as they are stored; `decode.decode_item` decodes them.

    The attribute `input_shapes` of a source whose items have inputs has their names and shapes. The attribute `has_ids`
    is True if the names of the classes are integers that count the outputs of a head without names, as in lists. The
    attribute `runs_code` is True for a dataset of the user's code, whose items may use random numbers. The attribute
    `stacked` has the images of decoded items that have one size and nothing else but labels, uint8 (n, H, W, c). The
    method `file_names()` of a source whose samples have names returns a list with the names of all samples as bytes;
    with masks, a second list has those of the masks.

    Labels are indices into `classes`, or -1 for samples without a label.
    """

    @property
    def classes(self) -> list[str]:
        """Returns the names of the classes."""

    @property
    def labels(self) -> np.ndarray:
        """Returns the labels of all samples, (n,)."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def __getitem__(self, index: int) -> Item:
        """Returns a sample.

        Raises:
            OSError, BadImage: the sample can't be read.
        """

    def name(self, index: int) -> str:
        """Returns a printable name of a sample for messages."""

    def version(self, index: int) -> str:
        """Returns a text that changes when the file of a sample changes: `version_of` the file."""


class Stream(Protocol):
    """Shards whose samples are read in order, without random access."""

    is_stream: bool
    title: str  # its name, for messages
    classes: list[str]

    def __len__(self) -> int:
        """Returns the number of samples."""

    def stream(
        self, seed: int, part: int, parts: int, report: Callable[[str, Exception], None], start: int = 0,
        passes: int = sys.maxsize,
    ) -> Iterator[tuple[int, str, bytes, int]]:  # fmt: skip
        """Yields the samples, as `shards.Shards.stream`."""


OpenDataset = Callable[[str, str | None], Any]  # split ("train" or "val"), data_path -> a map-style dataset


def is_stream(source: Any) -> TypeIs[Stream]:
    """Whether the samples of a source are read in order only."""
    return getattr(source, "is_stream", False)


def whole(source: Any) -> tuple[Any, np.ndarray]:
    """Returns the dataset of a subset, or of images in memory, and the indices of its samples in it (n,)."""
    indices = np.arange(len(source))
    while hasattr(source, "source"):
        indices = source.indices[indices] if hasattr(source, "indices") else indices
        source = source.source
    return source, indices


def require_random_access(source: Source | Stream) -> Source:
    """Returns a source. Raises ValueError if it is a stream."""
    if is_stream(source):
        raise ValueError(
            f"{source.title}: streamed shards are for pre-training only, without `cache_images`; unpack them, or pack "
            f"the images as a zip file"
        )
    return source


class NumberedItems:
    """The names of samples that have numbers instead of files, and the version of all files."""

    title: str
    files_version: Any  # a cached property; of files that are read at once, an attribute that is set before

    def name(self, index: int) -> str:
        """Returns the name of the dataset and the number of the sample."""
        return f"{self.title}[{index}]"

    def version(self, index: int) -> str:
        """Returns the version of all files."""
        return self.files_version


def version_of(path: str | Path) -> str:
    """Returns size, modification and change time of a file, or a digest of those of `files_in` a folder, as a text.

    A file that replaces another of the same size may keep the modification time (`rsync -t`, `cp -p`). The change time
    is new, and also after `chmod` or a copy: a different version may cost a second computation, and nothing else.
    """
    if os.path.isdir(path):
        files = sorted(files_in(path))
        return hashlib.sha256(os.fsencode("\n".join(f"{file} {version_of(file)}" for file in files))).hexdigest()
    try:
        status = os.stat(path)
    except OSError:  # such as a broken link: its image is reported when it is read
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def files_in(root: str | Path) -> Iterator[str]:
    """Yields the paths of all files below a folder. Links to folders are followed, and each folder is visited once."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()  # so that a folder with several paths always has the same one
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            folders.clear()
        else:
            visited.add(identity)
            yield from (os.path.join(folder, name) for name in names)


def versions(source: Source, start: int = 0, step: int = 1) -> list[str]:
    """Returns name and version of the samples `start`, `start + step`, ..., on which stored features depend."""
    return [f"{source.name(index)} {source.version(index)}" for index in range(start, len(source), step)]


def evenly_spaced(total: int, count: int) -> list[int]:
    """Returns up to `count` indices from 0 to total - 1, in ascending order."""
    return np.unique(np.linspace(0, total - 1, count, dtype=int)).tolist()


def first_few(names: Sequence[str]) -> str:
    """Joins up to five names for a message, and counts the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def label_at(labels: np.ndarray, index: int) -> Any:
    """Returns the label of a sample: the number of a class, or the vector (C,) among vectors (n, C)."""
    return labels[index] if labels.ndim > 1 else int(labels[index])


def names_of(split: str) -> tuple[str, ...]:
    """Returns the names of a split in the libraries of datasets, the preferred one first."""
    return VALIDATION if split == "val" else (split,)
