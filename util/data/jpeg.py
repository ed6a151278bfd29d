"""A faster way from a JPEG file's bytes to its pixels: torchcodec's decoder, which shares Pillow's libjpeg-turbo.

Crops of them are scaled by `util.data.bicubic`, so that all in all the way has Pillow's pixels, bit for bit.

What it is not sure to read as Pillow does (grey, CMYK, 12 bits, truncated or damaged files) it leaves to Pillow.
"""

import struct
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

EXIF, END, SCAN = 0xE1, 0xD9, 0xDA
# Start-of-frame markers are C0 to CF but for these (tables, an extension, arithmetic coding's conditioning).
NO_FRAME = (0xC4, 0xC8, 0xCC)


@cache
def decoder() -> Any:
    """torchcodec's function; and what scales its pictures is compiled.

    Raises:
        ValueError: torchcodec or numba is not installed, or does not fit the installed PyTorch or NumPy.
    """
    try:
        from torchcodec.decoders import decode_jpeg

        import_module("util.data.bicubic")
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'--fast_jpeg needs the packages torchcodec and numba: pip install ".[fast]" ({reason})'
        ) from error
    return decode_jpeg


def decode_rgb(data: bytes, max_pixels: int) -> Tensor | None:
    """A colour JPEG of 8 bits -> uint8 (3, H, W), Pillow's pixels bit for bit; None of anything else.

    Args:
        max_pixels: of a larger image, too, the answer is None.
    """
    plain = _without_orientation(data, max_pixels)
    if plain is None:
        return None
    try:
        return decoder()(torch.frombuffer(plain, dtype=torch.uint8))
    except RuntimeError:  # Pillow shall say what is wrong, or read it
        return None


def _without_orientation(data: bytes, max_pixels: int) -> bytearray | None:
    """The file with its EXIF data made a comment, so that no decoder turns the picture; None if it is not plain."""
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    plain, at, is_plain = bytearray(data), 2, False
    while at + 4 <= len(plain) and plain[at] == 0xFF:
        marker, length = plain[at + 1], struct.unpack_from(">H", plain, at + 2)[0]
        if marker == SCAN:
            return plain if is_plain else None
        if marker == EXIF:
            plain[at + 1] = 0xFE
        elif 0xC0 <= marker <= 0xCF and marker not in NO_FRAME and at + 10 <= len(plain):
            bits, height, width, channels = struct.unpack_from(">BHHB", plain, at + 4)
            is_plain = bits == 8 and channels == 3 and 0 < height * width <= max_pixels
        at += 2 + length
    return None
