"""A second loss that spreads the class tokens of different images (U-MAE, Zhang et al. 2022, equation 12).

    python main_pretrain.py --model_class examples.uniformity:Uniformity --model_args weight=0.01 ...

The pixel loss alone lets the features of all images fill few directions. The second loss is the mean squared cosine
over all pairs of images in the batch of a process. So its weight is for a number of images: --batch_size. log.txt has
the two terms of the loss, train_pixels and train_uniformity.

The class Gaussian has another second loss, SIGReg (Balestriero and LeCun 2025, section 4): projections of the features
to random directions are compared with a normal distribution.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.token_loss import TokenLoss

DIRECTIONS, POINTS = 64, 17  # of projections; of the integral over their characteristic function


class Uniformity(TokenLoss):
    """A masked autoencoder with a loss of the class tokens. The arguments are those of `TokenLoss`."""

    loss_name = "uniformity"

    def __init__(self, *, weight: float = 0.01, tokens: str = "class", **arguments: Any) -> None:
        super().__init__(weight=weight, tokens=tokens, **arguments)

    def second_loss(self, features: Tensor) -> Tensor:
        """Features (B, D) -> the mean squared cosine over all pairs of images, ()."""
        normed = F.normalize(features.float(), dim=1)
        return (normed @ normed.T).square().mean()


class Gaussian(Uniformity):
    """A masked autoencoder whose class tokens are distributed like independent normal variables."""

    def second_loss(self, features: Tensor) -> Tensor:
        """Features (B, D) -> the Epps-Pulley statistic of projections, divided by B, ()."""
        directions = F.normalize(torch.randn(features.shape[1], DIRECTIONS, device=features.device), dim=0)
        t = torch.linspace(-5, 5, POINTS, device=features.device)
        angles = (features.float() @ directions)[:, :, None] * t
        expected = (-t.square() / 2).exp()  # the characteristic function of the normal distribution
        error = (angles.cos().mean(dim=0) - expected).square() + angles.sin().mean(dim=0).square()
        return torch.trapezoid(error * expected, t, dim=1).mean()
