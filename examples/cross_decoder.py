"""A decoder of cross-attention that predicts a part of the masked patches: CrossMAE (Fu et al. 2024, section 3).

    python main_pretrain.py --model_class examples.cross_decoder:CrossDecoder --model_args predicted=0.25 ...

Masked patches attend to the visible ones, and not to each other. Each is predicted alone, so training needs a part of
them only. Each decoder block attends to its own weighted sum of the embedded input and the outputs of all encoder
blocks, which are not normalized. So only `--uniformity` trains the final norm of the encoder. Without it, this norm
keeps weight 1 and bias 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mae.masking import require_random, take
from models_mae import MaskedAutoencoderViT
from models_vit import LAYER_NORM, Mlp, attend


class CrossBlock(nn.Module):
    """Cross-attention to the visible tokens and an MLP: queries (B, M, E), tokens (B, L, D) -> (B, M, E)."""

    def __init__(self, dim: int, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LAYER_NORM(dim)
        self.norm_tokens = LAYER_NORM(width)
        self.norm2 = LAYER_NORM(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(width, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        parts = self.q(self.norm1(x)), *self.kv(self.norm_tokens(tokens)).chunk(2, dim=2)
        heads = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts]
        x = x + self.proj(attend(heads[0], heads[1], heads[2]).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(MaskedAutoencoderViT):
    """A masked autoencoder with this decoder. `decoder_mix` has the weights of the sums, [decoder_depth, depth + 1].

    Args:
        predicted: patches that are predicted in training, as a fraction of all patches.
    """

    def __init__(self, *, predicted: float = 0.25, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.predicted = predicted
        width = self.cls_token.shape[2]
        dim = self.mask_token.shape[2]
        heads = arguments["decoder_num_heads"]
        ratio = arguments.get("decoder_mlp_ratio") or arguments.get("mlp_ratio", 4.0)
        self.decoder_blocks = nn.ModuleList(CrossBlock(dim, width, heads, ratio) for _ in self.decoder_blocks)
        self.decoder_mix = nn.Linear(len(self.blocks) + 1, len(self.decoder_blocks), bias=False)
        del self.decoder_embed  # keys and values are projected from the channels of the encoder
        self.norm.requires_grad_(self.uniformity > 0)
        self.initialize_weights()

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In training, the mask (B, N) has 1 for the patches that are predicted only."""
        if self.training and noise is not None:  # else the first masked patches are those of the upper rows
            require_random(noise, "CrossDecoder")
        visible, mask, ids_restore = super().random_masking(x, mask_ratio, noise, **context)
        return visible, mask * (ids_restore < self.last(visible.shape[1], x.shape[1])), ids_restore

    def last(self, num_visible: int, num_patches: int) -> int:
        """Returns the rank, in the order of the noise, after the last patch that is predicted."""
        count = max(1, round(self.predicted * num_patches)) if self.training else num_patches
        return min(num_patches, num_visible + count)

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The latent (B, T + K, D, depth + 1) has the embedded input and the output of each block."""
        x = self.tokenize(imgs, **context)
        x, mask, ids_restore = self.random_masking(x, mask_ratio, **context)
        grid = self.patch_embed.grid_of(*imgs.shape[-2:])
        inputs = self.block_inputs(grid, ids_restore, x.shape[1])
        outputs = [self.all_tokens(x, grid)]
        for block in self.blocks:
            outputs.append(block(outputs[-1], *inputs))
        return torch.stack(outputs, dim=3), mask, ids_restore

    def forward_decoder(
        self, latent: Tensor, ids_restore: Tensor, grid_size: tuple[int, int] | None = None, **context: Any
    ) -> Tensor:
        num_visible = self.patch_tokens(latent).shape[1]
        num_patches = ids_restore.shape[1]
        order = ids_restore.argsort(dim=1)[:, num_visible : self.last(num_visible, num_patches)]  # (B, M)
        positions = self.patch_tokens(self.decoder_positions(grid_size or self.grid_size, **context))
        x = self.mask_token + take(positions.expand(len(latent), -1, -1), order)
        for block, tokens in zip(self.decoder_blocks, self.decoder_mix(latent).unbind(3), strict=True):
            x = block(x, tokens)
        pred = self.decoder_pred(self.decoder_norm(x))
        found = pred.new_zeros(len(latent), num_patches, pred.shape[2])  # visible patches are not predicted
        return found.scatter(1, order.unsqueeze(2).expand(-1, -1, pred.shape[2]), pred)

    def with_terms(self, loss: Any, latent: Tensor, *args: Any, **context: Any) -> Any:
        needs_norm = self.uniformity or self.preserve
        return super().with_terms(loss, self.norm(latent[..., -1]) if needs_norm else latent, *args, **context)
