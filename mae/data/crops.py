"""The stages of transforms: random crops, flips and rotations, and the scaling of pictures as Pillow computes it.

`transforms.py` imports this module inside functions, because importing torchvision takes more than a second.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from mae.data.bicubic_weights import weights
from mae.data.decode import SMALL, Picture, has_bytes, size_of, to_pillow, to_tensor
from mae.position_tables import Size, to_pair
from mae.settings.choices import NO_CROP


def scale(picture: Picture, height: int, width: int) -> Picture:
    """Scales a picture bicubically, with antialiasing. Bytes equal the bytes of Pillow, except for large tensors.

    Color tensors of bytes with more than SMALL pixels per side come from `decode` with `fast_jpeg`. PyTorch scales them
    in less time than Pillow. Of photographs, three values in a thousand differ by 1, and one in a million by 2.
    """
    if has_bytes(picture) and len(picture) == 3 and max(picture.shape[1:]) > SMALL:
        return interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    if has_bytes(picture) and max(*picture.shape[1:], height, width) <= SMALL:
        # By products of matrices, in a fraction of the time of Pillow.
        rows = _rounded(picture.numpy().astype(np.float64) @ weights(picture.shape[2], width).T)
        return torch.from_numpy(_rounded(weights(picture.shape[1], height) @ rows).astype(np.uint8))
    picture = to_pillow(picture)
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    return TF.resize(picture, [height, width], interpolation=TF.InterpolationMode.BICUBIC)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Rounds pixels to bytes, in place."""
    values += 0.5
    np.floor(values, out=values)
    return np.minimum(np.maximum(values, 0, out=values), 255, out=values)


def random_crop(picture: Picture, crop: Any) -> Picture:
    """Applies a random resized crop of torchvision or timm, whose interpolation is bicubic.

    The pixels equal the pixels of `crop`. For small pictures, its checks and conversions take longer than the scaling.
    """
    top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
    if isinstance(picture, Image.Image):
        part: Picture = picture.crop((left, top, left + width, top + height))
    else:
        part = picture[:, top : top + height, left : left + width]
    return scale(part, *crop.size)


class CropOnce(T.RandomResizedCrop):
    """Samples area and aspect ratio once and clips the crop to the picture. torchvision samples up to ten times."""

    @staticmethod
    def get_params(img: Picture, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        height, width = size_of(img)
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_height = min(round(math.sqrt(area / aspect)), height)
        crop_width = min(round(math.sqrt(area * aspect)), width)
        top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
        return top, left, crop_height, crop_width


def first_stage(
    input_size: Size, crop: str, scale: Sequence[float], ratio: Sequence[float], kind: Any = T.RandomResizedCrop
) -> Callable[[Picture], Picture]:
    """Returns a random resized crop; if `crop` is NO_CROP, the scaling of the whole picture.

    Args:
        scale: minimum and maximum area of a crop, as a fraction of the picture.
        ratio: minimum and maximum aspect ratio (width / height) of a crop, relative to the one of `input_size`.
        kind: class of the crop.

    Raises:
        ValueError: `scale` or `ratio` is not a range.
    """
    for name, (low, high), limit in (("crop_scale", scale, 1), ("crop_ratio", ratio, math.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name}=[{low}, {high}]: give a minimum and a maximum between 0 and {limit}")
    height, width = to_pair(input_size)
    if crop == NO_CROP:
        return partial(scaled, size=(height, width))
    ratios = (ratio[0] * (width / height), ratio[1] * (width / height))
    return partial(
        random_crop, crop=kind((height, width), tuple(scale), ratios, interpolation=T.InterpolationMode.BICUBIC)
    )


def scaled(picture: Picture, size: tuple[int, int]) -> Picture:
    """Scales a picture to (height, width); a picture of this size is unchanged."""
    return picture if size_of(picture) == size else scale(picture, *size)


def cover(picture: Picture, size: tuple[int, int]) -> Picture:
    """Scales a picture to cover (height, width)."""
    height, width = size
    own_height, own_width = size_of(picture)
    longest = int(10 * max(height / width, width / height) * min(own_height, own_width))
    if max(own_height, own_width) > longest:  # a narrow strip: scaled before the crop, it could fill the memory
        picture = TF.center_crop(picture, [min(own_height, longest), min(own_width, longest)])
        own_height, own_width = size_of(picture)
    if height == width:
        shorter = min(own_height, own_width)  # with the rounding of torchvision, as in the published results
        return scale(picture, height * own_height // shorter, width * own_width // shorter)
    factor = max(height / own_height, width / own_width)
    return scale(picture, max(height, round(own_height * factor)), max(width, round(own_width * factor)))


def flip_and_rotate(input_size: Size, vflip: float, rotate90: bool) -> list[Callable[[Picture], Picture]]:
    """Returns the stages of a vertical flip and of a rotation by a multiple of 90 degrees.

    Raises:
        ValueError: `rotate90` is set, and `input_size` is not a square.
    """
    height, width = to_pair(input_size)
    if rotate90 and height != width:
        raise ValueError(f"`rotate90`: input_size=[{height}, {width}] is not a square; omit `rotate90`")
    return [T.RandomVerticalFlip(vflip)] * (vflip > 0) + [_rotate90] * rotate90


def _rotate90(picture: Picture) -> torch.Tensor:
    """Rotates a picture by a random multiple of 90 degrees."""
    return torch.rot90(to_tensor(picture), int(torch.randint(4, (1,))), (1, 2))
