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

from examples.token_loss import TokenLoss


class TwoCrops(TokenLoss):
    """A masked autoencoder with an InfoNCE loss of two crops.

    Args:
        weight, tokens: as in `TokenLoss`.
        temperature: divides the cosine similarities.
    """

    loss_name = "contrast"

    def __init__(
        self, *, weight: float = 0.03, temperature: float = 0.1, tokens: str = "patches", **arguments: Any
    ) -> None:
        super().__init__(weight=weight, tokens=tokens, **arguments)
        self.temperature = temperature
        width = self.cls_token.shape[2]
        # Names that start with decoder_: fine-tuning ignores these weights.
        self.decoder_head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 128))

    def second_loss(self, features: Tensor) -> Tensor:
        """Features (2 B, D) of pairs of crops -> cross-entropy of finding the other crop, ()."""
        vectors = F.normalize(self.decoder_head(features), dim=1)
        similarity = vectors @ vectors.T / self.temperature
        itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        similarity = similarity.masked_fill(itself, -torch.inf)
        partners = torch.arange(len(vectors), device=vectors.device) ^ 1  # 0 and 1, 2 and 3, ...
        return F.cross_entropy(similarity.float(), partners)
