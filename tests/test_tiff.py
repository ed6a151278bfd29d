"""TIFF files of each compression: complete ones are decoded, and damaged ones are errors, never silent zeros."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae.data.decode import decode
from mae.data.pixels import BadImage

PIXELS = np.random.default_rng(0).integers(1, 65536, size=(40, 50), dtype=np.uint16)


def encoded(compression, tile) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, PIXELS, compression=compression, tile=tile, rowsperstrip=None if tile else 7)
    return stream.getvalue()


@pytest.mark.parametrize("compression", [None, "zlib", "lzma", "lzw", "packbits", "zstd", "jpeg2000"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_files_are_complete_or_an_error(compression, tile):
    data = encoded(compression, tile)
    np.testing.assert_allclose(decode(data, 1)[0] * 65535, PIXELS, atol=0.01)
    for length in range(8, len(data), 97):
        with pytest.raises(BadImage):
            decode(data[:length], 1)


def one_strip(segment: bytes, compression: int = 8, tile: int = 0, counts: int = 1) -> bytes:
    """A file of 16 x 16 pixels of 16 bits in one strip or tile."""
    tags = [(256, 16), (257, 16), (258, 16), (259, compression), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 8), (325, len(segment))] if tile else []
    tags += [] if tile else [(273, 8), (278, 16 // counts), (279, len(segment))]
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(segment)) + segment + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("data", [
    one_strip(zlib.compress(bytes(200))), one_strip(b""), one_strip(zlib.compress(bytes(256)), counts=2),
    one_strip(b"Lerc2 ", 34887), one_strip(zlib.compress(bytes(512)), tile=60_000),
], ids=["short strip", "empty strip", "a missing strip", "unknown compression", "large tile"])  # fmt: skip
def test_damaged_files_are_errors(data):
    assert decode(one_strip(zlib.compress(bytes(512))), 1).shape == (1, 16, 16)
    with pytest.raises(BadImage):
        decode(data, 1)


@pytest.mark.parametrize(("mode", "compression"), [("1", "group4"), ("P", None)])
def test_pages_of_bits_or_with_a_palette_are_no_channels(mode, compression):
    """The scanned pages of a document: an image is never the first of them."""
    pages = [Image.new(mode, (16, 16), number) for number in range(3)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], compression=compression)
    for in_chans in (1, 3):
        with pytest.raises(BadImage, match="3 pages of equal size"):
            decode(stream.getvalue(), in_chans)
