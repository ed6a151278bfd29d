"""Segmentation masks: images with one value per pixel, the index of a class or IGNORED; and palettes of classes."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.data import decode
from mae.data.item import IGNORED
from mae.data.pixels import BadImage
from mae.files.untrusted import printable, read_file

# the first bytes of a file
JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG"
TIFF = (b"II*\0", b"MM\0*")
PGM = re.compile(rb"P[25](?:(?:\s|#[^\n]*\n)+(\d+)){3}")  # its width, height and maximum, between comments
PHOTOMETRIC = 262  # a tag of TIFF
WHITE_IS_ZERO = 0
MOST_CLASSES = 255
RGB_WEIGHTS = np.array([1 << 16, 1 << 8, 1])  # a color as one number

Color = tuple[int, int, int]
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Palette(NamedTuple):
    """Names and colors of classes."""

    names: list[str]
    colors: list[Color]


def read_palette(path: Path) -> Palette:
    """Reads a text file with a line `R G B NAME` for each class, in the order of the classes. # starts a comment.

    Raises:
        ValueError: a line has another format.
        OSError: the file can't be read.
    """
    names = []
    colors = []
    for number, line in enumerate(read_file(path).decode("utf-8-sig", "replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\S.*)", line.strip())
        if not match or max(map(int, match.groups()[:3])) > 255:
            raise ValueError(f"palette={path}, line {number}: {printable(line.strip())[:80]!r} is not R G B NAME")
        red, green, blue, name = match.groups()
        colors.append((int(red), int(green), int(blue)))
        names.append(printable(name))
    if not 0 < len(names) <= MOST_CLASSES or len(set(names)) < len(names) or len(set(colors)) < len(colors):
        raise ValueError(
            f"palette={path} has {len(names)} classes: give 1 to {MOST_CLASSES}, with different names and colors"
        )
    return Palette(names, colors)


def default_colors(count: int) -> list[Color]:
    """Returns the colors of VOC's masks: the bits of a class, spread over the channels from their highest bit."""
    numbers = np.arange(count)[:, None]
    bits = numbers >> np.arange(0, 24, 3)  # (count, 8): three bits of the number for each bit of a channel
    return [
        tuple(int(((row >> channel & 1) << np.arange(7, -1, -1)).sum()) for channel in range(3))  # type: ignore[misc]
        for row in bits
    ]


@dataclass(frozen=True)
class MaskFormat:
    """Decodes masks: indexed and gray images of 8 bits, and color images with the colors of a palette.

    Args:
        classes: names of the classes.
        reduce_zero_label: the value 0 is ignored, and the classes start at 1.
        colors: the colors of the classes in color images. Pixels of other colors are ignored.
    """

    classes: Sequence[str]
    reduce_zero_label: bool = False
    colors: Sequence[Sequence[int]] | None = None

    def decode(self, data: bytes | Any) -> Tensor:
        """Returns the classes of the pixels of a mask, uint8 (H, W).

        Args:
            data: the bytes of an image file, a Pillow image, or an array or tensor (H, W) of integers.

        Raises:
            BadImage: the file can't be decoded, or has a value that is not a class.
        """
        is_file = isinstance(data, bytes)
        if is_file and data.startswith(JPEG):
            raise BadImage("it is a JPEG file, whose compression changes the values: give masks as PNG files")
        if is_file and _changes_when_read(data):
            raise BadImage("its values change when it is read: give masks as PNG files")
        try:
            picture = decode.read(data if is_file or isinstance(data, Image.Image) else _bytes_of(data), 1)
        except Exception as error:  # decoders raise any exception on damaged bytes
            raise BadImage(printable(" ".join(str(error).split()))) from error
        if not isinstance(picture, Tensor) and picture.mode in ("RGB", "RGBA"):
            return self._of_colors(np.asarray(picture.convert("RGB")))
        values = picture.squeeze(0).numpy() if isinstance(picture, Tensor) else np.asarray(picture)
        if values.dtype == bool and len(self.classes) == 2 and not self.reduce_zero_label:
            values = values.astype(np.uint8)  # the usual format of two classes
        elif values.dtype == bool or (is_file and data.startswith(PNG) and data[24] < 8 and not data[25]):  # 0: gray
            raise BadImage(
                "it is a gray image of less than 8 bits, whose white is 1 for some programs and 255 for others: save "
                "it with 8 bits"
            )
        if values.dtype != np.uint8 or values.ndim != 2:
            raise BadImage("it is neither an indexed nor a gray image of one channel of 8 bits")
        if self.reduce_zero_label:
            values = np.where(values == IGNORED, IGNORED, values - 1)  # 0 - 1 is 255
        if self.colors and not isinstance(picture, Tensor) and picture.mode == "P":
            self._require_order(picture)
        classes = values[values != IGNORED]
        if classes.size and classes.max() >= len(self.classes):
            first = int(self.reduce_zero_label)
            raise BadImage(
                f"it has the value {classes.max() + first}, and the {len(self.classes)} classes are {first} to "
                f"{len(self.classes) - 1 + first} ({IGNORED} is ignored): correct `nb_classes`, `palette` or "
                f"`reduce_zero_label`"
            )
        return torch.from_numpy(values.copy())

    @cached_property  # it has 16 MB
    def _class_of_color(self) -> np.ndarray:
        assert self.colors
        table = np.full(1 << 24, IGNORED, dtype=np.uint8)
        table[np.asarray(self.colors) @ RGB_WEIGHTS] = np.arange(len(self.colors))
        return table

    def _of_colors(self, pixels: np.ndarray) -> Tensor:
        if self.colors is None:
            raise BadImage("it is a color image: give `palette` with the colors of the classes")
        if self.reduce_zero_label:
            raise BadImage(
                "it is a color image, and `reduce_zero_label` is for masks of numbers: omit it, and leave the ignored "
                "color out of `palette`"
            )
        values = pixels @ RGB_WEIGHTS
        classes = self._class_of_color[values]
        unknown = classes == IGNORED  # a single color may mark ignored pixels
        if np.unique(values[unknown]).size > 1:
            color = " ".join(map(str, pixels[unknown][0]))
            raise BadImage(f"several of its colors, such as {color}, are not in the palette: correct `palette`")
        return torch.from_numpy(classes)

    def _require_order(self, picture: Image.Image) -> None:
        """Raises BadImage if an indexed image has colors of the palette at other indices than those of the classes.

        Programs that optimize color images number their colors in any order.
        """
        colors = np.array(picture.getpalette()).reshape(-1, 3) @ RGB_WEIGHTS
        indices = np.flatnonzero(np.bincount(np.asarray(picture).ravel())[: len(colors)])
        classes = self._class_of_color[colors[indices]]
        wrong = (indices != IGNORED) & (classes != IGNORED) & (classes != indices - self.reduce_zero_label)
        if wrong.any():
            raise BadImage(
                f"it is an indexed image with the colors of the palette in another order (that of index "
                f"{indices[wrong][0]} is class {classes[wrong][0]}): save it as RGB if its colors are the classes, as "
                f"gray if its indices are"
            )


def _changes_when_read(data: bytes) -> bool:
    """Whether reading a file scales or inverts its values: PGM with a maximum other than 255, TIFF whose 0 is white."""
    if found := PGM.match(data):
        return found[1] != b"255"
    if not data.startswith(TIFF):
        return False
    try:
        return Image.open(io.BytesIO(data)).tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]
    except Exception:  # decoding it says why
        return False


def _bytes_of(mask: Any) -> np.ndarray:
    """Returns an array or tensor (H, W) of integers as an array of bytes."""
    values = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if values.ndim != 2 or values.dtype.kind not in "iub" or not ((values >= 0) & (values <= IGNORED)).all():
        raise BadImage(f"it is {values.dtype} of shape {values.shape}: give integers (H, W) from 0 to {IGNORED}")
    return values.astype(np.uint8)


def as_mask(classes: Tensor) -> Tensor:
    """Returns the classes of pixels (H, W) in the type that follows the crops of the image."""
    from torchvision import tv_tensors  # takes more than a second

    return tv_tensors.Mask(classes)
