"""The loss of a batch in masked pre-training (He et al. 2021, section 3)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.item import Batch
from mae.training import published_loop


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
