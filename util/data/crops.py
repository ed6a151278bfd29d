"""Random resized crops.

`transforms.py` imports this module inside functions, because importing torchvision takes more than a second.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from util.data.decode import Picture, size_of


class Crop(RandomResizedCrop):
    """torchvision's random resized crop. `util.data.bicubic` scales the uint8 tensors of `util.data.jpeg`."""

    def forward(self, img: Picture) -> Picture:
        if not isinstance(img, Tensor) or img.dtype != torch.uint8 or len(img) != 3:
            return super().forward(img)
        from util.data.bicubic import resize  # compiled when imported

        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        cut = img[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        return torch.from_numpy(resize(cut, *self.size)).permute(2, 0, 1)


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
