"""Masks from filtered noise, whose masked patches are clustered or spread: ColorMAE (Hinojosa et al. 2024, section 3).

    python main_pretrain.py --model_class examples.colored_masks:ColoredMasks --model_args color=green ...

ColorMAE crops its masks from large images of filtered noise; here, the noise of each image is filtered. The masks do
not depend on the number of processes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.masking import require_random
from models_mae import MaskedAutoencoderViT

SIGMAS = {"red": (1.0, None), "green": (0.5, 1.5), "blue": (0.0, 1.0)}  # blurs, in patches; the second is subtracted


def blurred(noise: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 1, rows, columns), reflected at the borders."""
    if not sigma:
        return noise
    radius = min(math.ceil(3 * sigma), min(noise.shape[2:]) - 1)
    weights = torch.exp(-((torch.arange(-radius, radius + 1, device=noise.device) / sigma) ** 2) / 2)
    weights = (weights / weights.sum()).to(noise.dtype)
    padded = F.pad(noise, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


class ColoredMasks(MaskedAutoencoderViT):
    """A masked autoencoder with such masks, in place of --masking and --mask_block. Images have the size `img_size`.

    Args:
        color: red (low frequencies), green (a band of frequencies) or blue (high frequencies).
    """

    def __init__(self, *, color: str = "green", **arguments: Any) -> None:
        super().__init__(**arguments)
        if color not in SIGMAS:
            raise ValueError(f"model_args=[color={color}]: give {', '.join(SIGMAS)}")
        self.color = color

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.rand(x.shape[:2], device=x.device) if noise is None else noise
        excluded = noise.isinf()  # patches without valid pixels
        require_random(noise, "ColoredMasks")
        sigma, subtracted = SIGMAS[self.color]
        image = torch.erfinv((2 * noise - 1).clamp(-0.999, 0.999)).unflatten(1, self.grid_size).unsqueeze(1)  # Gaussian
        filtered = blurred(image, sigma) - (blurred(image, subtracted) if subtracted else 0)
        filtered = filtered.flatten(1).masked_fill(excluded, math.inf)
        return super().random_masking(x, mask_ratio, filtered, **context)
