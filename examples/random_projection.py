"""A fixed random projection of the normalized pixels as the target.

    python main_pretrain.py --model_class examples.random_projection:RandomProjection --model_args width=64 ...

The projection has the same weights in every run, and checkpoints do not contain it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models_mae import MaskedAutoencoderViT


class RandomProjection(MaskedAutoencoderViT):
    """Predicts tanh of a random projection of each patch.

    Args:
        width: number of projections.
    """

    projection: Tensor

    def __init__(self, *, width: int = 64, **arguments: Any) -> None:
        self.target_dim = width
        super().__init__(**arguments)
        weights = torch.randn(self.values_per_patch, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("projection", weights / self.values_per_patch**0.5, persistent=False)

    def target(self, imgs: Tensor, **context: Any) -> Tensor:
        patches = self.patchify(imgs)
        return torch.tanh(F.layer_norm(patches, patches.shape[-1:]) @ self.projection)
