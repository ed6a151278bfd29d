"""Reads TIFF files of any bits, channels and pages with tifffile."""

import io
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import tifffile
import torch
from tifffile import EXTRASAMPLE, PHOTOMETRIC
from torch import Tensor

from mae.data import large
from mae.data.pixels import (
    VALUES_PER_PIXEL,
    BadImage,
    PixelValues,
    check_channels,
    check_size,
    from_array,
    require_stored_values,
    to_values,
)

ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # arrays (H, W, c), by the TIFF tag Orientation, as in Pillow
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors of damaged files are raised instead


def read(
    data: bytes, in_chans: int | None, max_pixels: int, values: PixelValues, reduces: bool = False
) -> Tensor | None:
    """Returns the picture (c, H, W) of a TIFF file; None if Pillow reads it without changing its values.

    Args:
        data, in_chans, max_pixels, values, reduces: as in `decode.read`.

    Raises:
        BadImage: the file is a volume or a stack, is truncated or too large, or has other channels.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        channels = page.samplesperpixel
        bits = page.bitspersample
        check_size(page.imagelength, page.imagewidth, channels, max_pixels)
        if page.imagedepth > 1:
            raise BadImage(f"it is a volume with {page.imagedepth} levels, not an image")
        plain = bits >= 8 and page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB)
        if math.prod(page.chunks) > VALUES_PER_PIXEL * max_pixels:  # decoders allocate a complete tile
            raise BadImage(f"its tiles of {' x '.join(map(str, page.chunks))} values are too large")
        pages: Any = file.pages if channels == 1 and in_chans in (None, len(file.pages)) else [page]
        if len({(p.imagelength, p.imagewidth, p.samplesperpixel, p.dtype) for p in pages}) > 1:
            pages = [page]  # the other pages are smaller copies of the first one
        if _is_stack(file.pages) and (len(pages) == 1 or not plain):
            reason = f"and in_chans={in_chans}" if len(pages) == 1 else "and a palette or less than 8 bits: no channels"
            raise BadImage(f"it has {len(file.pages)} pages of equal size, {reason}")
        if page.photometric == PHOTOMETRIC.MINISWHITE and page.dtype is not None and page.dtype.kind != "f":
            setting = "value_range" if values.value_range else "nodata"
            if values.value_range or (values.nodata is not None and bits <= 8):
                raise BadImage(f"its value 0 is white, so `{setting}` has two meanings; save it with 0 as black")
        of_pillow = page.dtype == np.uint8 and channels <= 4 and set(page.extrasamples) <= set(ALPHA)
        if not plain or (of_pillow and len(pages) == 1):
            require_stored_values(values, bits == 8)
            return None
        has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA and channels != in_chans
        if len(pages) == 1 and in_chans:  # checked before many channels are decoded
            check_channels(channels - has_alpha, in_chans)
        for p in pages:
            _require_complete(p, len(data))
        with large.one_at_a_time() if large.is_large(page.imagelength, page.imagewidth) else nullcontext():
            picture = torch.cat([_page_pixels(p, values, reduces and not has_alpha) for p in pages])
        picture = large.with_stored_size(picture, (page.imagelength, page.imagewidth))
    return _over_white(picture, page.extrasamples[0]) if has_alpha else picture


def _require_complete(page: tifffile.TiffPage, length: int) -> None:
    """Raises BadImage if strips or tiles of a page are not in its file. tifffile would replace them by zeros."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(segments) != math.prod(page.chunked):
        raise BadImage(f"it has {len(segments)} strips or tiles instead of {math.prod(page.chunked)}")
    if any(not size or start + size > length for start, size in segments):
        raise BadImage("the file is truncated")


def _is_stack(pages: Any) -> bool:
    """Whether the second page of a TIFF file has the size and channels of the first, and is no reduced copy or mask."""
    if len(pages) == 1:
        return False
    first, second = ((p.imagelength, p.imagewidth, p.samplesperpixel, p.dtype) for p in pages[:2])
    return first == second and not (pages[1].is_reduced or pages[1].subfiletype & 4)


def _page_pixels(page: tifffile.TiffPage, values: PixelValues, reduces: bool) -> Tensor:
    """Decodes a page to (c, H, W), turned upright, uint8 or float32; 9 to 16 bits become floats from 0 to 1."""

    def convert(pixels: np.ndarray) -> np.ndarray:
        inverted = page.photometric == PHOTOMETRIC.MINISWHITE and pixels.dtype.kind != "f"
        pixels = to_values(pixels, values, 2**page.bitspersample - 1)
        return (255 if pixels.dtype == np.uint8 else 1) - pixels if inverted else pixels

    pixels = page.asarray()
    pixels = np.moveaxis(pixels, 0, 2) if page.axes == "SYX" else pixels
    pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    picture = large.of_array(pixels, convert, reduces)
    turn = TURNS.get(page.tags.valueof("Orientation", 1))
    return from_array(turn(picture.permute(1, 2, 0).numpy())) if turn else picture


def _over_white(picture: Tensor, kind: int) -> Tensor:
    """Composites a picture over white; its last channel is alpha."""
    color = picture[:-1]
    alpha = picture[-1:]
    if picture.dtype == torch.uint8 or ((alpha < 0) | (alpha > 1)).any():
        raise BadImage("its alpha channel is not in the range 0 to 1")
    return (color if kind == EXTRASAMPLE.ASSOCALPHA else color * alpha) + (1 - alpha)
