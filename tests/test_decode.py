"""Bytes to pixels."""

import io
import zlib

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
    with pytest.raises(ValueError, match="can't be read as an image"):
        decode(b"not an image", 3)
    with pytest.raises(ValueError, match="--in_chans 5"):
        decode(encoded(Image.new("RGB", (2, 2)), "PNG"), 5)


def test_damaged_bytes_are_an_error_of_one_kind():
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"):
        whole = encoded(Image.fromarray(pixels), kind)
        for _ in range(40):
            damaged = bytearray(whole)
            damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
            try:
                assert decode(bytes(damaged), 3).mode == "RGB"
            except ValueError as error:
                assert "can't be read as an image" in str(error)


def test_deep_pixels_are_not_clipped_silently():
    deep = Image.fromarray(np.array([[0, 300], [40000, 65535]], dtype=np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(encoded(deep, "PNG"), 1)


def test_bombs_are_refused_by_their_header():
    header = encoded(Image.new("1", (8, 8)), "PNG")
    bomb = header.replace((8).to_bytes(4, "big") * 2, (20_000).to_bytes(4, "big") * 2)
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(bomb, 3)
