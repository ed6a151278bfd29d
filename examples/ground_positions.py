"""Positions in meters on the ground, which follow crops, scaling and flips: Scale-MAE (Reed et al. 2023).

    python main_pretrain.py --dataset py:MODULE:FUNCTION --encoder examples.ground_positions:GroundPositions ...

The dataset has `maps = ["east", "north"]`, the coordinates (H, W) of the pixels in meters:

    north, east = gsd * np.mgrid[:height, :width].astype(np.float32)
    return {"image": image, "label": label, "east": east, "north": north}

Scale-MAE multiplies the index of a patch by the meters of a pixel. Here, the position of a patch is the distance of its
center to the first patch, divided by the patch size in pixels, which is the same number. The decoder has these
positions, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models_vit import Encoder


def encode(positions: Tensor, width: int) -> Tensor:
    """Positions (B, N) -> sines of all frequencies, followed by their cosines (B, N, width)."""
    omega = 10000 ** (-torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angles = positions.unsqueeze(2).double() * omega
    return torch.cat([angles.sin(), angles.cos()], dim=2).float()


class GroundPositions(Encoder):
    """Patch tokens whose positions are meters on the ground, in the encoder and in the decoder."""

    decoder_embed: nn.Linear  # of the autoencoder

    def tokenize(  # type: ignore[override]
        self, imgs: Tensor, east: Tensor, north: Tensor, **context: Any
    ) -> Tensor:
        return self.patch_embed(imgs) + self.encodings(east, north, self.cls_token.shape[2])

    def decoder_positions(self, grid: tuple[int, int], east: Tensor, north: Tensor, **context: Any) -> Tensor:
        encodings = self.encodings(east, north, self.decoder_embed.out_features)
        return F.pad(encodings, (0, 0, self.num_prefix_tokens, 0))

    def encodings(self, east: Tensor, north: Tensor, width: int) -> Tensor:
        """Coordinates (B, H, W) -> positions of the patches (B, N, width)."""
        encodings = []
        for coordinates, size in zip((east, north), reversed(self.patch_embed.patch_size), strict=True):
            centers = F.avg_pool2d(coordinates.unsqueeze(1), self.patch_embed.patch_size).flatten(1)  # (B, N)
            distances = (centers - centers.amin(dim=1, keepdim=True)) / size
            encodings.append(encode(distances, width // 2))
        return torch.cat(encodings, dim=2)
