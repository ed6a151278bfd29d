"""Image files by name, of a folder or an archive, with what belongs to each: label, inputs and mask."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mae.data.item import NO_INPUTS, Item
from mae.data.pixels import BadImage
from mae.data.source import label_at, version_of
from mae.files.untrusted import printable, read_file

if TYPE_CHECKING:
    from mae.data.segmentation_masks import MaskFormat


class Strings:
    """A sequence of strings in two arrays.

    Worker processes share the memory of arrays. They would copy a list of strings gradually, because reading a string
    updates its reference count.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.bytes[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def joined(self) -> bytes:
        """Returns all strings, each followed by a zero byte."""
        return np.insert(self.bytes, self.ends, 0).tobytes()

    def encoded(self) -> list[bytes]:
        """Returns the bytes of all strings."""
        return self.joined().split(b"\0")[:-1]


class Files:
    """Files of a folder; of an archive, `archives.Members`.

    Args:
        root: the folder that the names are relative to.
    """

    def __init__(self, root: str | Path, names: Sequence[str]) -> None:
        self.root = str(root)
        self.names = Strings(names)

    def path(self, index: int) -> str:
        """Returns the path of a file."""
        return os.path.join(self.root, self.names[index])

    def name(self, index: int) -> str:
        """Returns the path of a file for messages."""
        return printable(self.path(index))

    def version(self, index: int) -> str:
        """Returns a text that changes when the file changes."""
        return version_of(self.path(index))

    def size(self, index: int) -> int:
        """Returns the number of bytes of a file. Raises OSError if there is none."""
        return os.stat(self.path(index)).st_size

    def read(self, index: int) -> bytes:
        """Returns the bytes of a file. Raises OSError or BadImage if it can't be read."""
        return read_file(self.path(index))

    def chosen(self, indices: Sequence[int]) -> "Files":
        """Returns some of the files."""
        return Files(self.root, [self.names[index] for index in indices])


@dataclass(frozen=True)
class MaskFiles:
    """The masks of images, in the order of the images."""

    files: Files
    format: "MaskFormat"

    def __getitem__(self, index: int) -> Tensor:
        """Returns a mask, a `tv_tensors.Mask` (H, W).

        Raises:
            BadImage: the mask can't be read, or has a value that is not a class.
        """
        from mae.data.segmentation_masks import as_mask

        try:
            return as_mask(self.format.decode(self.files.read(index)))
        except (BadImage, OSError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise BadImage(f"its mask {self.files.name(index)}: {reason}") from error


class Listing:
    """Image files with their labels, extra inputs and masks.

    Args:
        files: the images.
        classes: the names of the classes, or of the targets. Default: those of the masks, if any.
        labels: (n,), indices into `classes`; -1 for files without a label. Or vectors (n, C) of targets. Default: no
            file has a label.
        inputs: further inputs of the model (n,) by name.
        masks: the masks of the images, which are then the labels of the items.
        has_ids: as in `Source`.
    """

    def __init__(
        self, files: Files, classes: Sequence[str] = (), labels: np.ndarray | None = None,
        inputs: Mapping[str, np.ndarray] = MappingProxyType({}), masks: MaskFiles | None = None,
        has_ids: bool = False,
    ) -> None:  # fmt: skip
        self.files = files
        self.names = files.names
        self.classes = list(masks.format.classes if masks else classes)
        self.labels = np.full(len(files.names), -1) if labels is None else labels
        self.inputs = dict(inputs)
        self.input_shapes = dict.fromkeys(inputs, "()")
        self.masks = masks
        self.has_ids = has_ids

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        """Returns an image file with its label, or its mask as a `tv_tensors.Mask` (H, W).

        Raises:
            OSError: the image can't be read.
            BadImage: the image or its mask can't be read, or the mask has a value that is not a class.
        """
        image = self.files.read(index)
        label: Any = self.masks[index] if self.masks else label_at(self.labels, index)
        inputs = {name: torch.tensor(values[index]) for name, values in self.inputs.items()}
        return Item(image, label, inputs=inputs or NO_INPUTS)

    def name(self, index: int) -> str:
        """Returns the path of the image for messages."""
        return self.files.name(index)

    def version(self, index: int) -> str:
        """Returns the versions of the image and of its mask, and its inputs."""
        texts = [self.files.version(index)]
        if self.masks:
            texts.append(self.masks.files.version(index))
        texts += [f"{name}={values[index]}" for name, values in self.inputs.items()]
        return " ".join(texts)

    def file_names(self) -> list[list[bytes]]:
        """As in `Source`: of the images, and of their masks."""
        of_masks = [self.masks.files.names.encoded()] if self.masks else []
        return [self.names.encoded(), *of_masks]


def folder_of(source: Any) -> Files | None:
    """Returns the files of a source that are images of a folder, without masks; else None."""
    is_folder = isinstance(source, Listing) and source.masks is None and type(source.files) is Files
    return source.files if is_folder else None
