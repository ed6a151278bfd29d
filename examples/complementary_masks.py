"""All patches of an image are visible once in an update, in disjoint parts (EMAE, Li et al. 2023, section 3).

    python main_pretrain.py --model_class examples.complementary_masks:ComplementaryMasks --batch_size 32 ...

With four parts, a part has a quarter of the patches. An image is encoded and decoded once for each part, so that an
update costs as much as one of four times the images. Each patch is predicted from three parts. The second loss is the
difference of the predictions from two parts. log.txt has the two terms, train_pixels and train_consistency. On the
leaderboard, which has five minutes of pre-training, the second loss is 5 points worse: --model_args consistency=0.
"""

from typing import Any

import torch
from torch import Tensor

from mae.masking import ratio_of
from models_mae import MaskedAutoencoderViT


class ComplementaryMasks(MaskedAutoencoderViT):
    """A masked autoencoder that is trained with disjoint visible parts of each image.

    Args:
        parts: number of parts; --mask_ratio is 1 - 1 / parts.
        consistency: factor of the second loss; 0 for none.
    """

    def __init__(self, *, parts: int = 4, consistency: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts = parts
        self.consistency = consistency
        if self.num_patches % parts:
            raise ValueError(f"model_args=[parts={parts}]: it does not divide the {self.num_patches} patches")

    def prepare_masking(
        self, imgs: Tensor, mask_ratio: float, mask: Tensor | None = None, noise: Tensor | None = None,
        valid: Tensor | None = None, **context: Any,
    ) -> tuple[Tensor, float, dict[str, Any]]:  # fmt: skip
        """As in the base class. In training, each image is repeated, once for each part.

        Raises:
            ValueError: the visible patches are not those of a part, a mask is given, or there are invalid pixels.
        """
        if not self.training:
            return super().prepare_masking(imgs, mask_ratio, mask, noise, valid, **context)
        if abs(self.parts * (1 - mask_ratio) - 1) > 1e-6 or mask is not None or valid is not None:
            raise ValueError(
                f"{self.parts} complementary masks need mask_ratio={1 - 1 / self.parts:.4g}, and images without "
                f"invalid pixels"
            )
        noise = torch.rand(len(imgs), self.num_patches, device=imgs.device) if noise is None else noise
        ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
        count = noise.shape[1]
        parts = [(ranks - part * count // self.parts) % count for part in range(self.parts)]
        imgs = self._repeated(imgs)
        context = {name: self._repeated(value) for name, value in context.items()}
        mask_ratio = ratio_of(count // self.parts, count)  # 1 - mask_ratio may round to a patch less
        return super().prepare_masking(imgs, mask_ratio, None, torch.cat(parts).float(), **context)

    def _repeated(self, value: Tensor) -> Tensor:
        """(B, ...) -> (parts · B, ...)."""
        return value.repeat(self.parts, *[1] * (value.ndim - 1))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, **context: Any) -> Any:
        pixels = super().forward_loss(imgs, pred, mask, **context)
        if not self.training or not self.consistency:
            return pixels
        pred, mask = (value.unflatten(0, (self.parts, -1)) for value in (pred, mask))
        both = mask * mask.roll(1, dims=0)  # patches that are masked in a part and in the one before it
        difference = (pred - pred.detach().roll(1, dims=0)).abs().mean(dim=-1)
        return {"pixels": pixels, "consistency": self.consistency * (difference * both).sum() / both.sum()}
