"""The share of the variance of masked patches that an autoencoder explains: 1 - loss / loss of the best constant.

The loss of normalized pixels alone does not say whether a model learns: .98 may be much, on noisy images.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mae import parallel, valid_pixels
from mae.data.batches import prefetch
from mae.data.item import Batch
from models_mae import MaskedAutoencoderViT

IMAGES = 2_000  # evenly spaced images on which the constant is computed
OF_TARGET = ("train_pixels", "train_target", "train_loss")  # entries of log.txt, the first that an epoch has


def has_constant(model: Any) -> bool:
    """Whether the loss of a model is the mean squared error of its target, whose best constant is known."""
    steps = ("forward", "forward_loss")
    return all(getattr(type(model), step) is getattr(MaskedAutoencoderViT, step) for step in steps)


@torch.no_grad()
def loss_of_constant(
    model: MaskedAutoencoderViT, batches: Iterable[Batch], mask_ratio: float, normalize: Any, device: torch.device
) -> float:
    """Returns the loss of the best constant prediction for the masked patches: their mean target, (P,).

    All processes call it. The result is that of the images of all processes.

    Args:
        model: `has_constant`. It is not called.
        batches: images and the noise of their masks.
        mask_ratio: fraction of masked patches.
        normalize: images -> the input of the model, on the device.
    """
    width = model.decoder_pred.out_features
    sums = torch.zeros(3, width, dtype=torch.float64, device=device)  # of weights, values and squares
    count = 0
    for batch in prefetch(batches, device):
        imgs, ratio, context = model.prepare_masking(
            batch.normalized(normalize), mask_ratio, noise=batch.noise, **batch.context
        )
        target = model.target(imgs, **context).double()
        tokens = target.new_zeros(*batch.noise.shape, 1)
        mask = model.random_masking(tokens, ratio, **context)[1]
        weight = _weights(model, imgs, mask, context.get("valid")).to(sums).expand_as(target)
        moments = (weight, weight * target, weight * target**2)
        sums += torch.stack([moment.sum(dim=(0, 1)) for moment in moments])
        count += len(imgs)
    weights, values, squares = sum(parallel.gather(sums.cpu())).unbind()
    variance = squares - values**2 / weights.clamp(min=torch.finfo(torch.float64).tiny)
    return float(variance.sum()) / sum(parallel.gather(count))


def _weights(model: MaskedAutoencoderViT, imgs: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
    """Returns the weight of each squared error in the loss of its image, which are 1 together, (B, N, P or 1)."""
    if valid is None:
        weight = mask.unsqueeze(2).double() / model.decoder_pred.out_features
    else:
        weight = model.patchify(valid_pixels.like_images(valid, imgs)).double()
        if model.target_dim is not None:
            weight = weight.amax(dim=2, keepdim=True).expand(-1, -1, model.target_dim)
        weight = weight / weight.sum(dim=2, keepdim=True).clamp(min=1) * mask.unsqueeze(2)
    scored = mask.sum(dim=1) if valid is None else weight.sum(dim=(1, 2))
    return weight / scored.clamp(min=1)[:, None, None]


def share(entries: Mapping[str, Any], constant: float | None) -> dict[str, float]:
    """Returns the entry of log.txt of an epoch: train_explained, at most 1; none if the constant is not known.

    Args:
        entries: means of the epoch.
        constant: from `loss_of_constant`, in the training images.
    """
    loss = next((entries[name] for name in OF_TARGET if entries.get(name) is not None), None)
    return {"train_explained": 1 - loss / constant} if constant and loss is not None else {}
