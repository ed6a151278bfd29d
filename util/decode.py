"""From an image file's bytes to pixels."""

import io

from PIL import Image

MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, in_chans: int) -> Image.Image:
    """An image file's bytes -> a picture of `in_chans` channels: 1 is grey, 3 is RGB.

    Raises:
        ValueError: there is no kind of picture with so many channels.
        OSError: the bytes are no image, or damaged.
    """
    if in_chans not in MODES:
        raise ValueError(f"--in_chans {in_chans}: image files can be read as 1 (grey) or 3 (RGB) channels")
    return Image.open(io.BytesIO(data)).convert(MODES[in_chans])
