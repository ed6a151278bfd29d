"""Low-rank updates of a frozen encoder: LoRA (Hu et al. 2022), and ExPLoRA (Khanna et al. 2025) in pre-training.

Queries and values of every block have updates, which are zero at the start: the features are those of the file. The
updates, the final norm, and the head or the decoder are trained, and the last K blocks with `unfreeze_blocks` K. All
other weights are frozen. Exports merge the updates into the matrices.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARAMETERS = ("lora_a", "lora_b")


def merge(weight: Tensor, scale: float, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Returns a matrix of queries, keys and values (3D, D) with its updates.

    Args:
        scale: of the updates.
        lora_a, lora_b: (2, rank, D) and (2, D, rank), of queries and values.
    """
    q, k, v = weight.chunk(3)
    of_q, of_v = scale * lora_b @ lora_a
    return torch.cat([q + of_q, k, v + of_v])


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
        return merge(self.weight, self.scale, self.lora_a, self.lora_b)

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


def merged(tensors: Mapping[str, Tensor], rank: int, alpha: float | None) -> dict[str, Tensor]:
    """Returns the tensors of a model without its low-rank updates, which are merged into its matrices.

    Args:
        tensors: by name.
        rank, alpha: as in `add_updates`.
    """
    scale = (rank if alpha is None else alpha) / rank
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(PARAMETERS)}
    for name in tensors:
        layer, is_update, _ = name.partition("lora_b")
        if is_update:
            found[f"{layer}weight"] = merge(tensors[f"{layer}weight"], scale, tensors[f"{layer}lora_a"], tensors[name])
    return found
