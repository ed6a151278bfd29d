"""The loss of a batch in masked pre-training (He et al. 2021, section 3)."""

import logging
import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data import transforms
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.training import loop
from models_mae import TARGET_EPS, MaskedAutoencoderViT

logger = logging.getLogger(__name__)


def train_one_epoch(
    model: nn.Module,
    data_loader: loop.Loader,
    optimizer: Optimizer,
    options: loop.EpochOptions,
    *,
    mask_ratio: float,
    normalize: Normalize,
) -> None:
    """Trains a masked autoencoder for an epoch.

    Args:
        model: a `MaskedAutoencoderViT`, possibly wrapped.
        data_loader: batches, of which the labels are not used.
        mask_ratio: fraction of masked patches.
        normalize: images -> the input of the model, on the device.
    """

    def compute_loss(batch: Any) -> Tensor:
        return model(batch.normalized(normalize), mask_ratio, noise=batch.noise, **batch.context)[0]

    loop.run_epoch(compute_loss, model, data_loader, optimizer, options)


def check_targets(model: MaskedAutoencoderViT, batch: Batch, std: Tensor) -> None:
    """Logs a warning if `norm_pix_loss` does not bring the targets to a variance near 1.

    The published formula adds TARGET_EPS to the variance of a patch. It is small for normalized images. The mean over
    the patches of several images decides, so that images with many flat patches are no reason for a warning.

    Args:
        batch: as a data loader returns it.
        std: standard deviation that normalizes them, as in `Normalize`.
    """
    images = transforms.to_unit_range(batch.images)
    if batch.valid is not None:
        images = images.masked_fill(~batch.valid[:, None], math.nan)
    normalized = (images - images.nanmean(dim=(2, 3), keepdim=True)) / std.cpu()  # no channel offsets
    deviation = math.sqrt(model.patchify(normalized).var(dim=-1).nanmean())
    if deviation**2 < TARGET_EPS:
        logger.warning(
            f"`norm_pix_loss` hardly scores these images: the normalized pixels of a patch have a standard deviation "
            f"of {deviation:.1g}, and the loss adds {TARGET_EPS:g} to its square; give value_range=[MIN, MAX], or "
            f"`mean` and `std` of these images, which mae.data prints"
        )
