"""Random resized crops, and the scaling of pictures as Pillow computes it.

`transforms.py` imports this module inside functions, because importing torchvision takes more than a second.
"""

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from util.data.bicubic_weights import BITS, pixel_weights
from util.data.decode import SMALL, Picture, has_bytes, size_of, to_pillow


def scale(picture: Picture, height: int, width: int) -> Picture:
    """Scales a picture bicubically, with antialiasing. Bytes equal the bytes of Pillow."""
    if has_bytes(picture) and max(*picture.shape[1:], height, width) <= SMALL:
        return torch.from_numpy(_scaled_small(picture.numpy(), height, width)).permute(2, 0, 1)
    if has_bytes(picture) and len(picture) == 3:
        from util.data.bicubic import MAX_RATIO, resize  # compiled when imported

        if picture.shape[1] <= MAX_RATIO * picture.shape[2]:
            return torch.from_numpy(resize(picture.permute(1, 2, 0).numpy(), height, width)).permute(2, 0, 1)
    picture = to_pillow(picture)
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    return TF.resize(picture, [height, width], interpolation=TF.InterpolationMode.BICUBIC)


def _scaled_small(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales bytes (c, h, w) to (height, width, c) by products of matrices, in a fraction of the time of Pillow."""
    _, own_height, own_width = pixels.shape
    rows = _rounded(pixels.astype(np.float64) @ _weights(own_width, width).T)
    return _rounded(_weights(own_height, height) @ rows).astype(np.uint8).transpose(1, 2, 0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Rounds pixels to bytes, in place."""
    values += 0.5
    np.floor(values, out=values)
    return np.minimum(np.maximum(values, 0, out=values), 255, out=values)


@cache
def _weights(length: int, size: int) -> np.ndarray:
    """Pillow's weights of a scaling from `length` to `size` pixels, (size, length). Sums of bytes are exact in fp64."""
    result, weights = np.zeros((size, length)), np.zeros(length)
    for number in range(size):
        first, last = pixel_weights(number, length, size, weights)
        result[number, first:last] = weights[: last - first] / (1 << BITS)
    return result


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


class CropOnce(RandomResizedCrop):
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
