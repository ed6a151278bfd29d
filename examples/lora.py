"""Low-rank updates of a frozen encoder: LoRA (Hu et al. 2022), and ExPLoRA (Khanna et al. 2025) in pre-training.

    python main_finetune.py --finetune FILE --encoder examples.lora:LoRA --encoder_args rank=8 ...
    python main_pretrain.py --init_from dinov2-small --encoder examples.lora:LoRADINOv2 --encoder_args rank=64 \\
        --unfreeze_blocks 1 ...

Queries and values of every block have updates, which are zero at the start: the features are those of the file. The
updates, the final norm, and the head or the decoder are trained, and the last K blocks with --unfreeze_blocks K. All
other weights are frozen. The other scripts read such a checkpoint with the same --encoder. Exports merge the updates
into the matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_dino import DINOv2, DINOv3
from models_vit import Encoder


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


class LoRA(Encoder):
    """An encoder whose blocks have low-rank updates.

    Args:
        rank: of the updates.
        alpha: scale of the updates, which are multiplied by alpha / rank. Default: the rank.

    Raises:
        ValueError: the rank is below 1.
    """

    adapters = ("lora_a", "lora_b")

    def __init__(self, *, rank: int = 8, alpha: float | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        if rank < 1:
            raise ValueError(f"encoder_args=[rank={rank}]: must be at least 1")
        block: Any
        for block in self.blocks:
            block.attn.qkv = LowRankQKV(block.attn.qkv, rank, rank if alpha is None else alpha)


class LoRADINOv2(LoRA, DINOv2):
    """DINOv2 with low-rank updates."""


class LoRADINOv3(LoRA, DINOv3):
    """DINOv3 with low-rank updates."""
