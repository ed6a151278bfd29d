"""Bounds the unpacked size of a TIFF file before it is unpacked, from its tags and the headers of strips and tiles."""

import lzma
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import tifffile
from tifffile import COMPRESSION, TIFF

from mae.data import jpeg

MAX_TILE_VALUES = 1 << 24  # 4096 x 4096; a tile may be larger than a small picture
# imagecodecs decodes these into a buffer of the expected size.
BOUNDED = {COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.PACKBITS}
ZSTD = {COMPRESSION.ZSTD, COMPRESSION.ZSTD_DEPRECATED}
INFLATED: dict[int, Callable[[], Any]] = {
    **dict.fromkeys((COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE), zlib.decompressobj),
    COMPRESSION.LZMA: lzma.LZMADecompressor,
}
# Strips and tiles that are complete image files: the position of height and width in their headers.
_JPEG = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]..[\x08-\x10](?P<height>..)(?P<width>..)", re.DOTALL)
_JPEG2000 = re.compile(rb"\xff\x4f\xff\x51....(?P<width>....)(?P<height>....)", re.DOTALL)
EMBEDDED: dict[int, re.Pattern[bytes]] = {
    **dict.fromkeys((COMPRESSION.JPEG, COMPRESSION.ALT_JPEG, COMPRESSION.JPEG_LOSSY), _JPEG),
    **dict.fromkeys(
        (
            COMPRESSION.APERIO_JP2000_YCBC,
            COMPRESSION.APERIO_JP2000_RGB,
            COMPRESSION.JPEG_2000_LOSSY,
            COMPRESSION.JPEG2000,
        ),
        _JPEG2000,
    ),
}


def tiles_problem(page: tifffile.TiffPage) -> str | None:
    """Returns the reason not to decode a page, from its tags, or None.

    Decoders allocate memory for a complete tile, also for a small picture.
    """
    for tag in ("ImageWidth", "ImageLength", "TileWidth", "TileLength", "SamplesPerPixel"):
        if len(page.tags.getall(tag) or ()) > 1:
            return f"it states its {tag} twice"
    if math.prod(page.chunks) > max(page.size, MAX_TILE_VALUES):
        return f"its tiles of {' x '.join(map(str, page.chunks))} values are much larger than the picture"
    return None


def segments_problem(page: tifffile.TiffPage, data: bytes) -> str | None:
    """Returns the reason not to decode a page, from its strips or tiles, or None: truncated, or too large."""
    if len(page.dataoffsets) > math.prod(page.chunked):
        return f"it has {len(page.dataoffsets)} strips or tiles instead of {math.prod(page.chunked)}"
    if page.compression not in {*BOUNDED, *ZSTD, *INFLATED, *EMBEDDED}:
        return (
            f"its compression {getattr(page.compression, 'name', page.compression)} is not supported; save it with "
            f"deflate"
        )
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if start + size > len(data) or not size:  # tifffile would replace the missing part by zeros
            return "the file is truncated"
        if problem := _segment_problem(page, data[start : start + size]):
            return problem
    return None


def _segment_problem(page: tifffile.TiffPage, segment: bytes) -> str | None:
    if page.compression in EMBEDDED:
        for match in EMBEDDED[page.compression].finditer(segment):
            height, width = (int.from_bytes(match[side]) for side in ("height", "width"))
            if height * width > max(page.imagelength * page.imagewidth, MAX_TILE_VALUES):
                return f"it contains an image of {width} x {height} pixels, much larger than the file states"
        if EMBEDDED[page.compression] is _JPEG and jpeg.has_many_scans(segment):
            return f"a strip or tile has more than {jpeg.MAX_SCANS} scans; save it with deflate"
    elif _is_unbounded(page.compression) and page.compression in ZSTD:
        return 'its compression needs the package imagecodecs: pip install ".[tiff]"'
    elif _is_unbounded(page.compression):
        expected = math.prod(page.chunks) * (page.dtype.itemsize if page.dtype else 1)
        unpacked = INFLATED[page.compression]().decompress(segment, expected + 1)
        if len(unpacked) > expected:
            return f"a strip or tile unpacks to more than its {expected:,} bytes"
    return None


def _is_unbounded(compression: int) -> bool:
    """Whether tifffile uses its own function, which has no size limit, because imagecodecs is not installed."""
    codec = TIFF.DECOMPRESSORS.get(compression)
    return compression in {*INFLATED, *ZSTD} and codec is not None and codec.__module__.startswith("tifffile")
