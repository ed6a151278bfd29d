"""Large pictures: they are decoded one at a time on a machine, and become pictures of a quarter of their sides."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mae.data.pixels import Picture, from_array, size_of

PIXELS = 2**26  # larger pictures take more than 256 MiB in Pillow
SHORTER = 4096  # pixels of the shorter side, from which a quarter is enough for the usual crops
FACTOR = 4  # sides of JPEG files are divided by a power of two
ROWS = 64 * FACTOR  # of a strip

Image.core.set_block_size(2**26)  # glibc returns memory of more than 32 MiB to the system when it is freed


def is_large(height: int, width: int) -> bool:
    """Whether a picture is read at a reduced size."""
    return height * width > PIXELS and min(height, width) >= SHORTER


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other process of this machine decodes a large picture. A process that ends releases the lock."""
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def stored_size(picture: Picture) -> tuple[int, int]:
    """Returns (height, width) in the file."""
    return getattr(picture, "stored_size", size_of(picture))


def with_stored_size(picture: Any, size: tuple[int, int] | None) -> Any:
    """Records the size of the file of a picture, which may have been turned since, if it is another one."""
    if size and max(size) != max(size_of(picture)):
        height, width = size_of(picture)
        picture.stored_size = size if (height < width) == (size[0] < size[1]) else size[::-1]
    return picture


def reduced(height: int, rows: Callable[[int, int], Picture]) -> Picture:
    """Averages squares of FACTOR x FACTOR pixels of a picture in strips, without a second picture of its size.

    Args:
        height: of the picture.
        rows: returns the pixels of the rows from its first up to its second argument.

    Returns:
        The sides are rounded up. Indexed colors become colors, and colors that are transparent become RGBA.
    """
    whole: Any = None
    for top in range(0, height, ROWS):
        strip: Any = _averaged(rows(top, min(top + ROWS, height)))
        start = top // FACTOR
        if isinstance(strip, Tensor):
            whole = strip.new_empty(len(strip), -(-height // FACTOR), strip.shape[2]) if whole is None else whole
            whole[:, start : start + strip.shape[1]] = strip
        else:
            whole = whole or Image.new(strip.mode, (strip.width, -(-height // FACTOR)))
            whole.info = strip.info
            whole.paste(strip, (0, start))
    return whole


def of_array(pixels: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], reduces: bool) -> Tensor:
    """Array (H, W, c) -> tensor (c, H, W) of the values of `convert`; with `reduces`, `reduced` if it is large."""
    if not (reduces and is_large(*pixels.shape[:2])):
        return from_array(convert(pixels))
    picture = reduced(len(pixels), lambda top, bottom: from_array(convert(pixels[top:bottom])))
    return with_stored_size(picture, pixels.shape[:2])


def _averaged(picture: Picture) -> Picture:
    if isinstance(picture, Tensor):
        means = F.avg_pool2d(picture.float(), FACTOR, ceil_mode=True)
        return means if picture.is_floating_point() else means.round().to(picture.dtype)
    if picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture.convert("L" if picture.mode == "1" else picture.mode).reduce(FACTOR)
