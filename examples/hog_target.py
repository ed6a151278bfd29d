"""Histograms of oriented gradients as the target: MaskFeat (Wei et al. 2022, section 3).

    python main_pretrain.py --model_class examples.hog_target:HOGTarget --data_path IMAGES --output_dir runs/hog

An override of one step of the method. The target of a patch is one histogram of `target_dim` orientations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models_mae import MaskedAutoencoderViT


class HOGTarget(MaskedAutoencoderViT):
    """Predicts the orientations of gradients in a patch."""

    target_dim = 9

    def target(self, imgs: Tensor, **context: Any) -> Tensor:
        gray = F.pad(imgs.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
        dy = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
        angle = torch.atan2(dy, dx) % torch.pi  # (B, 1, H, W)
        bins = F.one_hot((angle * 9 / torch.pi).long().clamp(max=8).squeeze(1), 9).permute(0, 3, 1, 2)
        histograms = F.avg_pool2d(bins * torch.hypot(dx, dy), self.patch_embed.patch_size)  # (B, 9, rows, columns)
        return F.normalize(histograms.flatten(2).transpose(1, 2), dim=-1)  # (B, N, 9)
