"""Local attention in the decoder, for spectrograms: AudioMAE (Huang et al. 2022, section 3.3).

    python main_pretrain.py --model_class examples.local_decoder:LocalDecoder --model_args window=[4,2] ...

The patches of a spectrogram are related to their neighbors in time and frequency. A patch attends to the patches of its
window and to the class tokens. In every second block, the windows are shifted by half their size. AudioMAE has windows
of 4 x 4 patches, which are shifted in time only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models_mae import MaskedAutoencoderViT
from models_vit import Attention, Block


def window_mask(grid: tuple[int, int], window: tuple[int, int], num_class_tokens: int, shifted: bool) -> Tensor:
    """Returns which tokens (row) attend to which (column), bool (T + N, T + N)."""
    indices = [(torch.arange(side) + shifted * (size // 2)) // size for side, size in zip(grid, window, strict=True)]
    windows = torch.cartesian_prod(*indices)  # (N, 2)
    same = (windows[:, None] == windows[None]).all(dim=2)
    return F.pad(same, (num_class_tokens, 0, num_class_tokens, 0), value=True)


class LocalAttention(Attention):
    """Attention within windows."""

    mask: Tensor

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))


class LocalDecoder(MaskedAutoencoderViT):
    """The decoder has local attention. Images have the size `img_size`.

    Args:
        window: (rows, columns) of patches.
    """

    def __init__(self, *, window: list[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        rows, columns = window
        for number, block in enumerate(self.decoder_blocks):
            assert isinstance(block, Block)
            attention = LocalAttention(block.attn.proj.in_features, block.attn.num_heads)
            attention.q_norm = block.attn.q_norm
            attention.k_norm = block.attn.k_norm
            attention.load_state_dict(block.attn.state_dict())
            mask = window_mask(self.grid_size, (rows, columns), self.num_prefix_tokens, number % 2 == 1)
            attention.register_buffer("mask", mask, persistent=False)
            block.attn = attention
