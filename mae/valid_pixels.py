"""Invalid pixels, such as clouds: what they change in the method, as functions of tensors.

Invalid pixels are 0, the mean, at the input, and have no loss. Patches without valid pixels are masked.

Letters in shapes: B images, c channels, H x W pixels, p pixels along the side of a patch, N patches, K visible patches,
P predicted values per patch. The weight of a value is whether its pixel is valid: bool (B, N, p·p·c), the result of
`patchify` for `like_images`.
"""

import math

import torch
from torch import Tensor

from mae.masking import num_visible


def like_images(valid: Tensor, imgs: Tensor) -> Tensor:
    """Valid pixels (B, H, W) of images (B, c, H, W) -> bool (B, c, H, W): a pixel is valid in all channels.

    Raises:
        ValueError: `valid` has another shape.
    """
    if valid.shape != (imgs.shape[0], *imgs.shape[2:]):
        raise ValueError(f"valid is {tuple(valid.shape)}, and the images {tuple(imgs.shape)}: give (B, H, W)")
    return valid.bool().unsqueeze(1).expand(-1, imgs.shape[1], -1, -1)


def without_invalid(imgs: Tensor, valid: Tensor) -> Tensor:
    """Returns images (B, c, H, W) in which the invalid pixels are 0. `valid`: bool (B, H, W)."""
    return imgs.masked_fill(~valid.bool().unsqueeze(1), 0)


def exclude(
    imgs: Tensor, valid: Tensor, weight: Tensor, noise: Tensor | None, mask_ratio: float, is_mask: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns images without the invalid pixels, and noise that masks the patches without valid pixels.

    Args:
        imgs: (B, c, H, W).
        valid: bool (B, H, W).
        weight: bool (B, N, p·p·c).
        noise: (B, N). Default: torch.rand.
        mask_ratio: fraction of masked patches.
        is_mask: the noise is that of a given mask, which must mask these patches.

    Returns:
        Images (B, c, H, W), 0 at invalid pixels; noise (B, N), infinite at patches without valid pixels.

    Raises:
        RuntimeError: an image has too few patches with valid pixels. On a GPU, a later operation raises the error.
        ValueError: the given mask leaves patches without valid pixels visible.
    """
    has_valid = weight.any(dim=-1)
    if noise is None:
        noise = torch.rand(has_valid.shape, device=has_valid.device)
    visible = num_visible(has_valid.shape[1], mask_ratio)
    enough = (has_valid.sum(dim=1) >= visible).all()
    torch._assert_async(enough, f"an image has fewer than {visible} patches with valid pixels")  # no wait for a GPU
    excluded = noise.masked_fill(~has_valid, math.inf)
    if is_mask and not torch.equal(excluded > 0, noise > 0):
        raise ValueError("the mask leaves patches without valid pixels visible: mask them")
    return without_invalid(imgs, valid), excluded


def patch_statistics(patches: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of the valid values of each patch (B, N, 1). The variance is unbiased.

    Args:
        patches: (B, N, p·p·c).
        weight: bool (B, N, p·p·c).
        eps: added to the variance.
    """
    count = weight.sum(dim=-1, keepdim=True)
    mean = patches.where(weight, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = (patches - mean).where(weight, 0).square().sum(dim=-1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1) + eps).sqrt()


def mean_squared_error(difference: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the images of their mean squared errors, (). Each image has the same weight.

    The error of an image is the mean over its masked patches with valid pixels; 0 if there is none. The error of a
    patch is the mean over its valid values.

    Args:
        difference: of prediction and target (B, N, P).
        weight: bool (B, N, P).
        mask: (B, N), 1 masked.
    """
    loss = difference.where(weight, 0).square().sum(dim=-1) / weight.sum(dim=-1).clamp(min=1)
    scored = mask * weight.any(dim=-1)
    return ((loss * scored).sum(dim=1) / scored.sum(dim=1).clamp(min=1)).mean()
