"""The blocks of DINOv3 (Siméoni et al. 2025): registers, 2-D rotary positions, SwiGLU and layer scale.

    python main_pretrain.py --num_cls_tokens 5 --encoder examples.dinov3_blocks:RotaryEncoder ...

Class tokens after the first are registers. At equal weights, the features equal those of DINOv3 in transformers."""

import math
from typing import Any

import torch
from timm.layers import LayerScale, SwiGLU
from torch import Tensor

from models_vit import Attention, Block, Encoder


def rotary(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Returns cosines and sines (2, N, width) of the patches. `width`: channels of a head, a multiple of 4."""
    centers = [(2 * torch.arange(side, device=device) + 1) / side - 1 for side in grid]  # in [-1, 1]
    places = torch.stack(torch.meshgrid(*centers, indexing="ij"), dim=-1).view(-1, 2, 1)  # (N, 2, 1): row, column
    periods = 100 ** (torch.arange(width // 4, device=device) / (width // 4))
    angles = (2 * math.pi * places / periods).flatten(1).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the patches among tokens (B, h, L, D/h), but not the class token and the registers in front of them."""
    first, patches = x[:, :, : -cos.shape[2]], x[:, :, -cos.shape[2] :]
    left, right = patches.chunk(2, dim=3)
    patches = patches * cos + torch.cat([-right, left], dim=3) * sin
    return torch.cat([first, patches.to(first.dtype)], dim=2)


class RotaryAttention(Attention):
    """Attention whose queries and keys of patches are rotated by their positions (2, B or 1, 1, patches, D/h)."""

    def split(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().split(x)
        for cos, sin in inputs:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return q, k, v


class DINOv3Block(Block):
    """A block with rotary attention, SwiGLU and layer scale."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, **arguments: Any) -> None:
        super().__init__(dim, num_heads, mlp_ratio, **arguments)
        self.attn, self.mlp = RotaryAttention(dim, num_heads), SwiGLU(dim, round(dim * mlp_ratio * 2 / 3))
        self.scale1, self.scale2 = LayerScale(dim, 0.1), LayerScale(dim, 0.1)

    def compute(self, x: Tensor, *inputs: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), *inputs)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class RotaryEncoder(Encoder):
    """An encoder with these blocks. Heads on the class token use the first one."""

    block = DINOv3Block

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pos_embed.requires_grad_(False)  # not used

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return self.cls_token.new_zeros(1, self.num_prefix_tokens + grid[0] * grid[1], 1)

    def class_features(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def block_inputs(
        self, grid: tuple[int, int], ids_restore: Tensor | None = None, num_visible: int | None = None
    ) -> tuple[Tensor, ...]:
        block: Any = self.blocks[0]
        positions = rotary(grid, self.cls_token.shape[2] // block.attn.num_heads, self.cls_token.device)
        if ids_restore is None:
            return (positions[:, None, None],)
        return (positions[:, ids_restore.argsort(dim=1)[:, :num_visible]].unsqueeze(2),)
