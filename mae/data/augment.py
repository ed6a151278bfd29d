"""The stages of augmentations and of segmentation, on the functions of torchvision's transforms of version 2.

`transforms.py` imports this module inside functions, because importing torchvision takes more than a second.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from mae.data.item import IGNORED
from mae.data.large import FACTOR, stored_size
from mae.data.pixels import MAX_PIXELS, BadImage, size_of, to_pillow
from mae.data.stages import BILINEAR, RandomFlip, Scale, Stage, Values, resize, scale
from mae.settings.choices import NO_CROP
from mae.sizes import Size, to_pair


class RandomCrop:
    """Resizes a random crop to (height, width).

    Args:
        sample: returns the (top, left, height, width) of a crop of an image, from it, `scale` and `ratio`.
        scale: minimum and maximum area of a crop, as a fraction of the image.
        ratio: minimum and maximum aspect ratio (width / height) of a crop.
    """

    def __init__(
        self, sample: Callable[..., Sequence[int]], size: tuple[int, int], scale: Sequence[float],
        ratio: Sequence[float],
    ) -> None:  # fmt: skip
        self.sample = sample
        self.size = size
        self.scale = scale
        self.ratio = ratio

    def __call__(self, values: Values) -> Values:
        top, left, height, width = self._box(values[0])
        parts = (
            value[:, top : top + height, left : left + width]
            if type(value) is Tensor  # in a fraction of the time of the function
            else F.crop(value, top, left, height, width)
            for value in values
        )
        return [scale(part, *self.size) for part in parts]

    def _box(self, image: Any) -> Sequence[int]:
        """Returns the (top, left, height, width) of a crop. A picture that was reduced has the crop of its file."""
        stored = stored_size(image)
        if stored == size_of(image):
            return self.sample(image, self.scale, self.ratio)
        top, left, height, width = self.sample(torch.empty(()).expand(1, *stored), self.scale, self.ratio)
        first = round(top / FACTOR), round(left / FACTOR)
        return *first, round((top + height) / FACTOR) - first[0], round((left + width) / FACTOR) - first[1]


class ChangeImage:
    """Applies an augmentation policy of timm to images of bytes with 1 or 3 channels."""

    def __init__(self, change: Callable[[Image.Image], Image.Image]) -> None:
        self.change = change

    def __call__(self, values: Values) -> Values:
        picture = to_pillow(values[0])
        if isinstance(picture, Tensor):
            raise ValueError(
                "`aa` and `color_jitter` support 8-bit images with 1 or 3 channels only; give aa=none and omit "
                "`color_jitter`"
            )
        if len(values) > 1:
            raise ValueError(
                "`aa` and `color_jitter` change an image without its valid pixels and maps; give aa=none and omit "
                "`color_jitter`"
            )
        return [self.change(picture)]


def sample_once(image: Any, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """Samples area and aspect ratio of a crop once, and clips it to the image. torchvision samples up to ten times."""
    height, width = F.get_size(image)
    area = height * width * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_height = min(round(math.sqrt(area / aspect)), height)
    crop_width = min(round(math.sqrt(area * aspect)), width)
    top = random.randint(0, height - crop_height)
    left = random.randint(0, width - crop_width)
    return top, left, crop_height, crop_width


def first_stage(
    input_size: Size, crop: str, scale: Sequence[float], ratio: Sequence[float],
    sample: Callable[..., Sequence[int]] | None = None,
) -> Stage:  # fmt: skip
    """Returns a random resized crop; if `crop` is NO_CROP, the scaling of the whole image.

    Args:
        scale: minimum and maximum area of a crop, as a fraction of the image.
        ratio: minimum and maximum aspect ratio (width / height) of a crop, relative to the one of `input_size`.
        sample: as in `RandomCrop`. Default: the function of torchvision's RandomResizedCrop.

    Raises:
        ValueError: `scale` or `ratio` is not a range.
    """
    for name, (low, high), limit in (("crop_scale", scale, 1), ("crop_ratio", ratio, math.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name}=[{low}, {high}]: give a minimum and a maximum between 0 and {limit}")
    height, width = to_pair(input_size)
    if crop == NO_CROP:
        return Scale((height, width))
    sample = sample or T.RandomResizedCrop.get_params
    return RandomCrop(sample, (height, width), scale, (ratio[0] * (width / height), ratio[1] * (width / height)))


def _rotate90(values: Values) -> Values:
    """Rotates images by a random multiple of 90 degrees, counterclockwise."""
    turns = int(torch.randint(4, (1,)))
    return [
        value.rotate(90 * turns, expand=True)
        if isinstance(value, Image.Image)
        else tv_tensors.wrap(torch.rot90(value, turns, (-2, -1)), like=value)
        for value in values
    ]


def flip_and_rotate(input_size: Size, vflip: float, rotate90: bool) -> list[Stage]:
    """Returns the stages of a vertical flip and of a rotation by a multiple of 90 degrees.

    Raises:
        ValueError: `rotate90` is set, and `input_size` is not a square.
    """
    height, width = to_pair(input_size)
    if rotate90 and height != width:
        raise ValueError(f"`rotate90`: input_size=[{height}, {width}] is not a square; omit `rotate90`")
    stages: list[Stage] = []
    if vflip > 0:
        stages.append(RandomFlip(F.vertical_flip, vflip))
    if rotate90:
        stages.append(_rotate90)
    return stages


def sides_for(size: tuple[int, int], short_side: float) -> tuple[int, int]:
    """Returns the (height, width) of an image whose shorter side is scaled to `short_side` pixels.

    Raises:
        BadImage: the image is enlarged, and a square of its longer side has more than MAX_PIXELS.
    """
    factor = short_side / min(size)
    height = max(1, round(size[0] * factor))
    width = max(1, round(size[1] * factor))
    if factor > 1 and max(height, width) ** 2 > MAX_PIXELS:  # scaled before the crop, a strip could fill the memory
        raise BadImage(
            f"its {size[1]} x {size[0]} pixels (width x height) would be scaled to {width} x {height}, a side of more "
            f"than {math.isqrt(MAX_PIXELS):,}: cut it into shorter images"
        )
    return height, width


class ShortSide:
    """Scales images so that their shorter side has `pixels` pixels, bilinearly; 0: unchanged. Masks keep their size.

    Raises (when called):
        BadImage: as in `sides_for`.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, values: Values) -> Values:
        if not self.pixels:
            return values
        size = list(sides_for(size_of(values[0]), self.pixels))
        return [value if isinstance(value, tv_tensors.Mask) else resize(value, size, BILINEAR) for value in values]


class ScaleAndCrop:
    """Scales images and their masks by a random factor, and takes a random crop and a random horizontal flip.

    A scaled image that is smaller than the crop is padded at the bottom and at the right: the image with the mean, the
    mask with IGNORED.

    Args:
        size: (H, W) of the crop.
        short_side: shorter side of the image in pixels for a scale of 1; 0: as in the file.
        scale: minimum and maximum of the random scale.
        hflip: probability of a horizontal flip.
        mean: mean of each channel, for pixel values from 0 to 1.

    Raises (when called):
        BadImage: as in `sides_for` for the maximum of the scale.
    """

    def __init__(
        self, size: tuple[int, int], short_side: int, scale: Sequence[float], hflip: float, mean: Sequence[float]
    ) -> None:
        self.size = size
        self.short_side = short_side
        self.scale = scale
        self.hflip = hflip
        self.mean = mean

    def __call__(self, values: Values) -> Values:
        stored = size_of(values[0])
        rows, columns = self.size
        short_side = self.short_side or min(stored)
        sides_for(stored, short_side * self.scale[1])  # raises an error for the maximum, also if the scale is smaller
        height, width = sides_for(stored, short_side * random.uniform(*self.scale))
        top = random.randint(0, max(0, height - rows))
        left = random.randint(0, max(0, width - columns))
        bottom = min(height, top + rows)
        right = min(width, left + columns)
        padding = [0, 0, columns - (right - left), rows - (bottom - top)]
        flips = random.random() < self.hflip

        def change(value: Any, mode: str, fill: Any) -> Any:
            value = F.crop(resize(value, [height, width], mode), top, left, bottom - top, right - left)
            value = F.pad(value, padding, fill=fill)
            return F.horizontal_flip(value) if flips else value

        image, *others = values
        is_bytes = isinstance(image, Image.Image) or image.dtype == torch.uint8
        color = [round(255 * value) for value in self.mean] if is_bytes else list(self.mean)
        changed = [change(image, BILINEAR, color)]
        for value in others:
            if isinstance(value, tv_tensors.Mask):
                # As an image: masks are scaled to the nearest pixel of the upper left corner, not of the center.
                mask = change(tv_tensors.Image(value), "nearest-exact", IGNORED)
                changed.append(tv_tensors.Mask(mask[0]))
            else:
                changed.append(change(value, BILINEAR, 1))  # valid pixels: the mean is valid
        return changed
