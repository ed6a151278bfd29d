"""A second loss between two crops of an image: reconstruction and contrast, as CAN (Mishra et al. 2022, section 3).

    python main_pretrain.py --model_class examples.two_crops:TwoCrops --repeated_sampling 2 ...

--repeated_sampling 2 puts two crops of each image next to each other in the batch, each with its own mask. Without it,
the pairs are different images, and the second loss has no meaning. log.txt has the two terms of the loss, train_pixels
and train_contrast. The negatives of an image are the other images in the batch of its process, so the loss depends on
--batch_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae.fp32 import in_fp32
from models_mae import MaskedAutoencoderViT


class TwoCrops(MaskedAutoencoderViT):
    """A masked autoencoder with an InfoNCE loss of the mean visible patch.

    Args:
        weight: factor of the contrast.
        temperature: divides the cosine similarities.
    """

    def __init__(self, *, weight: float = 0.03, temperature: float = 0.1, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.weight = weight
        self.temperature = temperature
        width = self.cls_token.shape[2]
        # Names that start with decoder_: fine-tuning ignores these weights.
        self.decoder_head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 128))

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75, **context: Any) -> Any:
        if not self.training:
            return super().forward(imgs, mask_ratio, **context)
        imgs, mask_ratio, context = self.prepare_masking(imgs, mask_ratio, **context)
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **context)
        pred = self.forward_decoder(latent, ids_restore, **context)
        pixels = in_fp32(self.forward_loss)(imgs, pred, mask, **context)
        contrast = self.contrast(self.decoder_head(self.patch_tokens(latent).mean(dim=1)))
        terms = {"pixels": pixels, "contrast": self.weight * contrast}
        return self.with_terms(terms, latent, imgs, ids_restore, **context), pred, mask

    @in_fp32
    def contrast(self, vectors: Tensor) -> Tensor:
        """Vectors (2 B, 128) of pairs of crops -> cross-entropy of finding the other crop, ()."""
        vectors = F.normalize(vectors, dim=1)
        similarity = vectors @ vectors.T / self.temperature
        is_same = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        partners = torch.arange(len(vectors), device=vectors.device) ^ 1  # 0 and 1, 2 and 3, ...
        return F.cross_entropy(similarity.masked_fill(is_same, -torch.inf), partners)
