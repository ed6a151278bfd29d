"""Bytes to pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from util.decode import decode


def encoded(picture, kind):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_grey_and_colour():
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), "PNG"), 3), pixels)
    grey = Image.fromarray(pixels[..., 0])
    assert np.array_equal(decode(encoded(grey, "PNG"), 1), pixels[..., 0])
    assert np.array_equal(decode(encoded(grey, "PNG"), 3), np.repeat(pixels[..., :1], 3, axis=2))


def test_no_image_and_no_such_channels():
    with pytest.raises(OSError, match="cannot identify"):
        decode(b"not an image", 3)
    with pytest.raises(ValueError, match="--in_chans 5"):
        decode(encoded(Image.new("RGB", (2, 2)), "PNG"), 5)
