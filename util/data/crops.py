"""Random resized crops. Importing torchvision takes more than a second, so `transforms.py` imports this at its use."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from util.data.decode import Picture, size_of


class Crop(RandomResizedCrop):
    """torchvision's, but that tensors of bytes, which are `util.data.jpeg`'s, are scaled by `util.data.bicubic`."""

    def forward(self, img: Picture) -> Picture:
        if not isinstance(img, Tensor) or img.dtype != torch.uint8 or len(img) != 3:
            return super().forward(img)
        from util.data.bicubic import resize  # compiled when imported

        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        cut = img[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        return torch.from_numpy(resize(cut, *self.size)).permute(2, 0, 1)


class CropOnce(RandomResizedCrop):
    """Draws area and ratio once, and clips the sides to the picture, where torchvision's draws up to ten times."""

    @staticmethod
    def get_params(img: Picture, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        height, width = size_of(img)
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_height = min(round(math.sqrt(area / aspect)), height)
        crop_width = min(round(math.sqrt(area * aspect)), width)
        top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
        return top, left, crop_height, crop_width
