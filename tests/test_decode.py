"""Decoding: a table of unusual files with the expected pixels, and damaged files."""

import io
import random
import struct
import zlib
from pathlib import Path

import augmentations
import mutations
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from mae.data import transforms
from mae.data.decode import decode
from mae.data.pixels import BadImage, size_of

RAMP = np.arange(0, 252, 7, dtype=np.uint8).reshape(3, 4, 3)  # of make_imagemagick.sh
GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, size=(5, 6, 1), dtype=np.uint8)
GRAY = RGB[:, :, :1]
DEEP = GENERATOR.integers(0, 65536, size=(5, 6, 13), dtype=np.uint16)
FLOATS = GENERATOR.normal(size=(5, 6, 13)).astype(np.float32)
UNIT = DEEP.astype(np.float32) / 65535


def saved(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(picture.squeeze()) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels, photometric="minisblack", **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric=photometric, **options)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def chunk(kind, data) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, depth, color_type, extra=b"", size=None) -> bytes:
    """Builds a PNG file of a kind that Pillow can't write, with unfiltered rows; `size`: in the header."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *(size or pixels.shape[1::-1]), depth, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def transparent(value) -> bytes:
    return chunk(b"tRNS", value.astype(">u2").tobytes())


def bmp_top_down(pixels) -> bytes:
    """A BMP file with rows from the top, which a negative height indicates."""
    data = saved(pixels[::-1], "BMP")
    return data[:22] + struct.pack("<i", -len(pixels)) + data[26:]


def over_white(color, alpha):
    """Composites over opaque white with the rounding of Pillow's `alpha_composite`."""
    blended = color.astype(int) * alpha * 255 + 255 * 255 * (255 - alpha.astype(int))
    return np.round(blended / 255 / 255)


def flat(*values):
    return np.tile(np.array(values, dtype=np.uint8), (16, 16, 1))


def magick(name) -> bytes:
    return Path(__file__).parent.joinpath("fixtures/imagemagick", name).read_bytes()


RGBA = np.concatenate([RGB, ALPHA], axis=2)
CMYK = GENERATOR.integers(0, 256, size=(5, 6, 4), dtype=np.uint8)
INK = 255 - CMYK[:, :, 3:].astype(int)
PALETTE = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]], dtype=np.uint8)
INDICES = GENERATOR.integers(0, 3, size=(5, 6), dtype=np.uint8)
COLORED = Image.fromarray(INDICES).copy()
COLORED.putpalette(PALETTE.tobytes())
BITS = (GRAY > 127).astype(np.uint8) * 255
TWELVE = np.array([[[0], [4095]], [[2048], [1]]], dtype=np.uint16)
BLENDED = UNIT[:, :, :3] * UNIT[:, :, 3:4] + 1 - UNIT[:, :, 3:4]

# name: (bytes, --in_chans, expected pixels (H, W, c) in 0 to 255, or float where the file is deeper, tolerance)
TABLE = {
    "PNG, gray as color": (saved(GRAY, "PNG"), 3, GRAY.repeat(3, axis=2)),
    "PNG, color as gray": (saved(RGB, "PNG"), 1, np.round(RGB @ [[0.299], [0.587], [0.114]]), 1),
    "PNG, alpha over white": (saved(RGBA, "PNG"), 3, over_white(RGB, ALPHA), 1),
    "PNG, alpha as a channel": (saved(RGBA, "PNG"), 4, RGBA),
    "PNG, gray and alpha": (saved(np.concatenate([GRAY, ALPHA], axis=2), "PNG"), 1, over_white(GRAY, ALPHA), 1),
    "PNG, palette with a transparent color":
        (saved(COLORED, "PNG", transparency=1), 3, np.where(INDICES[..., None] == 1, 255, PALETTE[INDICES])),
    "PNG, palette's own channels": (saved(COLORED, "PNG", transparency=b"\0\xff\xff"), 4,
        np.concatenate([PALETTE[INDICES], np.where(INDICES[..., None] == 0, 0, 255)], axis=2)),
    "PNG, one bit": (saved(Image.fromarray(BITS[..., 0]).convert("1"), "PNG"), 1, BITS),
    "PNG, 16 bits gray": (saved(DEEP[..., :1], "PNG"), 1, UNIT[..., :1]),
    "PNG, 16 bits gray as color": (saved(DEEP[..., :1], "PNG"), 3, UNIT[..., :1].repeat(3, axis=2)),
    "PNG, 16 bits with a transparent gray": (png(DEEP[..., :1], 16, 0, transparent(DEEP[2, 3, :1])), 1,
        np.where(DEEP[..., :1] == DEEP[2, 3, 0], 1.0, UNIT[..., :1]).astype(np.float32)),
    "PNG, 16 bits color, of which Pillow reads 8": (png(DEEP[..., :3], 16, 2), 3, DEEP[..., :3] >> 8),
    "PNG, color with a transparent one": (png(RGB, 8, 2, transparent(RGB[1, 1])), 3,
        np.where((RGB[1, 1] == RGB).all(axis=2, keepdims=True), 255, RGB)),
    "JPEG, flat gray": (saved(flat(100)[..., :1], "JPEG"), 3, flat(100, 100, 100)),
    "JPEG, CMYK": (saved(Image.fromarray(CMYK * 0 + np.uint8(40), "CMYK").resize((16, 16)), "JPEG", quality=100), 3,
        flat(*[255 - 40 - round(215 * 40 / 255)] * 3), 1),
    "BMP, rows from the top": (bmp_top_down(RGB), 3, RGB),
    "GIF, first of two frames":
        (saved(COLORED, "GIF", save_all=True, append_images=[Image.new("P", (6, 5))]), 3, PALETTE[INDICES]),
    "PGM, text": (b"P2\n# by hand\n2 1\n255\n7 250\n", 1, np.array([[[7], [250]]])),
    "PGM, 16 bits": (b"P5 2 1 65535\n" + struct.pack(">HH", 300, 65535), 1,
        np.array([[[300 / 65535], [1.0]]], dtype=np.float32)),
    "WebP, lossless with alpha": (saved(RGBA, "WEBP", lossless=True, exact=True), 3, over_white(RGB, ALPHA), 1),
    "JPEG 2000, lossless": (saved(RGB, "JPEG2000"), 3, RGB),
    "TIFF, CMYK": (tiff(CMYK, "separated"), 3, INK - np.round(INK * CMYK[:, :, :3] / 255), 1),
    "TIFF, white is zero": (tiff(GRAY[..., 0], "miniswhite"), 1, 255 - GRAY),
    "TIFF, 16 bits, white is zero": (tiff(DEEP[..., 0], "miniswhite"), 1, 1 - UNIT[..., :1]),
    "TIFF, 16 bits color as gray":
        (tiff(DEEP[..., :3], "rgb"), 1, UNIT[..., :3] @ np.float32([[0.299], [0.587], [0.114]])),
    "TIFF, 16 bits, alpha": (tiff(DEEP[..., :4], "rgb", extrasamples=["unassalpha"]), 3, BLENDED),
    "TIFF, 8 bits, alpha": (tiff(RGBA, "rgb", extrasamples=["unassalpha"]), 3, over_white(RGB, ALPHA), 1),
    "TIFF, 13 channels of 16 bits": (tiff(DEEP, planarconfig="contig"), 13, UNIT),
    "TIFF, 13 channels in planes, big-endian":
        (tiff(np.moveaxis(DEEP, 2, 0), planarconfig="separate", byteorder=">"), 13, UNIT),
    "TIFF, 13 channels of 8 bits": (tiff((DEEP >> 8).astype(np.uint8), planarconfig="contig"), 13, DEEP >> 8),
    "TIFF, 13 pages": (tiff(np.moveaxis(DEEP, 2, 0)), 13, UNIT),
    "TIFF, 13 pages of 8 bits, white is zero":
        (tiff(np.moveaxis((DEEP >> 8).astype(np.uint8), 2, 0), "miniswhite"), 13, 255 - (DEEP >> 8)),
    "TIFF, 13 channels of float, in tiles":
        (tiff(np.tile(FLOATS, (4, 3, 1)), planarconfig="contig", tile=(16, 16)), 13, np.tile(FLOATS, (4, 3, 1))),
    "TIFF, float, deflated": (tiff(FLOATS[..., 0], compression="zlib", predictor=True), 1, FLOATS[..., :1]),
    "TIFF, 8 bits and a fourth channel that is not alpha": (tiff(RGBA, "rgb", extrasamples=["unspecified"]), 4, RGBA),
    "TIFF, 12 bits, scaled by their own range": (tiff(TWELVE, bitspersample=12), 1, TWELVE / np.float32(4095)),
    "BigTIFF": (tiff(DEEP[..., 0], bigtiff=True), 1, UNIT[..., :1]),
    "npy, channels last": (npy(RGB), 3, RGB),
    "npy, channels first": (npy(np.moveaxis(DEEP, 2, 0)), 13, UNIT),
    "npy, gray, Fortran order": (npy(np.asfortranarray(FLOATS[..., 0])), 1, FLOATS[..., :1]),
    "npy, big-endian": (npy(DEEP.astype(">u2")), 13, UNIT),
    "npy, double": (npy(FLOATS.astype(np.float64)), 13, FLOATS),
    **{f"ImageMagick, {name}": (magick(name), 3, RAMP) for name in (
        "rgb.png", "interlaced.png", "palette.png", "rgb.bmp", "rgb.ppm", "lossless.webp", "lzw.tif", "zip.tif",
        "big_endian.tif", "deep.png",
    )},
    **{f"ImageMagick, {name}": (magick(name), 3, RAMP.astype(np.float32) / 255, 1e-6) for name in (
        "deep.tif", "deep_lzw.tif", "float.tif",
    )},
    "ImageMagick, alpha.png": (magick("alpha.png"), 3, np.round(RAMP * 0.4 + 255 * 0.6), 1),
    "ImageMagick, gray.jpg": (magick("gray.jpg"), 1, flat(100)),
    "ImageMagick, progressive.jpg": (magick("progressive.jpg"), 3, flat(100, 100, 100)),
    "ImageMagick, cmyk.jpg": (magick("cmyk.jpg"), 3, flat(200, 200, 200)),
    "ImageMagick, cmyk.tif": (magick("cmyk.tif"), 3, np.tile([184, 138, 230], (3, 4, 1))),
}  # fmt: skip


def pixels_of(picture) -> np.ndarray:
    """(H, W, c)."""
    if isinstance(picture, torch.Tensor):
        return picture.permute(1, 2, 0).numpy()
    return np.atleast_3d(np.asarray(picture))


@pytest.mark.parametrize("name", TABLE)
def test_unusual_files_decode_to_the_expected_pixels(name):
    """Images of 8 bits are Pillow images, to which torchvision's published crops and resizes apply."""
    data, in_chans, expected, *tolerance = TABLE[name]
    picture = decode(data, in_chans)
    assert isinstance(picture, Image.Image) == (in_chans in (1, 3) and expected.dtype != np.float32)
    found = pixels_of(picture)
    assert found.dtype == (np.float32 if expected.dtype == np.float32 else np.uint8)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(float), expected, rtol=0, atol=tolerance[0] if tolerance else 1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_as_in_pillow(orientation):
    """The pixels of an image that was turned, by this library or by the user, are those that the user wants."""
    exif = Image.Exif()
    exif[274] = orientation
    for file in (saved(RGB, "PNG", exif=exif), saved(RGB, "JPEG", exif=exif, quality=100)):
        opened = Image.open(io.BytesIO(file))
        upright = decode(file, 3, upright=True)
        assert np.array_equal(upright, ImageOps.exif_transpose(opened))
        assert np.array_equal(decode(opened, 3, upright=True), upright)
        assert np.array_equal(decode(file, 3), opened)  # in datasets
        assert np.array_equal(decode(upright, 3, upright=True), upright)
        for changed in (opened.rotate(90, expand=True), opened.crop((0, 0, 3, 2)), opened.convert("RGB")):
            assert np.array_equal(decode(changed, 3, upright=True), changed.convert("RGB"))
    deep = saved(DEEP[:, :, 0], "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(deep))), dtype=np.float32) / 65535
    for data in (deep, Image.open(io.BytesIO(deep))):
        np.testing.assert_allclose(decode(data, 1, upright=True)[0], expected, atol=1e-7)
    assert np.array_equal(decode(deep, 1)[0], UNIT[:, :, 0])


@pytest.mark.parametrize(("orientation", "rows"), {
    1: ["abc", "def"], 2: ["cba", "fed"], 3: ["fed", "cba"], 4: ["def", "abc"],
    5: ["ad", "be", "cf"], 6: ["da", "eb", "fc"], 7: ["fc", "eb", "da"], 8: ["cf", "be", "ad"],
}.items())  # fmt: skip
def test_the_orientation_of_a_tiff_is_applied_once(orientation, rows):
    """Also by the decoder of 16 bits."""
    stored = np.array([list(b"abc"), list(b"def")], dtype=np.uint8)
    expected = [list(row.encode()) for row in rows]
    for compression in (None, "tiff_lzw"):
        file = saved(stored, "TIFF", tiffinfo={274: orientation}, compression=compression)
        for upright in (True, False):
            assert np.asarray(decode(file, 1, upright)).tolist() == expected
    deep = tiff(stored.astype(np.uint16) * 257, extratags=[(274, 3, 1, orientation, True)])
    for upright in (True, False):
        np.testing.assert_allclose(decode(deep, 1, upright)[0] * 255, expected, atol=1e-4)


def test_bits_and_transparent_palettes_have_their_own_channels():
    with pytest.raises(BadImage, match="in_chans=4"):
        decode(Image.new("1", (2, 2)), 4)
    picture = Image.new("P", (1, 1), 1)
    picture.putpalette(PALETTE.tobytes())
    picture = picture.convert("PA")
    assert pixels_of(decode(picture, 4)).tolist() == [[[200, 100, 50, 255]]]
    with pytest.raises(BadImage, match="in_chans=2"):
        decode(picture, 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", [b"II*\0\xff\xff\xff\xff", b"XX*\0\x08\0\0\0", b"II*\0\x08\0\0\x7f"])
def test_damaged_exif_data_are_ignored(kind, damage):
    exif = Image.Exif()
    exif[274] = 6
    file = saved(RGB, kind, exif=exif)
    place = file.index(b"MM\0*" if b"MM\0*" in file else b"II*\0")
    broken = bytearray(file)
    broken[place : place + 8] = damage
    if kind == "PNG":  # whose chunks have checksums
        start = broken.index(b"eXIf")
        end = start + 4 + struct.unpack(">I", broken[start - 4 : start])[0]
        broken[end : end + 4] = struct.pack(">I", zlib.crc32(broken[start:end]))
    assert np.array_equal(decode(bytes(broken), 3, upright=True), decode(file, 3))


def test_pages_of_other_sizes_are_no_channels():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for side in (8, 4, 2):  # a picture and its overviews
            writer.write(np.full((side, side), 1000 * side, dtype=np.uint16), photometric="minisblack")
    assert pixels_of(decode(buffer.getvalue(), 3)).shape == (8, 8, 3)


def test_transforms_accept_pillow_images_and_tensors():
    """Deep images are tensors; the same random numbers crop and flip them like Pillow images."""
    deep, shallow = decode(saved((RGB[..., 0].astype(np.uint16) * 257), "PNG"), 1), decode(saved(GRAY, "PNG"), 1)
    evaluation = (augmentations.eval_transform(size, crop_pct=0.875) for size in (8, (4, 8)))
    for transform in (augmentations.pretrain_transform(8), *evaluation):
        made = []
        for picture in (deep, shallow):
            torch.manual_seed(3)
            made.append(transforms.to_unit_range(transform(picture)))
        assert made[0].dtype == torch.float32
        torch.testing.assert_close(made[0].clamp(0, 1), made[1], rtol=0, atol=0.02)


BAD = {
    "empty": (b"", 3, "the file is empty"),
    "text": (b"not an image", 3, "not an image of a known format"),
    "postscript, which Pillow would hand to another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 3, "known format"),
    "truncated JPEG": (saved(flat(1, 2, 3), "JPEG")[:-40], 3, "(?i)truncated"),
    "truncated PNG": (saved(RGB, "PNG")[:-30], 3, "image"),
    "truncated TIFF": (tiff(DEEP, planarconfig="contig")[:-300], 13, "truncated"),
    "truncated npy": (npy(DEEP)[:-1], 13, "buffer is smaller"),
    "PNG bomb": (png(np.zeros((1, 1, 1)), 1, 0, size=(20_000, 20_000)), 1, "DecompressionBombError"),
    "npy bomb": (npy(np.zeros((1, 1), dtype=np.uint8)).replace(b"(1, 1)", b"(20000, 20000)"), 1, "more than the"),
    "TIFF bomb": (tiff(np.zeros((20000, 20000), dtype=np.uint8), compression="zlib"), 1, "more than the"),
    "color for 5 channels": (saved(RGB, "PNG"), 5, "in_chans=5"),
    "gray for 2 channels": (saved(GRAY, "PNG"), 2, "in_chans=2"),
    "13 channels for color": (tiff(DEEP, planarconfig="contig"), 3, "13 channels"),
    "an array for color": (npy(DEEP), 3, "5 channels"),
    "a great many channels": (tiff(np.zeros((9, 9, 100), np.uint16), planarconfig="contig"), 3, "100 channels"),
    "too many channels": (npy(np.zeros((1, 1, 1), np.uint8)).replace(b"(1, 1, 1)", b"(9000, 9000, 9)"), 9,
                          "more than the limit"),
    "CMYK for 4 channels": (magick("cmyk.tif"), 4, "in_chans=4"),
    "signed bytes": (tiff(np.ones((4, 4), dtype=np.int8)), 1, "int8"),
    "float color with alpha to 255": (tiff(np.full((4, 4, 4), 200, np.float32), "rgb", extrasamples=["unassalpha"]), 3,
                                      "0 to 1"),
    "not a number": (npy(np.full((4, 4), np.nan)), 1, "not finite"),
    "integers without a range": (npy(np.ones((4, 4), dtype=np.int64)), 1, "int64"),
    "32-bit TIFF": (tiff(np.ones((4, 4), dtype=np.uint32)), 1, "uint32"),
    "a stack of gray pages": (tiff(np.zeros((5, 8, 9), dtype=np.uint8)), 1, "it has 5 pages"),
    "a stack of color pages": (tiff(np.zeros((2, 8, 9, 3), dtype=np.uint8), "rgb"), 3, "it has 2 pages"),
    "one axis": (npy(np.ones(4, dtype=np.uint8)), 1, r"\(4,\)"),
    "no pixels": (npy(np.ones((0, 4), dtype=np.uint8)), 1, r"\(0, 4\)"),
    "pickled objects": (npy(np.array([[{}, {}]])), 1, "Python objects"),
    **{f"a tensor with {len(shape)} axes": (torch.zeros(shape, dtype=torch.uint8), 1, "height, width")
       for shape in ((), (3,), (1, 5), (1, 2, 3, 4))},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_errors(name):
    data, in_chans, message = BAD[name]
    with pytest.raises(BadImage, match=message) as raised:
        decode(data, in_chans)
    assert "\n" not in str(raised.value)


def declared_size(data) -> tuple[int, int]:
    """(height, width) in the header of a file, read by other code than `decode`'s if possible."""
    if data.startswith(b"\x93NUMPY"):
        shape = np.load(io.BytesIO(data)).shape
        return (shape[1], shape[2]) if shape[0] == 13 else (shape[0], shape[1])
    if data[:2] in (b"II", b"MM"):
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return file.pages.first.imagelength, file.pages.first.imagewidth
    picture = Image.open(io.BytesIO(data))
    return picture.height, picture.width


def test_mutated_files_decode_or_raise_bad_image(recwarn):
    """Decoded images have the size in the header and can be augmented. test_fuzz.py limits time and memory."""
    wide = GENERATOR.integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    deep = GENERATOR.integers(0, 65536, size=(13, 40, 50), dtype=np.uint16)
    whole = [
        *((saved(wide, kind), 3) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF", "JPEG2000")),
        (tiff(deep), 13), (tiff(np.moveaxis(deep, 0, 2), planarconfig="contig", compression="zlib"), 13),
        (tiff(deep[:3], "rgb", planarconfig="separate", tile=(16, 16)), 3), (npy(deep), 13),
    ]  # fmt: skip
    transform, read, generator = augmentations.pretrain_transform(16), 0, random.Random(1)
    for number in range(300):
        data, in_chans = whole[number % len(whole)]
        mutated = mutations.flip(data, [], generator)
        try:
            picture = decode(mutated, in_chans)
        except BadImage as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert size_of(picture) == declared_size(mutated)
        assert pixels_of(picture).shape == (*size_of(picture), in_chans)
        assert transform(picture).shape == (in_chans, 16, 16)
    assert 30 < read < 270


@pytest.mark.parametrize("data", [npy(RGB), tiff(RGB, "rgb"), tiff(DEEP[:, :, :3], "rgb"), saved(RGB, "PNG"),
                                  saved(RGB, "JPEG")], ids=["npy", "TIFF", "TIFF, 16 bits", "PNG", "JPEG"])  # fmt: skip
def test_a_lower_limit_of_pixels(data):
    assert size_of(decode(data, 3, max_pixels=30)) == (5, 6)
    for fast_jpeg in (False, True):
        with pytest.raises(BadImage, match="6 x 5"):
            decode(data, 3, fast_jpeg=fast_jpeg, max_pixels=29)
