"""Random resized crops, and the scaling of pictures as Pillow computes it.

`transforms.py` imports this module inside functions, because importing torchvision takes more than a second.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from util.data.decode import Picture, is_rgb, size_of, to_pillow


def scale(picture: Picture, height: int, width: int) -> Picture:
    """Scales a picture bicubically, with antialiasing. Bytes are those of Pillow, bit for bit."""
    if is_rgb(picture):
        from util.data.bicubic import MAX_RATIO, resize  # compiled when imported

        if picture.shape[1] <= MAX_RATIO * picture.shape[2]:
            return torch.from_numpy(resize(picture.permute(1, 2, 0).numpy(), height, width)).permute(2, 0, 1)
    return TF.resize(to_pillow(picture), [height, width], interpolation=TF.InterpolationMode.BICUBIC)


def random_crop(picture: Picture, crop: Any) -> Picture:
    """Applies a random resized crop of torchvision or timm, whose interpolation is bicubic."""
    if not is_rgb(picture):
        return crop(picture)
    top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
    return scale(picture[:, top : top + height, left : left + width], *crop.size)


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
