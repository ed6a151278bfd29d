"""A second loss of one vector per image, beside the reconstruction: the base of two_crops.py and uniformity.py."""

from typing import Any

from torch import Tensor

from models_mae import MaskedAutoencoderViT


class TokenLoss(MaskedAutoencoderViT):
    """A masked autoencoder with two terms of the loss: log.txt has train_pixels, and train_NAME for `loss_name`.

    Args:
        weight: factor of the second loss.
        tokens: "class" or "patches": the class token, or the mean of the visible patches.
    """

    loss_name: str

    def __init__(self, *, weight: float, tokens: str, **arguments: Any) -> None:
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
        features = latent[:, 0] if self.tokens == "class" else self.patch_tokens(latent).mean(dim=1)
        return {"pixels": pixels, self.loss_name: self.weight * self.second_loss(features)}, pred, mask

    def second_loss(self, features: Tensor) -> Tensor:
        """The vectors of the images (B, D) -> the loss, ()."""
        raise NotImplementedError
