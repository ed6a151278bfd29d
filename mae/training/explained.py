"""The share of the variance of masked patches that an autoencoder explains: 1 - loss / loss of the best constant.

The loss of normalized pixels alone does not say whether a model learns: .98 may be much, on noisy images.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae import parallel, valid_pixels
from mae.data import loader
from mae.data.batches import prefetch
from mae.data.generators import preserve_generators
from mae.data.item import Batch
from mae.data.run_data import RunData
from mae.data.samples import Samples
from mae.data.source import evenly_spaced, is_stream
from models_mae import MaskedAutoencoderViT

logger = logging.getLogger(__name__)

IMAGES = 2_000  # evenly spaced images on which the constant is computed
OF_TARGET = ("train_pixels", "train_target", "train_loss")  # entries of log.txt, the first that an epoch has


class Constants(NamedTuple):
    """Losses of predictions that are the same for all masked patches."""

    best: float  # of the mean target of a patch
    zero: float  # of 0: with norm_pix_loss, the mean of each patch


def has_constant(model: Any) -> bool:
    """Whether the loss of a model is the mean squared error of its target, whose best constant is known."""
    steps = ("forward", "forward_loss")
    return all(getattr(type(model), step) is getattr(MaskedAutoencoderViT, step) for step in steps)


def open_share(
    model: Any, samples: Samples, data: RunData, num_visible: int, batch_size: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """Returns `share` with the constant of some training images; None for a stream, or another loss.

    Args:
        samples: the augmented training images.
        num_visible: number of visible patches of an image.
    """
    if is_stream(samples.source) or not has_constant(model):
        return None
    some = evenly_spaced(len(samples), IMAGES)
    batches = loader.eval_loader(samples, batch_size, data.data.num_workers, data.pin_memory, some)
    begin = time.perf_counter()
    with preserve_generators():
        constant = losses_of_constants(model, batches, num_visible, data.normalize, data.device).best
    seconds = time.perf_counter() - begin
    logger.info(f"0 % explained is a loss of {constant:.4f}, of {len(some):,} training images ({seconds:.1f} s)")
    return partial(share, constant=constant)


@torch.no_grad()
def losses_of_constants(
    model: MaskedAutoencoderViT, batches: Iterable[Batch], num_visible: int, normalize: Any, device: torch.device
) -> Constants:
    """Returns the losses of constant predictions (P,) for the masked patches: the best one, their mean target, and 0.

    All processes call it. The result is that of the images of all processes.

    Args:
        model: `has_constant`. It is not called.
        batches: images, and the noise of their masks.
        num_visible: number of visible patches of an image: those with the smallest noise.
        normalize: images -> the input of the model, on the device.
    """
    width = model.decoder_pred.out_features
    sums = torch.zeros(3, width, dtype=torch.float64)  # of weights, values and squares
    count = 0
    for batch in prefetch(batches, device):
        imgs = batch.normalized(normalize)
        target = _fp64(model.target(imgs, **batch.context))
        weight = _weights(model, imgs, batch, num_visible).expand_as(target)
        moments = (weight, weight * target, weight * target**2)
        sums += torch.stack([moment.sum(dim=(0, 1)) for moment in moments]).cpu()
        count += len(imgs)
    weights, values, squares = sum(parallel.gather(sums)).unbind()
    variance = squares - values**2 / weights.clamp(min=torch.finfo(torch.float64).tiny)
    total = sum(parallel.gather(count))
    return Constants(best=float(variance.sum()) / total, zero=float(squares.sum()) / total)


def _weights(model: MaskedAutoencoderViT, imgs: Tensor, batch: Batch, num_visible: int) -> Tensor:
    """Returns the weight of each squared error in the loss of its image, which are 1 together, (B, N, P or 1)."""
    valid = None
    batch_noise: Any = batch.noise
    noise = _fp64(batch_noise)
    if batch.valid is not None:
        valid = _fp64(model.patchify(valid_pixels.like_images(batch.valid, imgs)))
        noise = noise.masked_fill(~valid.any(dim=2), math.inf)
    mask = (noise.argsort(dim=1).argsort(dim=1) >= num_visible).double().unsqueeze(2)
    if valid is None:
        weight = mask / model.decoder_pred.out_features
        return weight / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if model.target_dim is not None:
        valid = valid.amax(dim=2, keepdim=True).expand(-1, -1, model.target_dim)
    weight = valid / valid.sum(dim=2, keepdim=True).clamp(min=1) * mask
    return weight / weight.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _fp64(values: Tensor) -> Tensor:
    return (values.cpu() if values.is_mps else values).double()  # MPS has no fp64


def share(entries: Mapping[str, Any], constant: float | None) -> dict[str, float]:
    """Returns the entry of log.txt of an epoch: train_explained, at most 1; none if the constant is not known.

    Args:
        entries: means of the epoch.
        constant: the best of `losses_of_constants`, in the training images.
    """
    loss = next((entries[name] for name in OF_TARGET if entries.get(name) is not None), None)
    return {"train_explained": 1 - loss / constant} if constant and loss is not None else {}
