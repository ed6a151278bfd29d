"""A faster decoder of JPEG files: that of torchcodec or torchvision, which use libjpeg-turbo as Pillow does.

`mae.data.bicubic` scales the pictures. Decoding and scaling together return the pixels of Pillow, bit for bit.

Pillow decodes all files that the two libraries may decode differently: gray, CMYK, 12 bits, truncated or damaged files.
"""

import contextlib
import re
import struct
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

EXIF, END, SCAN = 0xE1, 0xD9, 0xDA
# Start-of-frame markers are C0 to CF except these: Huffman tables, an extension, and conditioning of arithmetic coding.
NO_FRAME = (0xC4, 0xC8, 0xCC)
MAX_SCANS = 50  # a progressive file has about 10; each scan of a small file may process all of its pixels
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # with a length, or the end; other bytes follow FF within a scan


def has_many_scans(data: bytes) -> bool:
    """Whether a JPEG file has more than MAX_SCANS scans. libjpeg decodes any number of them."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # as in almost every file
        return False
    number, at = 0, 2
    while (match := _MARKER.search(data, at)) and data[match.start() + 1] != END and number <= MAX_SCANS:
        number += data[match.start() + 1] == SCAN
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2])
    return number > MAX_SCANS


@cache
def decoder() -> Any:
    """Returns the decoder of torchcodec or, if it is not installed, of torchvision; compiles the scaling of pictures.

    Raises:
        ImportError: numba is not installed or is incompatible with the installed NumPy: pip install ".[fast]".
    """
    import_module("mae.data.bicubic")
    with contextlib.suppress(ImportError, RuntimeError, OSError):  # not installed, or not for this PyTorch
        from torchcodec.decoders import decode_jpeg

        return decode_jpeg
    from torchvision import io  # as fast as torchcodec, but deprecated since torchvision 0.29

    return partial(io.decode_jpeg, mode=io.ImageReadMode.RGB)


def decode_rgb(data: bytes, max_pixels: int) -> torch.Tensor | None:
    """Decodes a color JPEG file with 8 bits to uint8 (3, H, W), with the pixels of Pillow, bit for bit.

    The EXIF data becomes a comment, so that the decoder ignores the orientation.

    Args:
        max_pixels: larger images are not decoded.

    Returns:
        None for all other files, which Pillow must decode.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    plain, at, is_plain = bytearray(data), 2, False
    while at + 4 <= len(plain) and plain[at] == 0xFF:
        marker, length = plain[at + 1], struct.unpack_from(">H", plain, at + 2)[0]
        if marker == SCAN:
            if not is_plain or has_many_scans(data):
                return None
            try:
                return decoder()(torch.frombuffer(plain, dtype=torch.uint8))
            except RuntimeError:  # Pillow reads the file or reports the error
                return None
        if marker == EXIF:
            plain[at + 1] = 0xFE
        elif 0xC0 <= marker <= 0xCF and marker not in NO_FRAME and at + 10 <= len(plain):
            bits, height, width, channels = struct.unpack_from(">BHHB", plain, at + 4)
            is_plain = bits == 8 and channels == 3 and 0 < height * width <= max_pixels
        at += 2 + length
    return None
