"""Low-rank updates of a frozen encoder: LoRA (Hu et al. 2022), and ExPLoRA (Khanna et al. 2025) in pre-training.

Queries and values of every block have updates, which are zero at the start: the features are those of the file. The
updates, the final norm, and the head or the decoder are trained, and the last K blocks with `unfreeze_blocks` K. All
other weights are frozen. Exports merge the updates into the matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARAMETERS = ("lora_a", "lora_b")


class LowRankQKV(nn.Linear):
    """The layer of queries, keys and values, with W + alpha / rank · B A for queries and values.

    Args:
        base: the layer whose weights it has.
        rank: of B (D, rank) and A (rank, D).
        alpha: scale of the update.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")  # without weights of its own
        dim = base.in_features
        self.weight = base.weight
        self.bias = base.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(2, rank, dim))
        self.lora_b = nn.Parameter(torch.zeros(2, dim, rank))
        nn.init.uniform_(self.lora_a, -(dim**-0.5), dim**-0.5)  # Kaiming uniform with a = √5, as nn.Linear

    def merged(self) -> Tensor:
        """Returns the matrix with the updates, (3D, D)."""
        q, k, v = self.weight.chunk(3)
        of_q, of_v = self.scale * self.lora_b @ self.lora_a
        return torch.cat([q + of_q, k, v + of_v])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)


def add_updates(model: Any, rank: int, alpha: float | None) -> None:
    """Adds low-rank updates to the blocks of a model, in place.

    Args:
        model: a `models_vit.Encoder`.
        rank: of the updates.
        alpha: they are multiplied by alpha / rank. None: the rank.

    Raises:
        ValueError: a block of the user's code has no layer `attn.qkv`.
    """
    for block in model.blocks:
        layer = getattr(getattr(block, "attn", None), "qkv", None)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"lora={rank}: blocks of class {type(block).__name__} have no linear layer attn.qkv")
        block.attn.qkv = LowRankQKV(layer, rank, rank if alpha is None else alpha)
    model.adapters = (*model.adapters, *PARAMETERS)
