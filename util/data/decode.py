"""From an image file's bytes to pixels.

A decoded image is a Pillow picture where it has 8 bits and one or three channels, so that the classic transforms apply
bit for bit. Else it is a tensor (c, H, W): uint8, or float32 with 16-bit values scaled to 0 to 1 and float values as
they are.
"""

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from tifffile import EXTRASAMPLE, PHOTOMETRIC
from torch import Tensor

from util.data import jpeg, tiff_bounds
from util.files.untrusted import printable

Picture = Image.Image | Tensor

# The formats that are read, by Pillow's names. It knows more, for some of which it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
            ".tif", ".tiff", ".jp2", ".avif", ".npy")  # fmt: skip
MODES = {1: "L", 3: "RGB"}
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's own conversion from colour to grey
MAX_PIXELS = 178_956_970  # Pillow's limit, kept for all formats: small files could fill the memory when decoded
MAX_VALUES = 4 * MAX_PIXELS  # with their channels
ORIENTATION = 0x0112  # the tag of TIFF and EXIF
ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # (H, W, c) by TIFF's tag Orientation, as Pillow turns them
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # fmt: skip

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it reports of a damaged file is raised here


class BadImage(ValueError):
    """A sample of a dataset can't be decoded into an image of the requested number of channels."""


def decode(
    data: bytes | Picture | np.ndarray, in_chans: int, upright: bool = False, fast_jpeg: bool = False
) -> Picture:
    """An image file's bytes, or an opened image -> a picture of `in_chans` channels.

    Grey becomes colour by repetition and colour grey by luminance; what is transparent is laid over white; CMYK goes
    through Pillow's conversion. Other numbers of channels must be the file's own. Of several frames the first counts,
    but TIFF pages of one channel each, if there are `in_chans` of them, are its channels.

    Args:
        data: arrays are (H, W), (H, W, c) or (c, H, W).
        upright: turn a photograph as its EXIF data say that the camera was held.
        fast_jpeg: colour JPEG files become a tensor, by `util.data.jpeg`, where `in_chans` is 3.

    Raises:
        BadImage: not an image, damaged, too large, or of another number of channels.
    """
    if fast_jpeg and in_chans == 3 and isinstance(data, bytes):
        pixels = jpeg.decode_rgb(data, MAX_PIXELS)
        if pixels is not None:
            return pixels
    try:
        if isinstance(data, np.ndarray):
            axis = _channel_axis(data.shape, in_chans)
            data = _tensor(data[:, :, None] if axis is None else np.moveaxis(data, axis, 2))
        picture = read(data, in_chans) if isinstance(data, bytes) else data
        if upright and isinstance(picture, Image.Image):
            picture = _turn_upright(picture)
        return fit_channels(picture, in_chans)
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        reason = printable(" ".join(str(error).split()))
        raise BadImage(f"can't be read as an image ({type(error).__name__}: {reason})") from error


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # the EXIF data are damaged; the pixels need not be
        return picture
    return picture if turn is None else picture.transpose(turn)


def read(data: bytes, in_chans: int) -> Picture:
    """The image as its file has it; `in_chans` decides what several TIFF pages mean. Raises what decoders raise."""
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data, in_chans)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _read_tiff(data, in_chans)
    return _read_with_pillow(data)


def fit_channels(picture: Picture, in_chans: int) -> Picture:
    """A picture with the given number of channels, as `decode` describes; raises BadImage where it has others."""
    if isinstance(picture, Tensor):
        return _fit_tensor(picture, in_chans)
    if in_chans in MODES:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert(MODES[in_chans])
    if picture.mode in ("P", "CMYK"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return _fit_tensor(_tensor(np.atleast_3d(np.asarray(picture))), in_chans)


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    return (picture.shape[1], picture.shape[2]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def _fit_tensor(picture: Tensor, in_chans: int) -> Picture:
    own = len(picture)
    _check_channels(own, in_chans)
    if picture.dtype == torch.uint8 and own in MODES:
        pixels = picture.permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[:, :, 0] if own == 1 else pixels).convert(MODES[in_chans])
    if (own, in_chans) == (3, 1):
        return (picture * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(dim=0, keepdim=True)
    return picture.expand(in_chans, -1, -1)


def _check_size(height: int, width: int, channels: int = 1) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"its {width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded")
    if height * width * channels > MAX_VALUES:
        raise BadImage(f"its {channels} channels of {width} x {height} pixels are too much to decode")


def _refuse(problem: str | None) -> None:
    if problem:
        raise BadImage(problem)


def _check_channels(own: int, in_chans: int) -> None:
    """A file must have the requested channels; only gray and color are converted."""
    if own != in_chans and not (own in MODES and in_chans in MODES):
        raise BadImage(f"it has {own} channel{'s' * (own > 1)}, and in_chans is {in_chans}")


def _read_with_pillow(data: bytes) -> Picture:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("the file is not an image of a known format" if data else "the file is empty") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large to decode: {error}") from None
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PPM", "PNG")):
        pixels = np.array(picture, dtype=np.uint16)
        if "transparency" in picture.info:  # one grey value
            pixels[pixels == picture.info["transparency"]] = 65535
        return _tensor(pixels[:, :, None])
    if picture.mode in ("I", "F"):
        raise BadImage("it has 32 bits a pixel, whose range is unknown; save it as float32 in a .npy or TIFF file")
    return picture


def _channel_axis(shape: tuple[int, ...], in_chans: int) -> int | None:
    """Where an array has its `in_chans` channels, else 1 or 3 of them: last or first; None of (H, W)."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage(f"an array of shape {shape} is no image: it must be (H, W), (H, W, c) or (c, H, W)")
    if len(shape) == 2:
        return None
    fitting = [axis for sizes in ((in_chans,), MODES) for axis in (2, 0) if shape[axis] in sizes]
    if not fitting:
        raise BadImage(f"an array of shape {shape} has no {in_chans} channels, neither last nor first")
    return fitting[0]


def _read_npy(data: bytes, in_chans: int) -> Tensor:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"a .npy file of version {version} is no plain array")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    if dtype.hasobject:
        raise BadImage("an array of Python objects is no image")
    axis = _channel_axis(shape, in_chans)
    height, width = (size for a, size in enumerate(shape) if a != axis)
    _check_size(height, width, 1 if axis is None else shape[axis])
    count = int(np.prod(shape, dtype=object))
    if stream.tell() + count * dtype.itemsize > len(data):
        raise BadImage("the file is truncated")
    array = np.frombuffer(data, dtype, count, offset=stream.tell()).reshape(shape, order="F" if fortran_order else "C")
    return _tensor(array[:, :, None] if axis is None else np.moveaxis(array, axis, 2))


def _read_tiff(data: bytes, in_chans: int) -> Picture:
    """What Pillow knows of 8 bits by Pillow; deeper pixels, which it would cut to 8 bits, and channels by tifffile."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        channels, bits = page.samplesperpixel, page.bitspersample
        _check_size(page.imagelength, page.imagewidth, channels)
        if page.imagedepth > 1:
            raise BadImage(f"a TIFF file of {page.imagedepth} levels is no image")
        plain = page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB)
        _refuse(tiff_bounds.tiles_problem(page))
        pages: Any = file.pages if channels == 1 and len(file.pages) == in_chans else [page]
        if len({(p.imagelength, p.imagewidth, p.samplesperpixel, p.dtype) for p in pages}) > 1:
            pages = [page]  # the others are smaller copies of it
        of_pillow = page.dtype == np.uint8 and channels <= 4 and set(page.extrasamples) <= set(ALPHA)
        if not plain or bits < 8 or (of_pillow and len(pages) == 1):
            return _read_with_pillow(data)
        has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA and channels != in_chans
        if len(pages) == 1:  # before a great many of them are decoded in vain
            _check_channels(channels - has_alpha, in_chans)
        for p in pages:
            _refuse(tiff_bounds.tiles_problem(p) or tiff_bounds.segments_problem(p, data))
        picture = _tensor(np.concatenate([_page_pixels(p) for p in pages], axis=2))
    return _over_white(picture, page.extrasamples[0]) if has_alpha else picture


def _page_pixels(page: tifffile.TiffPage) -> np.ndarray:
    """(H, W, c), the right way up; integers of 9 to 16 bits as floats from 0 to 1."""
    try:
        pixels = page.asarray()
    except (ValueError, ImportError) as error:
        if isinstance(error, ImportError) or "imagecodecs" in str(error):
            raise BadImage('its compression needs the package imagecodecs: pip install ".[tiff]"') from error
        raise
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = pixels.astype(np.float32) / (2**page.bitspersample - 1)
        pixels = 1 - pixels if page.photometric == PHOTOMETRIC.MINISWHITE else pixels
    elif pixels.dtype == np.uint8 and page.photometric == PHOTOMETRIC.MINISWHITE:
        pixels = 255 - pixels
    pixels = np.moveaxis(pixels, 0, 2) if page.axes == "SYX" else pixels
    pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    turn = TURNS.get(page.tags.valueof("Orientation", 1))
    return turn(pixels) if turn else pixels


def _over_white(picture: Tensor, kind: int) -> Tensor:
    """Lays a picture whose last channel is its alpha over white."""
    colour, alpha = picture[:-1], picture[-1:]
    if picture.dtype == torch.uint8 or not 0 <= alpha.min() <= alpha.max() <= 1:
        raise BadImage("its transparency is not in 0 to 1")
    return (colour if kind == EXTRASAMPLE.ASSOCALPHA else colour * alpha) + (1 - alpha)


def _tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, c) as a file has it -> (c, H, W), uint8 or float32."""
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # in either byte order
        pixels = pixels.astype(np.float32) / 65535
    elif pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise BadImage("it holds values that are not finite")
    elif pixels.dtype != np.uint8:
        raise BadImage(f"the range of its {pixels.dtype} pixels is unknown; save them as uint8, uint16 or float32")
    return torch.from_numpy(np.array(np.moveaxis(pixels, 2, 0), order="C"))
