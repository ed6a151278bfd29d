"""Decodes the bytes of image files.

An image with 8 bits and one or three channels becomes a Pillow image, so that transforms of Pillow apply bit for bit.
Any other image becomes a tensor (c, H, W), uint8 or float32. 16-bit values are scaled to the range 0 to 1, and float
values are unchanged, unless `PixelValues` says otherwise.
"""

import io
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import tifffile
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tifffile import EXTRASAMPLE, PHOTOMETRIC
from torch import Tensor

from mae.data import jpeg
from mae.data.item import Item
from mae.files.untrusted import printable

Picture = Image.Image | Tensor

# Supported formats, by their names in Pillow. Pillow has more formats, and starts external programs for some of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
            ".tif", ".tiff", ".jp2", ".avif", ".npy")  # fmt: skip
MODES = {1: "L", 3: "RGB"}
SMALL = 64  # pixels per side of pictures for which Python's overhead dominates
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in Pillow's conversion from color to gray
MAX_PIXELS = 178_956_970  # Pillow's limit, here for all formats: a small file could fill the memory when decoded
VALUES_PER_PIXEL = 4  # the limit of pixels times channels is this multiple of the limit of pixels
MAX_BAD_IN_A_ROW = 20  # unreadable images, until a script gives up
ORIENTATION = 0x0112  # the tag of TIFF and EXIF
ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # arrays (H, W, c), by the TIFF tag Orientation, as in Pillow
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors of damaged files are raised instead


class BadImage(ValueError):
    """A sample of a dataset can't be decoded to an image with the requested number of channels."""


class PixelValues(NamedTuple):
    """The meaning of the values in image files and arrays.

    Args:
        nodata: the value of invalid pixels, a number or "nan". None: all pixels are valid, and NaN is an error.
        value_range: the values that become 0 and 1; values outside are not clipped. None: unsigned values of 8 and 16
            bits are scaled to 0 to 1, float values are unchanged, and other integers are an error.
        channels_last: whether arrays are (H, W, c) or (c, H, W). None: the sizes of their axes determine it.
    """

    nodata: float | str | None = None
    value_range: Sequence[float] | None = None
    channels_last: bool | None = None

    def to_float(self, pixels: np.ndarray, highest: int | None = None) -> np.ndarray:
        """Converts values of a file to float32. Invalid values become NaN.

        Args:
            highest: the value that becomes 1 without `value_range`. None: the range of integers is unknown.

        Raises:
            BadImage: the range is unknown, or a valid value is not finite.
        """
        kind = pixels.dtype.kind
        if kind not in "fiu" or (kind != "f" and not self.value_range and not highest):
            raise BadImage(
                f"the range of its {pixels.dtype} pixels is unknown: give `value_range`, or save it as uint8, uint16 "
                f"or float32"
            )
        with np.errstate(over="ignore"):  # float64 values that are infinite in float32
            if self.value_range:
                low, high = self.value_range
                values: np.ndarray = ((pixels.astype(np.float64) - low) / (high - low)).astype(np.float32)
            else:
                values = pixels.astype(np.float32) / highest if highest else pixels.astype(np.float32)
            nodata = None if self.nodata is None else float(self.nodata)
            is_known = np.isfinite(values)
            if nodata is not None:
                value = pixels.dtype.type(nodata) if kind == "f" else nodata
                invalid = np.isnan(pixels) if np.isnan(nodata) else pixels == value
                is_known |= invalid
                values[invalid] = np.nan
        if not is_known.all():
            raise BadImage("it contains values that are not finite; nodata=nan marks NaN as invalid")
        return values


AS_STORED = PixelValues()


def decode_item(item: Item, in_chans: int, *, values: PixelValues = AS_STORED, **options: Any) -> Item:
    """Decodes the image of an item, and finds its invalid pixels.

    A pixel is invalid if any of its channels is. Each channel of an invalid pixel becomes the mean of the valid ones.

    Args:
        item: an item of a source. Its valid pixels have the size of the decoded image.
        in_chans, options: as in `decode`.
        values: the meaning of the values, and the value of invalid pixels. With a range, bytes become floats.

    Raises:
        BadImage: as in `decode`, or the valid pixels have another size.
    """
    return find_invalid(item, decode(item.image, in_chans, values=values, **options), values)


def find_invalid(item: Item, picture: Picture, values: PixelValues) -> Item:
    """Returns an item with its decoded picture and the valid pixels, as `decode_item`."""
    if item.valid is None and values.nodata is None and values.value_range is None:
        return item._replace(image=picture)
    pixels = to_tensor(picture)
    if values.value_range and not pixels.is_floating_point():
        picture = pixels = torch.from_numpy(values.to_float(pixels.numpy(), 255))
    nodata = values.nodata
    if pixels.is_floating_point() or nodata is None or nodata == "nan":
        invalid = pixels.isnan().any(dim=0)
    else:
        invalid = pixels.eq(float(nodata)).any(dim=0)
    if item.valid is not None:
        require_size(picture, item.valid.shape, "mask of valid pixels")
        invalid |= ~item.valid
    if not invalid.any():
        return item._replace(image=picture, valid=None)
    return item._replace(image=_with_mean(picture, pixels, invalid), valid=~invalid)


def _with_mean(picture: Picture, pixels: Tensor, invalid: Tensor) -> Picture:
    """Returns a picture whose invalid pixels (H, W) have the mean of the valid ones, or 0 if there are none."""
    mean = pixels[:, ~invalid].double().mean(dim=1).nan_to_num(0)
    if pixels.dtype == torch.uint8:
        mean = mean.round()
    filled = torch.where(invalid, mean[:, None, None].to(pixels.dtype), pixels)
    return to_pillow(filled) if isinstance(picture, Image.Image) else filled


def decode(
    data: bytes | Picture | np.ndarray,
    in_chans: int,
    upright: bool = False,
    fast_jpeg: bool = False,
    max_pixels: int = MAX_PIXELS,
    values: PixelValues = AS_STORED,
) -> Picture:
    """Decodes the bytes of an image file, or converts an image, to a picture with `in_chans` channels.

    Gray is repeated to color, and color is converted to gray by luminance. Transparent images are composited over
    white. Pillow converts CMYK. For any other number of channels, the file must have this number. The first frame of an
    animation is decoded. If a TIFF file has `in_chans` pages with one channel each, its pages are the channels; another
    number of equal pages is no image.

    Args:
        data: bytes, a picture, or an array (H, W), (H, W, c) or (c, H, W).
        in_chans: number of channels.
        upright: apply the orientation in the EXIF data of a file, also if Image.open has read it. The pixels of an
            image that was rotated, cropped or converted since are unchanged.
        fast_jpeg: if `in_chans` is 3, return tensors instead of Pillow images with more than SMALL pixels per side.
            Color JPEG files are decoded with `mae.data.jpeg`. Tensors of bytes with up to SMALL pixels per side are
            always unchanged.
        max_pixels: limit of the pixels of a file, which is checked before they are decoded; at most MAX_PIXELS.
        values: the meaning of the values. Invalid values of floats become NaN; `decode_item` finds those of bytes.

    Raises:
        BadImage: the data are not an image, are damaged or too large, or have another number of channels.
    """
    if has_bytes(data) and len(data) == in_chans and min(data.shape) > 0 and max(data.shape) <= SMALL:
        return data
    is_fast = fast_jpeg and in_chans == 3
    if is_fast and has_bytes(data) and len(data) == in_chans:
        return _fastest(data)
    if is_fast and isinstance(data, bytes) and not (upright and is_turned(data)):
        pixels = jpeg.decode_rgb(data, max_pixels)
        if pixels is not None:
            return _fastest(pixels)
    try:
        picture = read(data, in_chans, max_pixels, values)
        # Pillow's rotate, crop and convert return another class: their pixels are those that the caller wants.
        is_file = isinstance(data, bytes | ImageFile.ImageFile)
        if upright and is_file and isinstance(picture, Image.Image):
            picture.load()  # Pillow turns TIFF images when it loads them, and then removes the tag
            picture = ImageOps.exif_transpose(picture) if is_turned(picture) else picture
        picture = fit_channels(picture, in_chans, values)
        return _fastest(picture) if is_fast else picture
    except BadImage:
        raise
    except Exception as error:  # decoders raise any exception on damaged bytes
        reason = printable(" ".join(str(error).split()))
        raise BadImage(f"can't be read as an image ({type(error).__name__}: {reason})") from error


def _fastest(picture: Picture) -> Picture:
    """Returns a picture of bytes in the type that is scaled faster: large ones as tensors."""
    return to_tensor(picture) if max(size_of(picture)) > SMALL else to_pillow(picture)


def is_turned(picture: Picture | bytes) -> bool:
    """Returns whether the EXIF data of a picture or a file have an orientation that its pixels do not have."""
    try:
        picture = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        return isinstance(picture, Image.Image) and picture.getexif().get(ORIENTATION, 1) in TURNS
    except Exception:  # the decoder refuses the file; damaged EXIF data do not make the pixels unusable
        return False


def read(
    data: bytes | Picture | np.ndarray, in_chans: int, max_pixels: int = MAX_PIXELS, values: PixelValues = AS_STORED
) -> Picture:
    """Returns the picture of the data of `decode`, with its own channels.

    Args:
        in_chans: determines whether the pages of a TIFF file, or the first axis of an array, are the channels.

    Raises:
        Exception: any exception of the decoder.
    """
    if isinstance(data, Tensor) and data.ndim == 3 and data.dtype != torch.uint8:
        return _tensor(_values(data.detach().cpu().permute(1, 2, 0).numpy(), values))
    if isinstance(data, np.ndarray):
        axis = _channel_axis(data.shape, in_chans, values.channels_last)
        return _tensor(_values(data[:, :, None] if axis is None else np.moveaxis(data, axis, 2), values))
    if not isinstance(data, bytes):
        if isinstance(data, Image.Image) and data.mode == "F":
            return _tensor(_values(np.array(data)[:, :, None], values))
        return _with_all_bits(data, values) if isinstance(data, Image.Image) else data
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data, in_chans, max_pixels, values)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _read_tiff(data, in_chans, max_pixels, values)
    return _read_with_pillow(data, max_pixels, values)


def fit_channels(picture: Picture, in_chans: int, values: PixelValues = AS_STORED) -> Picture:
    """Converts a picture to the given number of channels, as in `decode`.

    Raises:
        BadImage: the conversion is not supported, or changes the values that `values` is about.
    """
    if isinstance(picture, Tensor):
        return _fit_tensor(picture, in_chans)
    if values.nodata not in (None, "nan") and (picture.has_transparency_data or picture.mode in ("P", "PA")):
        raise BadImage(
            f"its {picture.mode} pixels are converted, and `nodata` is about the values in the file; save it without a "
            f"palette and without an alpha channel"
        )
    if in_chans in MODES:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert(MODES[in_chans])
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("P", "PA", "CMYK"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return _fit_tensor(_tensor(np.atleast_3d(np.asarray(picture))), in_chans)


def size_of(picture: Picture) -> tuple[int, int]:
    """Returns (height, width)."""
    return (picture.shape[1], picture.shape[2]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def require_size(picture: Picture, shape: Sequence[int], what: str) -> None:
    """Raises BadImage if the shape of a mask or map of a picture is not its (height, width)."""
    if tuple(shape) != size_of(picture):
        raise BadImage(f"its {what} has the shape {tuple(shape)}, and the image {size_of(picture)} (height, width)")


def has_bytes(data: Any) -> TypeGuard[Tensor]:
    """Whether data is a tensor of gray or color bytes, as `mae.data.jpeg` and `mae.data.image_cache` return."""
    return isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim == 3 and len(data) in MODES


def to_pillow(picture: Picture) -> Picture:
    """Converts a tensor of bytes to a Pillow image, for transforms that compute other pixels for tensors."""
    if not has_bytes(picture):
        return picture
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if len(picture) == 1 else pixels)


def to_tensor(picture: Picture) -> Tensor:
    """Converts a decoded picture to a tensor (c, H, W), channels last in memory. Values are not scaled."""
    if isinstance(picture, Tensor):
        return picture
    return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)


def _fit_tensor(picture: Tensor, in_chans: int) -> Picture:
    if picture.ndim != 3:
        raise BadImage(f"it is a tensor of shape {tuple(picture.shape)}: give (channels, height, width)")
    own = len(picture)
    _check_channels(own, in_chans)
    if has_bytes(picture):
        return fit_channels(to_pillow(picture), in_chans)
    if (own, in_chans) == (3, 1):
        return (picture * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(dim=0, keepdim=True)
    return picture.expand(in_chans, -1, -1)


def _check_size(height: int, width: int, channels: int, max_pixels: int) -> None:
    if height * width > max_pixels or height * width * channels > VALUES_PER_PIXEL * max_pixels:
        raise BadImage(
            f"its {width} x {height} pixels of {channels} channels are more than the limit of {max_pixels:,} pixels "
            f"of {VALUES_PER_PIXEL} channels; scale it down"
        )


def _check_channels(own: int, in_chans: int) -> None:
    """Raises BadImage if a file does not have the requested channels; only gray and color are converted."""
    if own != in_chans and not (own in MODES and in_chans in MODES):
        raise BadImage(f"it has {own} channel{'s' * (own > 1)}, and in_chans={in_chans}")


def _read_with_pillow(data: bytes, max_pixels: int, values: PixelValues) -> Picture:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("the file is not an image of a known format" if data else "the file is empty") from None
    _check_size(picture.height, picture.width, 1, max_pixels)  # nothing is decoded yet
    if data.startswith(b"\xff\xd8") and jpeg.has_many_scans(data):
        raise BadImage(f"it has more than {jpeg.MAX_SCANS} scans; save it again")
    return _with_all_bits(picture, values, data)


def _require_stored_values(values: PixelValues, are_stored: bool) -> None:
    """Raises BadImage if `values` is about the values in a file, and a decoder may have scaled or converted them."""
    if (values.value_range or values.nodata not in (None, "nan")) and not are_stored:
        raise BadImage(
            "`value_range` and `nodata` are about the values in the file, and need the path of a TIFF, JPEG or .npy "
            "file, or of a PNG file of 8 bits or of 16 bits gray; save it as .npy"
        )


def _has_stored_values(picture: Image.Image, data: bytes) -> bool:
    """Whether a picture is known to have the values of its file. Of TIFF files, `_read_tiff` knows the bits.

    Pillow scales other bits than 8 and 16, and reduces colors of 16 bits to 8. A picture of an array has no file.
    """
    if picture.format == "PNG" and data[12:16] == b"IHDR":
        return data[24] == 8 or picture.mode.startswith("I")
    is_of_array = not isinstance(picture, ImageFile.ImageFile)
    return is_of_array or picture.format == "JPEG" or (picture.format == "TIFF" and bool(data))


def _with_all_bits(picture: Image.Image, values: PixelValues, data: bytes = b"") -> Picture:
    """Converts a picture of 16 bits to a tensor; Pillow's own conversions would clip the values to 8 bits.

    Args:
        data: the bytes of its file, if they are known.

    Raises:
        BadImage: Pillow may scale the values that `values` is about, or their range is unknown.
    """
    _require_stored_values(values, _has_stored_values(picture, data))
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PPM", "PNG")):
        pixels = np.array(picture, dtype=np.uint16)
        if picture.info.get("transparency", values.nodata) != values.nodata:  # one gray value
            pixels[pixels == picture.info["transparency"]] = 65535
        return _tensor(_values(pixels[:, :, None], values))
    if picture.mode == "I" and values.value_range:
        return _tensor(_values(np.array(picture)[:, :, None], values))
    if picture.mode in ("I", "F"):
        raise BadImage("it has 32-bit pixels of unknown range; save it as float32 in a .npy or TIFF file")
    return picture


def _channel_axis(shape: tuple[int, ...], in_chans: int, channels_last: bool | None) -> int | None:
    """Returns the axis of the channels: the last or first with `in_chans`, else 1 or 3 entries. None for (H, W).

    If neither axis fits, it is the shorter one of both, and `fit_channels` refuses its length.

    Raises:
        BadImage: the shape is not that of an image, or does not say which axis it is, and `channels_last` is None.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage(f"an array of shape {shape} is no image: the shape must be (H, W), (H, W, c) or (c, H, W)")
    if len(shape) == 2:
        return None
    if channels_last is not None:
        return 2 if channels_last else 0
    for sizes in ((in_chans,), MODES):
        fitting = [axis for axis in (2, 0) if shape[axis] in sizes]
        if len(fitting) > 1:
            raise BadImage(
                f"the channels of an array of shape {shape} may be its last or its first axis: channels_last=True or "
                f"channels_last=False says which"
            )
        if fitting:
            return fitting[0]
    return 2 if shape[2] <= shape[0] else 0


def _read_npy(data: bytes, in_chans: int, max_pixels: int, values: PixelValues) -> Tensor:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    if dtype.hasobject:
        raise BadImage("an array of Python objects is no image")
    axis = _channel_axis(shape, in_chans, values.channels_last)
    height, width = (size for a, size in enumerate(shape) if a != axis)
    _check_size(height, width, 1 if axis is None else shape[axis], max_pixels)
    count = int(np.prod(shape, dtype=object))
    array = np.frombuffer(data, dtype, count, offset=stream.tell()).reshape(shape, order="F" if fortran_order else "C")
    return _tensor(_values(array[:, :, None] if axis is None else np.moveaxis(array, axis, 2), values))


def _read_tiff(data: bytes, in_chans: int, max_pixels: int, values: PixelValues) -> Picture:
    """Reads 8-bit images with Pillow if it has their mode, and other images, which it would reduce, with tifffile."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        channels, bits = page.samplesperpixel, page.bitspersample
        _check_size(page.imagelength, page.imagewidth, channels, max_pixels)
        if page.imagedepth > 1:
            raise BadImage(f"it is a volume with {page.imagedepth} levels, not an image")
        plain = page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB)
        if math.prod(page.chunks) > VALUES_PER_PIXEL * max_pixels:  # decoders allocate a complete tile
            raise BadImage(f"its tiles of {' x '.join(map(str, page.chunks))} values are too large")
        pages: Any = file.pages if channels == 1 and len(file.pages) == in_chans else [page]
        if len({(p.imagelength, p.imagewidth, p.samplesperpixel, p.dtype) for p in pages}) > 1:
            pages = [page]  # the other pages are smaller copies of the first one
        if len(pages) == 1 and _is_stack(file.pages):
            count = len(file.pages)
            raise BadImage(f"it has {count} pages of equal size, and in_chans={in_chans}")
        if values.nodata is not None and page.photometric == PHOTOMETRIC.MINISWHITE and bits <= 8:
            raise BadImage("its value 0 is white, so `nodata` has two meanings; save it with 0 as black")
        of_pillow = page.dtype == np.uint8 and channels <= 4 and set(page.extrasamples) <= set(ALPHA)
        if not plain or bits < 8 or (of_pillow and len(pages) == 1):
            _require_stored_values(values, bits == 8)
            return _read_with_pillow(data, max_pixels, values)
        has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA and channels != in_chans
        if len(pages) == 1:  # checked before many channels are decoded
            _check_channels(channels - has_alpha, in_chans)
        for p in pages:
            _require_complete(p, len(data))
        picture = _tensor(np.concatenate([_page_pixels(p, values) for p in pages], axis=2))
    return _over_white(picture, page.extrasamples[0]) if has_alpha else picture


def _require_complete(page: tifffile.TiffPage, length: int) -> None:
    """Raises BadImage if strips or tiles of a page are not in its file. tifffile would replace them by zeros."""
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(segments) != math.prod(page.chunked):
        raise BadImage(f"it has {len(segments)} strips or tiles instead of {math.prod(page.chunked)}")
    if any(not size or start + size > length for start, size in segments):
        raise BadImage("the file is truncated")


def _is_stack(pages: Any) -> bool:
    """Whether the second page of a TIFF file has the size and channels of the first, and is no reduced copy or mask."""
    if len(pages) == 1:
        return False
    first, second = ((p.imagelength, p.imagewidth, p.samplesperpixel, p.dtype) for p in pages[:2])
    return first == second and not (pages[1].is_reduced or pages[1].subfiletype & 4)


def _page_pixels(page: tifffile.TiffPage, values: PixelValues) -> np.ndarray:
    """Decodes a page to (H, W, c), turned upright, uint8 or float32; 9 to 16 bits become floats from 0 to 1."""
    pixels = page.asarray()
    inverted = page.photometric == PHOTOMETRIC.MINISWHITE and pixels.dtype.kind != "f"
    pixels = _values(pixels, values, 2**page.bitspersample - 1)
    if inverted:
        pixels = (255 if pixels.dtype == np.uint8 else 1) - pixels
    pixels = np.moveaxis(pixels, 0, 2) if page.axes == "SYX" else pixels
    pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    turn = TURNS.get(page.tags.valueof("Orientation", 1))
    return turn(pixels) if turn else pixels


def _over_white(picture: Tensor, kind: int) -> Tensor:
    """Composites a picture over white; its last channel is alpha."""
    color, alpha = picture[:-1], picture[-1:]
    if picture.dtype == torch.uint8 or ((alpha < 0) | (alpha > 1)).any():
        raise BadImage("its alpha channel is not in the range 0 to 1")
    return (color if kind == EXTRASAMPLE.ASSOCALPHA else color * alpha) + (1 - alpha)


def _values(pixels: np.ndarray, values: PixelValues, highest: int = 65535) -> np.ndarray:
    """Returns bytes unchanged, and other values as float32.

    Args:
        highest: the value of 16 bits that becomes 1.
    """
    is_deep = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2  # in either byte order
    return pixels if pixels.dtype == np.uint8 else values.to_float(pixels, highest if is_deep else None)


def _tensor(pixels: np.ndarray) -> Tensor:
    """Array (H, W, c), uint8 or float32 -> tensor (c, H, W)."""
    return torch.from_numpy(np.array(np.moveaxis(pixels, 2, 0), order="C"))
