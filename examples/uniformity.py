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

from models_mae import MaskedAutoencoderViT

DIRECTIONS, POINTS = 64, 17  # of projections; of the integral over their characteristic function


class Uniformity(MaskedAutoencoderViT):
    """A masked autoencoder with a loss of the class tokens.

    Args:
        weight: factor of the second loss.
        tokens: "class" or "patches": the class token, or the mean of the visible patches.
    """

    def __init__(self, *, weight: float = 0.01, tokens: str = "class", **arguments: Any) -> None:
        super().__init__(**arguments)
        if tokens not in ("class", "patches"):
            raise ValueError(f"--model_args tokens={tokens}: give class or patches")
        self.weight, self.tokens = weight, tokens

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, **context: Any) -> Any:
        if not self.training:
            return super().forward(imgs, mask_ratio, **context)
        imgs, mask_ratio, context = self.prepare_masking(imgs, mask_ratio, **context)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **context)
        pred = self.forward_decoder(latent, ids_restore, **context)
        pixels = self.forward_loss(imgs, pred, mask, **context)
        return {"pixels": pixels, "uniformity": self.weight * self.uniformity(latent)}, pred, mask

    def uniformity(self, latent: Tensor) -> Tensor:
        """Latent (B, T + K, D) -> the mean squared cosine over all pairs of images, ()."""
        normed = F.normalize(self.features(latent), dim=1)
        return (normed @ normed.T).square().mean()

    def features(self, latent: Tensor) -> Tensor:
        """Latent (B, T + K, D) -> a vector of each image (B, D), in fp32."""
        return (latent[:, 0] if self.tokens == "class" else self.patch_tokens(latent).mean(dim=1)).float()


class Gaussian(Uniformity):
    """A masked autoencoder whose class tokens are distributed like independent normal variables."""

    def uniformity(self, latent: Tensor) -> Tensor:
        """Latent (B, T + K, D) -> the Epps-Pulley statistic of projections, divided by B, ()."""
        features = self.features(latent)
        directions = F.normalize(torch.randn(features.shape[1], DIRECTIONS, device=features.device), dim=0)
        t = torch.linspace(-5, 5, POINTS, device=features.device)
        angles = (features @ directions)[:, :, None] * t
        expected = (-t.square() / 2).exp()  # the characteristic function of the normal distribution
        error = (angles.cos().mean(dim=0) - expected).square() + angles.sin().mean(dim=0).square()
        return torch.trapezoid(error * expected, t, dim=1).mean()
