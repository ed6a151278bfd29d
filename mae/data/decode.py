"""Decodes the bytes of image files.

An image with 8 bits and one or three channels becomes a Pillow image, so that transforms of Pillow apply bit for bit.
Any other image becomes a tensor (c, H, W), uint8 or float32. 16-bit values are scaled to the range 0 to 1, and float
values are unchanged, unless `PixelValues` says otherwise.
"""

import io
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from mae.data import jpeg, large
from mae.data.item import Item
from mae.data.pixels import (
    AS_STORED,
    MAX_PIXELS,
    MODES,
    NOT_FINITE,
    SMALL,
    BadImage,
    Picture,
    PixelValues,
    check_channels,
    check_size,
    from_array,
    has_bytes,
    require_size,
    require_stored_values,
    size_of,
    to_pillow,
    to_tensor,
    to_values,
)
from mae.data.stages import has_type
from mae.files.untrusted import printable

warnings.filterwarnings("ignore", module="PIL")  # about files that it can read; `mae.data` counts them

# Supported formats, by their names in Pillow. Pillow has more formats, and starts external programs for some of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
            ".tif", ".tiff", ".jp2", ".avif", ".npy")  # fmt: skip
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in Pillow's conversion from color to gray
MAX_BAD_IN_A_ROW = 20  # unreadable images, until a script gives up
ORIENTATION = 0x0112  # the tag of TIFF and EXIF


def decode_item(
    item: Item, in_chans: int, *, values: PixelValues = AS_STORED, reduces: bool = True, **options: Any
) -> Item:
    """Decodes the image of an item, and finds its invalid pixels.

    A pixel is invalid if any of its channels is. Each channel of an invalid pixel becomes the mean of the valid ones.
    With `reduces`, large pictures are read at a reduced size, unless something else of the item has their size.

    Args:
        item: an item of a source. Its valid pixels have the size of the decoded image. Others may have any value.
        in_chans, options: as in `decode`.
        values: the meaning of the values, and the value of invalid pixels. With a range, bytes become floats.

    Raises:
        BadImage: as in `decode`, or the valid pixels have another size.
    """
    values = of_item(item, values)
    reduces = reduces and is_reducible(item, values)
    return find_invalid(item, decode(item.image, in_chans, values=values, reduces=reduces, **options), values)


def is_reducible(item: Item, values: PixelValues) -> bool:
    """Whether the picture of an item may have another size: it has no invalid pixels, mask or map."""
    return item.valid is None and values.nodata is None and not any(map(has_type, (item.label, *item.inputs.values())))


def of_item(item: Item, values: PixelValues) -> PixelValues:
    """Returns the meaning of the values in the image of an item, which may say which pixels are valid."""
    return values if item.valid is None else values._replace(has_mask=True)


def find_invalid(item: Item, picture: Picture, values: PixelValues) -> Item:
    """Returns an item with its decoded picture and the valid pixels, as `decode_item`.

    Args:
        values: as `of_item` returns it.

    Raises:
        BadImage: the valid pixels have another size, or values that are not finite.
    """
    if item.valid is None and values.nodata is None and values.value_range is None:
        return item._replace(image=picture)
    pixels = to_tensor(picture)
    if values.value_range and not pixels.is_floating_point():
        pixels = torch.from_numpy(values.to_float(pixels.numpy(), 255))
        picture = large.with_stored_size(pixels, large.stored_size(picture))
    nodata = values.nodata
    if pixels.is_floating_point() or nodata is None or nodata == "nan":
        invalid = pixels.isnan().any(dim=0)
    else:
        invalid = pixels.eq(float(nodata)).any(dim=0)
    if item.valid is not None:
        require_size(picture, item.valid.shape, "mask of valid pixels")
        invalid |= ~item.valid
        if pixels.is_floating_point() and (pixels.isinf().any(dim=0) & ~invalid).any():
            raise BadImage(NOT_FINITE)
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
    reduces: bool = False,
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
        reduces: read files with large pictures (`large.is_large`) at a quarter of their sides.

    Raises:
        BadImage: the data are not an image, are damaged or too large, or have another number of channels.
    """
    if has_bytes(data) and len(data) == in_chans and min(data.shape) > 0 and max(data.shape) <= SMALL:
        return data
    is_fast = fast_jpeg and in_chans == 3
    if is_fast and has_bytes(data) and len(data) == in_chans:
        return _fastest(data)
    if is_fast and isinstance(data, bytes) and not (upright and is_turned(data)):
        pixels = jpeg.decode_rgb(data, min(max_pixels, large.PIXELS) if reduces else max_pixels)
        if pixels is not None:
            return _fastest(pixels)
    try:
        picture = read(data, in_chans, max_pixels, values, reduces)
        stored_size = getattr(picture, "stored_size", None)
        if upright:
            picture = turned_upright(data, picture)
        picture = fit_channels(picture, in_chans, values)
        return large.with_stored_size(_fastest(picture) if is_fast else picture, stored_size)
    except BadImage:
        raise
    except Exception as error:  # decoders raise any exception on damaged bytes
        reason = printable(" ".join(str(error).split()))
        raise BadImage(f"can't be read as an image ({type(error).__name__}: {reason})") from error


def _fastest(picture: Picture) -> Picture:
    """Returns a picture of bytes in the type that is scaled faster: large ones as tensors."""
    return to_tensor(picture) if max(size_of(picture)) > SMALL else to_pillow(picture)


def turned_upright(data: bytes | Picture | np.ndarray, picture: Picture) -> Picture:
    """Applies the orientation in the EXIF data of a file that was read from `data`."""
    # Pillow's rotate, crop and convert return another class: their pixels are those that the caller wants.
    if not isinstance(data, bytes | ImageFile.ImageFile):
        return picture
    if isinstance(picture, Image.Image):
        picture.load()  # Pillow turns TIFF images when it loads them, and then removes the tag
        return ImageOps.exif_transpose(picture) if is_turned(picture) else picture
    has_exif = not isinstance(data, bytes) or data.startswith(b"\x89PNG")  # `tiff.read` turns its pictures
    if not has_exif or not is_turned(data):
        return picture
    from mae.data import tiff

    file = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    turn = tiff.TURNS[file.getexif()[ORIENTATION]]
    return from_array(turn(picture.permute(1, 2, 0).numpy()))


def is_turned(picture: Picture | bytes) -> bool:
    """Returns whether the EXIF data of a picture or a file have an orientation that its pixels do not have."""
    try:
        picture = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        return isinstance(picture, Image.Image) and picture.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # the decoder refuses the file; damaged EXIF data do not make the pixels unusable
        return False


def read(
    data: bytes | Picture | np.ndarray, in_chans: int | None, max_pixels: int = MAX_PIXELS,
    values: PixelValues = AS_STORED, reduces: bool = False,
) -> Picture:  # fmt: skip
    """Returns the picture of the data of `decode`, with its own channels.

    Args:
        in_chans: determines whether the pages of a TIFF file, or the first axis of an array, are the channels. None:
            equal pages and the shorter axis are.
        reduces: as in `decode`.

    Raises:
        Exception: any exception of the decoder.
    """
    if isinstance(data, Tensor) and data.ndim == 3 and data.dtype != torch.uint8:
        return from_array(to_values(data.detach().cpu().permute(1, 2, 0).numpy(), values))
    if isinstance(data, np.ndarray):
        axis = _channel_axis(data.shape, in_chans, values.channels_last)
        return from_array(to_values(data[:, :, None] if axis is None else np.moveaxis(data, axis, 2), values))
    if not isinstance(data, bytes):
        if isinstance(data, Image.Image) and data.mode == "F":
            return from_array(to_values(np.array(data)[:, :, None], values))
        return _with_all_bits(data, values) if isinstance(data, Image.Image) else data
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data, in_chans, max_pixels, values, reduces)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        from mae.data import tiff  # many data sets have none

        picture = tiff.read(data, in_chans, max_pixels, values, reduces)
        return _read_with_pillow(data, max_pixels, values, reduces) if picture is None else picture
    return _read_with_pillow(data, max_pixels, values, reduces)


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
    return _fit_tensor(from_array(np.atleast_3d(np.asarray(picture))), in_chans)


def _fit_tensor(picture: Tensor, in_chans: int) -> Picture:
    if picture.ndim != 3:
        raise BadImage(f"it is a tensor of shape {tuple(picture.shape)}: give (channels, height, width)")
    channels = len(picture)
    check_channels(channels, in_chans)
    if has_bytes(picture):
        return fit_channels(to_pillow(picture), in_chans)
    if (channels, in_chans) == (3, 1):
        return (picture * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(dim=0, keepdim=True)
    return picture.expand(in_chans, -1, -1)


def _read_with_pillow(data: bytes, max_pixels: int, values: PixelValues, reduces: bool) -> Picture:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("the file is not an image of a known format" if data else "the file is empty") from None
    check_size(picture.height, picture.width, 1, max_pixels)  # nothing is decoded yet
    if data.startswith(b"\xff\xd8") and jpeg.has_many_scans(data):
        raise BadImage(f"it has more than {jpeg.MAX_SCANS} scans; save it again")
    if reduces and large.is_large(picture.height, picture.width):
        require_stored_values(values, _has_stored_values(picture, data))
        with large.one_at_a_time():
            return _reduced(picture, values)
    return _with_all_bits(picture, values, data)


def _reduced(picture: ImageFile.ImageFile, values: PixelValues) -> Picture:
    """Decodes a picture to a quarter of its sides: JPEG files in the decoder, others after it has the whole picture."""

    def rows(top: int, bottom: int) -> Picture:
        strip = picture.crop((0, top, picture.width, bottom))
        strip.format = picture.format
        return _with_all_bits(strip, values)

    size = size_of(picture)
    is_jpeg = picture.draft(None, (picture.width // large.FACTOR, picture.height // large.FACTOR)) is not None
    picture.load()
    return large.with_stored_size(picture if is_jpeg else large.reduced(picture.height, rows), size)


def _has_stored_values(picture: Image.Image, data: bytes) -> bool:
    """Whether a picture is known to have the values of its file. Of TIFF files, `tiff.read` knows the bits.

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
    require_stored_values(values, _has_stored_values(picture, data))
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PPM", "PNG")):
        pixels = np.array(picture, dtype=np.uint16)
        if picture.info.get("transparency", values.nodata) != values.nodata:  # one gray value
            pixels[pixels == picture.info["transparency"]] = 65535
        return from_array(to_values(pixels[:, :, None], values))
    if picture.mode == "I" and values.value_range:
        return from_array(to_values(np.array(picture)[:, :, None], values))
    if picture.mode in ("I", "F"):
        raise BadImage("it has 32-bit pixels of unknown range; save it as float32 in a .npy or TIFF file")
    return picture


def _channel_axis(shape: tuple[int, ...], in_chans: int | None, channels_last: bool | None) -> int | None:
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
                f"the channels of an array of shape {shape} may be its last or its first axis: channels_last=true or "
                f"channels_last=false says which"
            )
        if fitting:
            return fitting[0]
    return 2 if shape[2] <= shape[0] else 0


def _read_npy(data: bytes, in_chans: int | None, max_pixels: int, values: PixelValues, reduces: bool) -> Tensor:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    if dtype.hasobject:
        raise BadImage("an array of Python objects is no image")
    axis = _channel_axis(shape, in_chans, values.channels_last)
    height, width = (size for a, size in enumerate(shape) if a != axis)
    check_size(height, width, 1 if axis is None else shape[axis], max_pixels)
    count = int(np.prod(shape, dtype=object))
    array = np.frombuffer(data, dtype, count, offset=stream.tell()).reshape(shape, order="F" if fortran_order else "C")
    array = array[:, :, None] if axis is None else np.moveaxis(array, axis, 2)
    return large.of_array(array, partial(to_values, values=values), reduces)
