"""Pictures to look at, made from tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data.transforms import Normalize

GAP = 2  # pixels between pictures


def tile(columns: Sequence[Tensor], to_pixels: Callable[[Tensor], Tensor], scale: int = 1) -> np.ndarray:
    """Sets batches of images side by side, an image a row, as one picture.

    Args:
        columns: batches (B, c, H, W), such as the first four of `MaskedAutoencoderViT.reconstruct`.
        to_pixels: brings their values into 0 to 1 (`transforms.Normalize.inverse`).
        scale: enlarges each pixel so many times.

    Returns:
        uint8 (height, width, 1 or 3), on white; of more channels the first three, of two the first.
    """
    channels = 3 if columns[0].shape[1] >= 3 else 1
    rows = torch.stack([to_pixels(column.float())[:, :channels] for column in columns], dim=1)  # (B, columns, c, H, W)
    rows = rows.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    rows = torch.nn.functional.pad(rows, (0, GAP, 0, GAP), value=1.0)
    B, count, c, height, width = rows.shape
    picture = rows.permute(0, 3, 1, 4, 2).reshape(B * height, count * width, c)[:-GAP, :-GAP]
    return (picture * 255).round().to(torch.uint8).cpu().numpy()


def reconstruction(
    model: Any, images: Tensor, noise: Tensor, normalize: Normalize, mask_ratio: float = 0.75, scale: int = 1
) -> np.ndarray:
    """What a masked autoencoder makes of images: a row each with original, masked, prediction, pasted.

    Args:
        model: a `MaskedAutoencoderViT`; its `reconstruct` says how targets that were normalised are shown.
        images: uint8 (B, c, H, W).
        noise: (B, N), which chooses the masks.
    """
    device = normalize.mean.device
    result = model.reconstruct(normalize(images.to(device)), mask_ratio, noise=noise.to(device))
    return tile(result[:4], normalize.inverse, scale)
