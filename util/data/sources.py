"""What a source of images is: the protocol `Source`, and `Files`, the source of folders and lists.

A source lists its samples once, in the training process. The worker processes share those arrays.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from util.data.decode import SUFFIXES, Picture
from util.files.untrusted import printable, read_file

logger = logging.getLogger(__name__)

KINDS = ", ".join(SUFFIXES)
# Names that torchvision and Hugging Face have for the validation set; the first that a dataset has is used.
VALIDATION = ("val", "valid", "validation", "2021_valid", "test")


class Source(Protocol):
    """A dataset before decoding: the bytes of image files, or what a library decodes itself, and labels.

    Labels count the entries of `classes`; they are -1 where there are none.
    """

    classes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """The labels of all samples."""

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, index: int) -> tuple[bytes | Picture, int]:
        """Raises OSError or `BadImage` where there is nothing to be had."""

    def name(self, index: int) -> str:
        """How to call a sample, in a message; printable."""


class Strings:
    """Strings in two arrays: of a list, every process that reads it would come to hold a copy, string by string,
    because counting references writes to their memory."""

    def __init__(self, strings: Sequence[str]) -> None:
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.bytes[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


def first_few(names: Sequence[str]) -> str:
    """Five of many names, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Files:
    """Image files, found by `folders.find_files` or `lists.read_list`.

    Args:
        root: the folder that the names start in.
        labels: of each name, counting `classes`; -1 where there are none.
    """

    def __init__(self, root: Path, names: Sequence[str], classes: list[str], labels: np.ndarray) -> None:
        self.root = str(root)
        self.names = Strings(names)
        self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_file(self._path(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


def classes_of(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Classes and labels by the first folder of each name; none if there is a name without a folder."""
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not all(first):
        return [], np.full(len(names), -1)
    classes = sorted({*first, *folders})
    for empty in sorted(set(folders) - set(first)):
        logger.warning(f"the class folder {printable(empty)} holds no images; it stays a class")
    numbers = {name: number for number, name in enumerate(classes)}
    return [printable(name) for name in classes], np.array([numbers[name] for name in first])
