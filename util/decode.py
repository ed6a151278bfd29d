"""From an image file's bytes to pixels."""

import io

from PIL import Image

MODES = {1: "L", 3: "RGB"}
DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow would clip these to 255


def decode(data: bytes, in_chans: int) -> Image.Image:
    """An image file's bytes -> a picture of `in_chans` channels: 1 is grey, 3 is RGB.

    Raises:
        ValueError: the bytes are no image, damaged, too large, or of a kind that has no such channels.
    """
    if in_chans not in MODES:
        raise ValueError(f"--in_chans {in_chans}: image files can be read as 1 (grey) or 3 (RGB) channels")
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.mode in DEEP:
            raise ValueError(f"pixels of more than 8 bits (Pillow's mode {picture.mode}) can't be read yet")
        return picture.convert(MODES[in_chans])
    except Exception as error:  # Pillow raises whatever damaged bytes lead it to; above 178 million pixels, it refuses
        raise ValueError(f"can't be read as an image: {error}") from error
