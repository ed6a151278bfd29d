"""The stages of transforms, on torchvision's transforms of version 2: crops, scaling, flips and rotations of items.

The image of an item, its valid pixels, its maps and its mask are transformed together. Pictures of 8 bits are Pillow
images, whose pixels are those of the published results. `transforms.py` imports this module inside functions, because
importing torchvision takes more than a second.
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
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mae.data.decode import MAX_PIXELS, BadImage, require_size, size_of, to_tensor
from mae.data.item import IGNORED, Item
from mae.position_tables import Size, to_pair
from mae.settings.choices import NO_CROP

BICUBIC, BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
MAX_INVALID = 0.01  # weight of the invalid pixels in a valid pixel of a scaled image

Stage = Callable[[Item], Item]


def prepare(item: Item) -> Item:
    """Gives the slots of an item the types by which torchvision transforms them.

    Raises:
        BadImage: the mask or a map has another size than the image.
    """
    if isinstance(item.label, tv_tensors.TVTensor):
        require_size(item.image, item.label.shape[-2:], "mask")
    for name, value in item.inputs.items():
        if isinstance(value, tv_tensors.TVTensor):
            require_size(item.image, value.shape[-2:], f"map {name}")
    image = tv_tensors.Image(item.image) if isinstance(item.image, Tensor) else item.image
    valid = None if item.valid is None else tv_tensors.Image(item.valid[None].float())
    return item._replace(image=image, valid=valid)


def finish(item: Item) -> Item:
    """Returns an item of plain tensors: image (c, H, W), valid pixels and maps (H, W).

    Scaling an image mixes its pixels. A pixel is valid if the weights of the valid pixels have the sum 1.
    """
    valid = None
    if item.valid is not None:
        valid = (_plain(item.valid)[0] - 1).abs() < MAX_INVALID
        valid = None if valid.all() else valid
    inputs = item.inputs
    if inputs:
        inputs = {name: _plain(value)[0] if _is_map(value) else value for name, value in inputs.items()}
    return Item(_plain(to_tensor(item.image)), _plain(item.label), valid, inputs)


def _is_map(value: Any) -> bool:
    return isinstance(value, tv_tensors.Image)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, tv_tensors.TVTensor) else value


def compose(*stages: Stage) -> Stage:
    """Returns the transform of decoded items to items of tensors."""
    return v2.Compose([prepare, *stages, finish])


class RandomCrop(v2.Transform):
    """Resizes a random crop to (height, width), bicubically.

    Args:
        sample: returns the (top, left, height, width) of a crop of an image, from it, `scale` and `ratio`.
        scale: minimum and maximum area of a crop, as a fraction of the image.
        ratio: minimum and maximum aspect ratio (width / height) of a crop.
    """

    def __init__(
        self, sample: Callable[..., Sequence[int]], size: tuple[int, int], scale: Sequence[float],
        ratio: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.sample, self.size, self.scale, self.ratio = sample, size, scale, ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Samples the crop of the image, which is the first input."""
        top, left, height, width = self.sample(flat_inputs[0], self.scale, self.ratio)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crops and scales an image, a mask or a map."""
        return F.resized_crop(inpt, **params, size=list(self.size), interpolation=BICUBIC, antialias=True)


def sample_once(image: Any, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """Samples area and aspect ratio of a crop once, and clips it to the image. torchvision samples up to ten times."""
    height, width = F.get_size(image)
    area = height * width * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_height = min(round(math.sqrt(area / aspect)), height)
    crop_width = min(round(math.sqrt(area * aspect)), width)
    top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
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
        return v2.Resize((height, width), BICUBIC)
    sample = sample or T.RandomResizedCrop.get_params
    return RandomCrop(sample, (height, width), scale, (ratio[0] * (width / height), ratio[1] * (width / height)))


class Cover(v2.Transform):
    """Scales an image to cover (height, width), bicubically."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Computes the size of the scaled image, and the part of a narrow strip that is scaled."""
        height, width = self.size
        rows, columns = v2.query_size(flat_inputs)
        # A narrow strip is cropped before it is scaled: else, it could fill the memory.
        longest = int(10 * max(height / width, width / height) * min(rows, columns))
        rows, columns = min(rows, longest), min(columns, longest)
        if height == width:
            shorter = min(rows, columns)  # with the rounding of torchvision, as in the published results
            return {"part": [rows, columns], "size": [height * rows // shorter, width * columns // shorter]}
        factor = max(height / rows, width / columns)
        return {
            "part": [rows, columns],
            "size": [max(height, round(rows * factor)), max(width, round(columns * factor))],
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Scales an image, a mask or a map."""
        if F.get_size(inpt) != params["part"]:
            inpt = F.center_crop(inpt, params["part"])
        return F.resize(inpt, params["size"], interpolation=BICUBIC, antialias=True)


class RandomRotate90(v2.Transform):
    """Rotates an image by a random multiple of 90 degrees."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Samples the number of quarter turns."""
        return {"turns": int(torch.randint(4, (1,)))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Rotates an image, a mask or a map, counterclockwise."""
        if isinstance(inpt, Image.Image):
            return inpt.rotate(90 * params["turns"], expand=True)
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


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
        stages.append(v2.RandomVerticalFlip(vflip))
    if rotate90:
        stages.append(RandomRotate90())
    return stages


def sides_for(size: tuple[int, int], short_side: float) -> tuple[int, int]:
    """Returns the (height, width) of an image whose shorter side is scaled to `short_side` pixels.

    Raises:
        BadImage: the image is enlarged, and a square of its longer side has more than MAX_PIXELS.
    """
    factor = short_side / min(size)
    height, width = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    if factor > 1 and max(height, width) ** 2 > MAX_PIXELS:  # scaled before the crop, a strip could fill the memory
        raise BadImage(
            f"its {size[1]} x {size[0]} pixels (width x height) would be scaled to {width} x {height}, a side of more "
            f"than {math.isqrt(MAX_PIXELS):,}: cut it into shorter images"
        )
    return height, width


def resize_short_side(item: Item, short_side: int) -> Item:
    """Scales the image so that its shorter side has `short_side` pixels; 0: unchanged. The mask keeps its size."""
    item = prepare(item)
    if not short_side:
        return finish(item)
    size = list(sides_for(size_of(item.image), short_side))
    image, valid = (value if value is None else F.resize(value, size, BILINEAR) for value in (item.image, item.valid))
    return finish(item._replace(image=image, valid=valid))


def scale_and_crop(
    item: Item, size: tuple[int, int], short_side: int, scale: Sequence[float], hflip: float, mean: Sequence[float]
) -> Item:
    """Scales an image and its mask by a random factor, and takes a random crop and a random horizontal flip.

    A scaled image that is smaller than the crop is padded at the bottom and at the right: the image with the mean, the
    mask with IGNORED.

    Args:
        item: the label is the mask, classes of pixels (H, W).
        size: (H, W) of the crop.
        short_side: shorter side of the image in pixels for a scale of 1; 0: as in the file.
        scale: minimum and maximum of the random scale.
        hflip: probability of a horizontal flip.
        mean: mean of each channel, for pixel values from 0 to 1.

    Raises:
        BadImage: as in `sides_for` for the maximum of the scale, or the mask has another size than the image.
    """
    item = prepare(item)
    stored = size_of(item.image)
    short_side = short_side or min(stored)
    sides_for(stored, short_side * scale[1])  # raises an error for the maximum, also if the scale is smaller
    height, width = sides_for(stored, short_side * random.uniform(*scale))
    rows, columns = size
    top, left = random.randint(0, max(0, height - rows)), random.randint(0, max(0, width - columns))
    bottom, right = min(height, top + rows), min(width, left + columns)
    padding = [0, 0, columns - (right - left), rows - (bottom - top)]
    flips = random.random() < hflip

    def change(value: Any, mode: v2.InterpolationMode, fill: Any) -> Any:
        value = F.crop(F.resize(value, [height, width], mode), top, left, bottom - top, right - left)
        value = F.pad(value, padding, fill=fill)
        return F.horizontal_flip(value) if flips else value

    is_bytes = isinstance(item.image, Image.Image) or item.image.dtype == torch.uint8
    color = [round(255 * value) for value in mean] if is_bytes else list(mean)
    # As an image: masks of torchvision are scaled to the nearest pixel of the upper left corner, not of the center.
    mask = change(tv_tensors.Image(item.label), v2.InterpolationMode.NEAREST_EXACT, IGNORED)
    valid = None if item.valid is None else change(item.valid, BILINEAR, 1)
    return finish(item._replace(image=change(item.image, BILINEAR, color), label=_plain(mask)[0], valid=valid))
