"""Transforms of an image together with its segmentation mask: augmentation, and the scale of an evaluation."""

import math
import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.data.decode import MAX_PIXELS, BadImage, Picture, require_size, size_of
from mae.data.segmentation_masks import IGNORED
from mae.data.transforms import Transform, to_tensor
from mae.position_tables import Size, to_pair


def scaled(picture: Picture, height: int, width: int) -> Picture:
    """Scales a picture bilinearly, with antialiasing."""
    from torchvision.transforms import functional as TF  # takes more than a second

    if size_of(picture) == (height, width):
        return picture
    return TF.resize(picture, [height, width], interpolation=TF.InterpolationMode.BILINEAR, antialias=True)


def sides_for(size: tuple[int, int], short_side: float) -> tuple[int, int]:
    """Returns the (height, width) of a picture whose shorter side is scaled to `short_side` pixels.

    Raises:
        BadImage: the picture is enlarged, and a square of its longer side has more than MAX_PIXELS.
    """
    factor = short_side / min(size)
    height, width = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    if factor > 1 and max(height, width) ** 2 > MAX_PIXELS:  # scaled before the crop, a strip could fill the memory
        raise BadImage(
            f"its {size[1]} x {size[0]} pixels (width x height) would be scaled to {width} x {height}, a side of more "
            f"than {math.isqrt(MAX_PIXELS):,}: cut it into shorter images"
        )
    return height, width


def fitted(picture: Picture, short_side: int) -> Picture:
    """Scales a picture so that its shorter side has `short_side` pixels; 0: unchanged."""
    return scaled(picture, *sides_for(size_of(picture), short_side)) if short_side else picture


def scale_image(picture: Picture, mask: Tensor, short_side: int) -> tuple[Tensor, Tensor]:
    """Scales the image so that its shorter side has `short_side` pixels; 0: unchanged. The mask keeps its size."""
    require_size(picture, mask.shape, "mask")
    return to_tensor(fitted(picture, short_side)), mask


def train_transform(
    size: Size, short_side: int, scale: Sequence[float], hflip: float, mean: Sequence[float]
) -> Transform:
    """Returns the random scale, random crop and horizontal flip of an image and its mask.

    A scaled image that is smaller than the crop is padded at the bottom and at the right: the image with the mean, the
    mask with IGNORED.

    Args:
        size: (H, W) of the crop.
        short_side: shorter side of the image in pixels for a scale of 1; 0: as in the file.
        scale: minimum and maximum of the random scale.
        hflip: probability of a horizontal flip.
        mean: mean of each channel, for pixel values from 0 to 1.

    Raises:
        ValueError: `scale` is no range above 0.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale=[{scale[0]}, {scale[1]}]: give the minimum and the maximum, above 0")
    return partial(
        _augmented, size=to_pair(size), short_side=short_side, scale=scale, hflip=hflip,
        mean=torch.tensor(mean)[:, None, None],
    )  # fmt: skip


def _augmented(
    picture: Picture, mask: Tensor, size: tuple[int, int], short_side: int, scale: Sequence[float], hflip: float,
    mean: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A picture and its mask (H, W) -> image (c, h, w) and mask (h, w) of the size of the crop."""
    require_size(picture, mask.shape, "mask")
    own = size_of(picture)
    short_side = short_side or min(own)
    sides_for(own, short_side * scale[1])  # raises an error for the maximum, also if the scale is smaller
    height, width = sides_for(own, short_side * random.uniform(*scale))
    image = to_tensor(scaled(picture, height, width))
    mask = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
    rows, columns = size
    top, left = random.randint(0, max(0, height - rows)), random.randint(0, max(0, width - columns))
    area = (..., slice(top, top + rows), slice(left, left + columns))
    image, mask = image[area], mask[area]
    height, width = mask.shape
    if (height, width) != size:
        color = (255 * mean).round() if image.dtype == torch.uint8 else mean
        canvas = color.to(image.dtype).expand(-1, *size).clone()
        canvas[:, :height, :width] = image
        image = canvas
        mask = F.pad(mask, (0, size[1] - width, 0, size[0] - height), value=IGNORED)
    return (image.flip(-1), mask.flip(-1)) if random.random() < hflip else (image, mask)
