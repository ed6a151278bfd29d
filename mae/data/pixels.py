"""Decoded pixels: the types of a picture, the meaning of its values, and their limits."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Picture = Image.Image | Tensor

MODES = {1: "L", 3: "RGB"}
SMALL = 64  # pixels per side of pictures for which Python's overhead dominates
MAX_PIXELS = 178_956_970  # Pillow's limit, here for all formats: a small file could fill the memory when decoded
NOT_FINITE = "it contains values that are not finite; nodata=nan marks NaN as invalid"
VALUES_PER_PIXEL = 4  # the limit of pixels times channels is this multiple of the limit of pixels


class BadImage(ValueError):
    """A sample of a dataset can't be decoded to an image with the requested number of channels."""


class PixelValues(NamedTuple):
    """The meaning of the values in image files and arrays.

    Args:
        nodata: the value of invalid pixels, a number or "nan". None: all pixels are valid, and NaN is an error.
        value_range: the values that become 0 and 1; values outside are not clipped. None: unsigned values of 8 and 16
            bits are scaled to 0 to 1, float values are unchanged, and other integers are an error.
        channels_last: whether arrays are (H, W, c) or (c, H, W). None: the sizes of their axes determine it.
        has_mask: the item says which pixels are valid. Others may have any value, also NaN.
    """

    nodata: float | str | None = None
    value_range: Sequence[float] | None = None
    channels_last: bool | None = None
    has_mask: bool = False

    def to_float(self, pixels: np.ndarray, highest: int | None = None) -> np.ndarray:
        """Converts values of a file to float32. Invalid values become NaN; with a mask, not finite ones infinite.

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
        if self.has_mask:
            values[~is_known] = np.inf  # `decode.find_invalid` refuses them in valid pixels
        elif not is_known.all():
            raise BadImage(NOT_FINITE)
        return values


AS_STORED = PixelValues()


def size_of(picture: Picture) -> tuple[int, int]:
    """Returns (height, width)."""
    return (picture.shape[1], picture.shape[2]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def require_size(picture: Picture, shape: Sequence[int], what: str) -> None:
    """Raises BadImage if the shape of a mask or map of a picture is not its (height, width)."""
    if tuple(shape) != size_of(picture):
        raise BadImage(f"its {what} has the shape {tuple(shape)}, and the image {size_of(picture)} (height, width)")


def check_size(height: int, width: int, channels: int, max_pixels: int) -> None:
    """Raises BadImage if an image would take too much memory when it is decoded."""
    if height * width > max_pixels or height * width * channels > VALUES_PER_PIXEL * max_pixels:
        raise BadImage(
            f"its {width} x {height} pixels of {channels} channels are more than the limit of {max_pixels:,} pixels "
            f"of {VALUES_PER_PIXEL} channels; scale it down"
        )


def check_channels(channels: int, in_chans: int) -> None:
    """Raises BadImage if a file does not have the requested channels; only gray and color are converted."""
    if channels != in_chans and not (channels in MODES and in_chans in MODES):
        raise BadImage(f"it has {channels} channel{'s' if channels > 1 else ''}, and in_chans={in_chans}")


def require_stored_values(values: PixelValues, are_stored: bool) -> None:
    """Raises BadImage if `values` is about the values in a file, and a decoder may have scaled or converted them."""
    if (values.value_range or values.nodata not in (None, "nan")) and not are_stored:
        raise BadImage(
            "`value_range` and `nodata` are about the values in the file, and need the path of a TIFF, JPEG or .npy "
            "file, or of a PNG file of 8 bits or of 16 bits gray; save it as .npy"
        )


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


def to_values(pixels: np.ndarray, values: PixelValues, highest: int = 65535) -> np.ndarray:
    """Returns bytes unchanged, and other values as float32.

    Args:
        highest: the value of 16 bits that becomes 1.
    """
    is_deep = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2  # in either byte order
    return pixels if pixels.dtype == np.uint8 else values.to_float(pixels, highest if is_deep else None)


def from_array(pixels: np.ndarray) -> Tensor:
    """Array (H, W, c), uint8 or float32 -> tensor (c, H, W)."""
    return torch.from_numpy(np.array(np.moveaxis(pixels, 2, 0), order="C"))
