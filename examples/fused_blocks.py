"""A decoder that sees the outputs of all encoder blocks (MFF, Liu et al. 2023, section 3), or the class token only.

    python main_pretrain.py --model_class examples.fused_blocks:FusedBlocks ...
    python main_pretrain.py --model_class examples.fused_blocks:FusedBlocks --model_args hidden=0.5 ...

The decoder gets a weighted sum of the outputs of all blocks, so that the last block need not keep the pixels. For a
share `hidden` of the images of a batch, it gets the class token only and predicts all patches (RetroMAE, Xiao et al.
2022, section 3.2, whose decoder also sees a part of the words).
"""

from typing import Any

import torch
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT


class FusedBlocks(MaskedAutoencoderViT):
    """A masked autoencoder with this decoder. `decoder_weights` (depth,) are those of the sum, before a softmax.

    Args:
        hidden: share of the images of a training batch whose visible patches are hidden from the decoder, 0 to 1.

    Raises:
        ValueError: `hidden` is no share.
    """

    def __init__(self, *, hidden: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not 0 <= hidden <= 1:
            raise ValueError(f"model_args=[hidden={hidden}]: it is a share from 0 to 1")
        self.hidden = hidden
        width = self.cls_token.shape[2]
        self.decoder_fuse = nn.ModuleList(nn.Linear(width, width) for _ in range(len(self.blocks) - 1))
        self.decoder_weights = nn.Parameter(torch.zeros(len(self.blocks)))
        if hidden:
            self.decoder_hidden = nn.Parameter(torch.zeros(width))  # in place of a visible patch
        self.initialize_weights()

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The latent (B, T + K, D, 2) has the fused outputs, and the output of the last block, both normalized."""
        x = self.tokenize(imgs, **context)
        x, mask, ids_restore = self.random_masking(x, mask_ratio, **context)
        grid = self.patch_embed.grid_of(*imgs.shape[-2:])
        inputs = self.block_inputs(grid, ids_restore, x.shape[1])
        x = self.all_tokens(x, grid)
        outputs = []
        for block, fuse in zip(self.blocks, [*self.decoder_fuse, nn.Identity()], strict=True):
            x = block(x, *inputs)
            outputs.append(fuse(x))
        fused = torch.stack(outputs, dim=3) @ self.decoder_weights.softmax(dim=0).to(x.dtype)
        return torch.stack([self.norm(fused), self.norm(x)], dim=3), mask, ids_restore

    def is_hidden(self, images: Tensor) -> Tensor:
        """Whether the visible patches of images (B, ...) are hidden, (B, 1): those of the first ones in training."""
        count = round(self.hidden * len(images)) if self.training else 0
        return torch.arange(len(images), device=images.device)[:, None] < count

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor, *args: Any, **context: Any) -> Tensor:
        fused = latent[..., 0]
        if not self.hidden:
            return super().forward_decoder(fused, ids_restore, *args, **context)
        is_patch = torch.arange(fused.shape[1], device=fused.device) >= self.num_prefix_tokens
        hides = (self.is_hidden(fused) & is_patch)[:, :, None]
        fused = torch.where(hides, self.decoder_hidden.to(fused.dtype), fused)
        return super().forward_decoder(fused, ids_restore, *args, **context)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, **context: Any) -> Any:
        """All patches of a hidden image have a loss. Each image has the same weight."""
        if self.hidden:
            mask = torch.where(self.is_hidden(mask), 1.0, mask)
            if "valid" not in context:  # with invalid pixels, the loss has this weight already
                mask = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return super().forward_loss(imgs, pred, mask, **context)

    def with_terms(self, loss: Any, latent: Tensor, *args: Any, **context: Any) -> Any:
        return super().with_terms(loss, latent[..., 1], *args, **context)
