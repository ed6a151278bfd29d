"""The loss of a batch in masked pre-training (He et al. 2021, section 3)."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data import transforms
from mae.data.item import Batch
from mae.training import published_loop
from models_mae import TARGET_EPS, MaskedAutoencoderViT

logger = logging.getLogger(__name__)


def loss(
    model: nn.Module, batch: Batch, *, mask_ratio: float, normalize: Callable[[Tensor], Tensor]
) -> Tensor | Mapping[str, Tensor]:
    """Returns the loss () of a batch, or its terms by name.

    Args:
        model: a `MaskedAutoencoderViT`, possibly wrapped.
        batch: its noise determines the masks.
        mask_ratio: fraction of masked patches.
        normalize: images -> the input of the model, on the device.
    """
    return model(batch.normalized(normalize), mask_ratio, noise=batch.noise, **batch.context)[0]


def train_one_epoch(
    model: nn.Module,
    data_loader: Any,
    optimizer: Optimizer,
    device: torch.device | str,
    epoch: int,
    loss_scaler: Any,
    log_writer: Any = None,
    args: Any = None,
) -> dict[str, float]:
    """Trains for an epoch, for scripts in the style of the published code. `main_pretrain.py` has `loop.Trainer`.

    Args:
        data_loader: pairs of normalized images (B, c, H, W) and labels, which are not used.
        loss_scaler: as `util.misc.NativeScalerWithGradNormCount`.
        log_writer: a `SummaryWriter`, or None.
        args: has `accum_iter`, `mask_ratio`, `lr`, `min_lr`, `epochs` and `warmup_epochs`.

    Returns:
        The means of the epoch over all processes, `loss` and `lr`.

    Raises:
        NonFiniteLoss: a loss is infinite or not a number.
    """

    def compute_loss(images: Tensor, _: Any) -> Tensor:
        return model(images, mask_ratio=args.mask_ratio)[0]

    return published_loop.train_one_epoch(
        compute_loss, model, data_loader, optimizer, torch.device(device), epoch, loss_scaler, log_writer, args,
        loss_tag="train_loss",
    )  # fmt: skip


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
