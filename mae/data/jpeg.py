"""`--fast_jpeg`: torchcodec, or torchvision without it, decodes color JPEG files with the pixels of Pillow.

All use libjpeg-turbo. Pillow decodes the files that the others may decode differently: gray, CMYK, truncated or damaged
files.
"""

import contextlib
import io
import re
from functools import cache, partial
from typing import Any

import torch
from PIL import Image

END = 0xD9
SCAN = 0xDA
MAX_SCANS = 50  # a progressive file has about 10; each scan of a small file may process all of its pixels
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # with a length, or the end; other bytes follow FF within a scan
_EXIF = re.compile(rb"\xff\xe1(?=..Exif\0)", re.DOTALL)
_COMMENT = b"\xff\xfe"


def has_many_scans(data: bytes) -> bool:
    """Whether a JPEG file has more than MAX_SCANS scans. libjpeg decodes any number of them."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # as in almost every file
        return False
    number = 0
    at = 2
    while (match := _MARKER.search(data, at)) and data[match.start() + 1] != END and number <= MAX_SCANS:
        number += data[match.start() + 1] == SCAN
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2])
    return number > MAX_SCANS


@cache
def decoder() -> Any:
    """Returns the decoder of torchcodec; if it is not installed, or not for this PyTorch, that of torchvision."""
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        from torchcodec.decoders import decode_jpeg

        return decode_jpeg
    from torchvision import io  # as fast as torchcodec, but deprecated since torchvision 0.29

    return partial(io.decode_jpeg, mode=io.ImageReadMode.RGB)


def decode_rgb(data: bytes, max_pixels: int) -> torch.Tensor | None:
    """Decodes a color JPEG file with 8 bits to uint8 (3, H, W), as stored: without the orientation in the EXIF data.

    Args:
        max_pixels: larger images are not decoded.

    Returns:
        None for all other files, which Pillow must decode.
    """
    is_complete = data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")
    if not is_complete or has_many_scans(data):
        return None
    try:
        header = Image.open(io.BytesIO(data), formats=("JPEG",))
        if header.mode != "RGB" or header.width * header.height > max_pixels:
            return None
    except Exception:  # Pillow reports the error of the header
        return None
    # torchcodec would apply the orientation; as a comment, it has no effect.
    plain = torch.frombuffer(bytearray(_EXIF.sub(_COMMENT, data)), dtype=torch.uint8)
    try:
        return decoder()(plain)
    except RuntimeError:  # Pillow reads the file or reports the error
        return None
