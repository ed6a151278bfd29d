"""The encoders of DINOv2 (Oquab et al. 2024) and DINOv3 (Siméoni et al. 2025), by the names `dinov2` and `dinov3`.

A file of their weights says which one it has, and its sizes: a folder of transformers, a state dict of timm or of the
released code, or a Hugging Face name.

    python main_finetune.py --finetune facebook/dinov2-small --input_size 224 ...
    python main_pretrain.py --init_from facebook/dinov2-small --input_size 224 ...
    python main_pretrain.py --encoder dinov3 --encoder_args swiglu=true --num_cls_tokens 5 ...

The weights of DINOv2 have the Apache license. Those of DINOv3 have a license of their own, and their files are gated.

Class tokens after the first are registers. At equal weights, the features equal those of transformers, at all sizes of
images. For images of another size than that of the file, timm and the released code interpolate the positions of
DINOv2 without registers in other ways, so that their features differ.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import LayerScale, SwiGLU
from torch import Tensor

from mae.position_tables import resize_pos_embed
from models_vit import Attention, Block, Encoder

INIT_SCALE = 0.1  # of layer scale, for training from scratch


def rotary(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Returns cosines and sines (2, N, width) of the patches. `width`: channels of a head, a multiple of 4."""
    centers = [(2 * torch.arange(side, device=device) + 1) / side - 1 for side in grid]  # in [-1, 1]
    positions = torch.stack(torch.meshgrid(*centers, indexing="ij"), dim=-1).view(-1, 2, 1)  # (N, 2, 1): row, column
    periods = 100 ** (torch.arange(width // 4, device=device) / (width // 4))
    angles = (2 * math.pi * positions / periods).flatten(1).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the patches among tokens (B, h, L, D/h), but not the class token and the registers in front of them."""
    first = x[:, :, : -cos.shape[2]]
    patches = x[:, :, -cos.shape[2] :]
    left, right = patches.chunk(2, dim=3)
    patches = patches * cos + torch.cat([-right, left], dim=3) * sin
    return torch.cat([first, patches.to(first.dtype)], dim=2)


class RotaryAttention(Attention):
    """Attention whose queries and keys of patches are rotated by their positions (2, B or 1, 1, patches, D/h)."""

    def split(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().split(x)
        for cos, sin in inputs:
            q = rotated(q, cos, sin)
            k = rotated(k, cos, sin)
        return q, k, v


class DINOBlock(Block):
    """A block with layer scale.

    Args:
        swiglu: a gated MLP of two thirds of the width.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, swiglu: bool = False, **arguments: Any
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, **arguments)
        if swiglu:
            self.mlp = SwiGLU(dim, round(dim * mlp_ratio * 2 / 3))
        self.ls1 = LayerScale(dim, INIT_SCALE)
        self.ls2 = LayerScale(dim, INIT_SCALE)

    def compute(self, x: Tensor, *inputs: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), *inputs)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class RotaryBlock(DINOBlock):
    """A block with layer scale and rotary attention."""

    attention = RotaryAttention


class DINO(Encoder):
    """What both encoders share. Heads on the class token use the first one.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: as in `VisionTransformer`. Default: those of --model.
        swiglu: as in `DINOBlock`.
    """

    def __init__(
        self, *, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, swiglu: bool = False,
        **arguments: Any,
    ) -> None:  # fmt: skip
        block = partial(arguments.pop("block", None) or type(self).block, swiglu=swiglu)
        super().__init__(
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, block=block, **arguments
        )

    def class_features(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class DINOv2(DINO):
    """The encoder of DINOv2, with learned positions. Give --learned_pos_embed without a file."""

    block = DINOBlock

    def resize_table(self, table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """As in transformers: bicubic, with a filter if the model has registers."""
        return resize_pos_embed(table, old_grid, new_grid, antialias=self.num_prefix_tokens > 1)


class DINOv3(DINO):
    """The encoder of DINOv3, with rotary positions."""

    block = RotaryBlock

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        unused = torch.zeros_like(self.pos_embed[:, :1])
        del self.pos_embed
        self.register_buffer("pos_embed", unused, persistent=False)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return self.cls_token.new_zeros(1, self.num_prefix_tokens + grid[0] * grid[1], 1)

    def block_inputs(
        self, grid: tuple[int, int], ids_restore: Tensor | None = None, num_visible: int | None = None
    ) -> tuple[Tensor, ...]:
        block: Any = self.blocks[0]
        positions = rotary(grid, self.cls_token.shape[2] // block.attn.num_heads, self.cls_token.device)
        if ids_restore is None:
            return (positions[:, None, None],)
        return (positions[:, ids_restore.argsort(dim=1)[:, :num_visible]].unsqueeze(2),)
