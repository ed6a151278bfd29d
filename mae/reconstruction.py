"""Reconstructed images of a masked autoencoder, as pictures show them."""

from typing import Any, NamedTuple

from torch import Tensor

from mae import valid_pixels


class Reconstruction(NamedTuple):
    """The result of `MaskedAutoencoderViT.reconstruct`. Images are (B, c, H, W), in the value range of the input."""

    original: Tensor
    masked: Tensor  # masked patches are 0, the mean color of normalized images
    prediction: Tensor  # the output of the decoder for all patches
    pasted: Tensor  # the prediction of masked patches, the original of visible patches
    mask: Tensor  # (B, N), 0 visible, 1 masked


def reconstruction_of(
    model: Any, imgs: Tensor, pred: Tensor, patch_mask: Tensor, valid: Tensor | None
) -> Reconstruction:
    """Returns images from the predictions of a `MaskedAutoencoderViT`.

    Args:
        imgs: (B, c, H, W).
        pred: predictions for all patches (B, N, p·p·c).
        patch_mask: (B, N), 0 visible, 1 masked.
        valid: valid pixels, bool (B, H, W). Default: all.
    """
    grid = model.patch_embed.grid_of(*imgs.shape[-2:])
    if valid is not None:
        imgs = valid_pixels.without_invalid(imgs, valid)
    target = model.patchify(imgs)
    pred = pred.to(target.dtype)
    if model.norm_pix_loss:
        mean, std = model.patch_statistics(target, imgs, valid)
        pred = pred * std + mean
    masked = patch_mask.unsqueeze(-1).to(target.dtype)
    return Reconstruction(
        original=imgs,
        masked=model.unpatchify(target * (1 - masked), grid),
        prediction=model.unpatchify(pred, grid),
        pasted=model.unpatchify(target * (1 - masked) + pred * masked, grid),
        mask=patch_mask,
    )
