"""Small TIFF files that unpack to gigabytes, for each codec, with and without imagecodecs."""

import io
import lzma
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image

from mae.data.decode import BadImage, decode

MB = 1 << 20
DEFLATE, LZMA, JPEG2000, JPEG = 8, 34925, 34712, 7


def zeros(kind: int, size: int) -> bytes:
    """Returns `size` zero bytes, compressed."""
    packer = zlib.compressobj() if kind == DEFLATE else lzma.LZMACompressor(preset=0)
    chunks = [packer.compress(bytes(MB)) for _ in range(size // MB)]
    return b"".join(chunks) + packer.flush()


def make_tiff(segment: bytes, compression: int, bits=16, tile=0, rows=16, twice=False) -> bytes:
    """A TIFF file of 16 x 16 pixels in one strip or tile."""
    tags = [(256, 16), (257, 16), (258, bits), (259, compression), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 8), (325, len(segment))] if tile else []
    tags += [] if tile else [(273, 8), (278, rows), (279, len(segment))]
    tags += [(322, 30_000), (323, 30_000)] if twice else []
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(segment)) + segment + struct.pack("<H", len(tags)) + entries + bytes(4)


def with_false_size(kind: str, size: bytes, **options) -> bytes:
    """An image of 16 x 16 pixels that states another size."""
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, kind, **options)
    return stream.getvalue().replace(size[: len(size) // 2], size[len(size) // 2 :], 1)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Files, each with its error message in a text file; "" if the file can be decoded in bounded memory."""
    large = {"deflate": (DEFLATE, zeros(DEFLATE, 128 * MB)), "LZMA": (LZMA, zeros(LZMA, 128 * MB))}
    jpeg2000 = with_false_size("JPEG2000", struct.pack(">4I", 16, 16, 9999, 9999), no_jp2=True)
    jpeg = with_false_size("JPEG", struct.pack(">4H", 16, 16, 9999, 9999))
    files = {
        "JPEG 2000": (make_tiff(jpeg2000, JPEG2000), "9999 x 9999"),
        "JPEG": (make_tiff(jpeg, JPEG, bits=12), "9999 x 9999"),
        "stated twice": (make_tiff(large["deflate"][1], DEFLATE, tile=16, twice=True), "states its TileWidth twice"),
    }
    for name, (codec, data) in large.items():
        files[f"{name}, strip"] = make_tiff(data, codec), ""
        files[f"{name}, a strip of many rows"] = make_tiff(data, codec, rows=2**31), ""
        files[f"{name}, strip of 8 bits"] = make_tiff(data, codec, bits=8), ""
        for bits in (8, 16):
            files[f"{name}, tile of {bits} bits"] = make_tiff(data, codec, bits, tile=12_000), "larger than the picture"
    folder = tmp_path_factory.mktemp("bombs")
    for name, (data, message) in files.items():
        (folder / f"{name}.tif").write_bytes(data)
        (folder / f"{name}.txt").write_text(message)
    return folder


def check_all(folder: Path) -> None:
    """Decodes all files, and checks the growth of the memory."""
    decode(make_tiff(zlib.compress(bytes(512)), DEFLATE), 1)  # imports the modules of the first use
    for path in sorted(folder.glob("*.tif")):
        data, message = path.read_bytes(), path.with_suffix(".txt").read_text()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decode(data, 1)
            assert not message, path.stem
        except BadImage as error:
            assert message in str(error), f"{path.stem}: {error}"
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert growth < 64, f"{path.stem}: {growth:.0f} MB for {len(data):,} bytes"


@pytest.mark.parametrize("without", ["", "sys.modules['imagecodecs'] = None"], ids=["imagecodecs", "without it"])
def test_small_files_do_not_fill_the_memory(without, bombs):
    script = (
        f"import sys; sys.path[:0] = ['tests', '.']; {without}\n"
        f"from pathlib import Path; import test_tiff_bounds; test_tiff_bounds.check_all(Path({str(bombs)!r}))"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("compression", ["zlib", "lzma", "lzw", "packbits", "zstd", "jpeg2000"])
@pytest.mark.parametrize("tile", [None, (256, 256)])
def test_complete_files_are_decoded(compression, tile):
    pixels = np.random.default_rng(0).integers(0, 65536, size=(40, 50), dtype=np.uint16)
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, compression=compression, tile=tile, rowsperstrip=None if tile else 7)
    np.testing.assert_allclose(decode(stream.getvalue(), 1)[0] * 65535, pixels, atol=0.01)


def test_other_codecs_are_errors():
    with pytest.raises(BadImage, match="LERC"):
        decode(make_tiff(b"Lerc2 ", 34887), 1)
