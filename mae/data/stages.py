"""The stages of transforms that evaluations have, too: scaling, crops of the center, and flips.

A stage changes an image and, in the same way, what has its size: its valid pixels, its maps and its mask, according to
their types (`torchvision.tv_tensors`). Pictures of 8 bits are Pillow images, whose pixels are those of the published
results. torchvision is imported for other images only, because importing it takes as long as importing PyTorch.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.data.bicubic_weights import weights
from mae.data.item import Item
from mae.data.pixels import SMALL, has_bytes, require_size, size_of, to_pillow, to_tensor

BICUBIC = "bicubic"  # a value of torchvision's InterpolationMode
BILINEAR = "bilinear"
MODES = tuple(mode.name.lower() for mode in Image.Resampling)
MAX_INVALID = 0.01  # weight of the invalid pixels in a valid pixel of a scaled image

Values = list[Any]  # the image of an item, and then its valid pixels, mask and maps, if there are any
Stage = Callable[[Values], Values]


def has_type(value: Any) -> bool:
    """Whether a value is a tensor of `torchvision.tv_tensors`. Without torchvision, there is none."""
    module = sys.modules.get("torchvision.tv_tensors")
    return module is not None and isinstance(value, module.TVTensor)


class Stages:
    """Applies stages to the image of a decoded item, and to what has its size. The result has tensors.

    Scaling an image mixes its pixels. A pixel is valid if the weights of the valid pixels have the sum 1.

    Raises (when called):
        BadImage: the mask or a map has another size than the image.
    """

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages

    def __call__(self, item: Item) -> Item:
        image, label, valid, inputs = item
        values: Values = [image]
        if valid is not None:
            from torchvision import tv_tensors

            values.append(tv_tensors.Image(valid[None].float()))
        has_mask = has_type(label)
        if has_mask:
            require_size(image, label.shape[-2:], "mask")
            values.append(label)
        maps = [name for name, value in inputs.items() if has_type(value)] if inputs else []
        for name in maps:
            require_size(image, inputs[name].shape[-2:], f"map {name}")
            values.append(inputs[name])
        for stage in self.stages:
            values = stage(values)
        image, *others = values
        if valid is not None:
            valid = _valid_pixels(others.pop(0))
        if has_mask:
            label = others.pop(0).as_subclass(Tensor)
        scaled = {name: value.as_subclass(Tensor)[0] for name, value in zip(maps, others, strict=True)}
        return Item(to_tensor(image), label, valid, {**inputs, **scaled} if scaled else inputs)

    def flips_of(self, size: tuple[int, int]) -> "list[RandomFlip] | None":
        """Returns the flips, if images of a size (height, width) are flipped only. None: other stages change them."""
        changing = [stage for stage in self.stages if not (type(stage) is Scale and stage.size == size)]
        flips = [stage for stage in changing if type(stage) is RandomFlip]
        return flips if len(flips) == len(changing) else None


def _valid_pixels(weights: Tensor) -> Tensor | None:
    """Weights of the valid pixels (1, H, W) -> the valid pixels (H, W); None: all."""
    valid = (weights.as_subclass(Tensor)[0] - 1).abs() < MAX_INVALID
    return None if valid.all() else valid


def scale(value: Any, height: int, width: int, mode: str = BICUBIC) -> Any:
    """Scales an image or a map with antialiasing, and a mask to the nearest pixel.

    Bytes of Pillow images and of tensors with up to SMALL pixels per side equal the bytes of Pillow.
    """
    if isinstance(value, Image.Image):
        return value.resize((width, height), Image.Resampling[mode.upper()])
    if mode == BICUBIC and type(value) is Tensor and has_bytes(value) and max(value.shape[1:]) <= SMALL:
        if max(height, width) > SMALL:
            return scale(to_pillow(value), height, width)
        # By products of matrices, in a fraction of the time of Pillow.
        rows = _rounded(value.numpy().astype(np.float64) @ weights(value.shape[2], width).T)
        return torch.from_numpy(_rounded(weights(value.shape[1], height) @ rows).astype(np.uint8))
    return resize(value, [height, width], mode)


def resize(value: Any, size: list[int], mode: str) -> Any:
    """Scales with antialiasing. Bytes of more channels than color are scaled as floats, and rounded."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF
    from torchvision.transforms.v2 import functional as F

    if type(value) is Tensor and not has_bytes(value):
        return TF.resize(value, size, InterpolationMode(mode))  # of version 1: version 2 computes with integers
    return F.resize(value, size, InterpolationMode(mode))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Rounds pixels to bytes, in place."""
    values += 0.5
    np.floor(values, out=values)
    return np.minimum(np.maximum(values, 0, out=values), 255, out=values)


class Scale:
    """Scales images to (height, width). Images of this size are unchanged."""

    def __init__(self, size: tuple[int, int], mode: str = BICUBIC) -> None:
        self.size = size
        self.mode = mode

    def __call__(self, values: Values) -> Values:
        return values if size_of(values[0]) == self.size else [scale(value, *self.size, self.mode) for value in values]


def center_crop(value: Any, size: tuple[int, int]) -> Any:
    """Crops the center (height, width) of an image, and of what has its size."""
    rows, columns = size
    if not isinstance(value, Image.Image) or value.height < rows or value.width < columns:
        from torchvision.transforms.v2 import functional as F

        return F.center_crop(value, [rows, columns])
    top = round((value.height - rows) / 2)
    left = round((value.width - columns) / 2)
    return value.crop((left, top, left + columns, top + rows))


class CenterCrop:
    """Crops the center (height, width)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, values: Values) -> Values:
        if size_of(values[0]) == self.size:
            return values
        return [center_crop(value, self.size) for value in values]


class Cover:
    """Scales images to cover (height, width)."""

    def __init__(self, size: tuple[int, int], mode: str = BICUBIC) -> None:
        self.size = size
        self.mode = mode

    def __call__(self, values: Values) -> Values:
        height, width = self.size
        rows, columns = size_of(values[0])
        longest = int(10 * max(height / width, width / height) * min(rows, columns))
        if max(rows, columns) > longest:  # a narrow strip: scaled before the crop, it could fill the memory
            rows = min(rows, longest)
            columns = min(columns, longest)
            values = [center_crop(value, (rows, columns)) for value in values]
        if height == width:
            shorter = min(rows, columns)  # with the rounding of torchvision, as in the published results
            height = height * rows // shorter
            width = width * columns // shorter
        else:
            factor = max(height / rows, width / columns)
            height = max(height, round(rows * factor))
            width = max(width, round(columns * factor))
        return [scale(value, height, width, self.mode) for value in values]


class RandomFlip:
    """Flips images with a probability.

    Args:
        flip: `F.horizontal_flip` or `F.vertical_flip` of torchvision's transforms of version 2.
    """

    def __init__(self, flip: Callable[[Any], Any], probability: float) -> None:
        self.flip = flip
        self.probability = probability

    def __call__(self, values: Values) -> Values:
        return [self.flip(value) for value in values] if torch.rand(1) < self.probability else values

    def flip_some(self, images: Tensor, numbers: Tensor) -> None:
        """Flips some of the images (B, c, H, W) in place: each has a uniform random number (B,)."""
        chosen = numbers < self.probability
        images[chosen] = self.flip(images[chosen])
