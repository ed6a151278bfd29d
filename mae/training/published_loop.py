"""The training loop of the published code, for scripts of forks that call `train_one_epoch` of an engine.

It does not resume within an epoch, and its batches have no noise. Our scripts have `loop.Trainer`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae import parallel
from mae.training.lr_sched import adjust_learning_rate
from mae.training.nonfinite import NonFiniteLoss

PRINT_EVERY = 20  # iterations


def train_one_epoch(
    compute_loss: Callable[[Tensor, Any], Tensor],
    model: nn.Module,
    data_loader: Any,
    optimizer: Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler: Any,
    log_writer: Any,
    args: Any,
    loss_tag: str,
    max_norm: float | None = None,
) -> dict[str, float]:
    """Trains for an epoch. An update has `args.accum_iter` iterations; those that remain at the end change nothing.

    Args:
        compute_loss: images (B, c, H, W) on the device, labels as they are -> the loss (). It calls the model.
        data_loader: pairs of images and labels. More elements of a batch are not used.
        loss_scaler: called with the loss, the optimizer, `clip_grad`, `parameters` and `update_grad`.
        loss_tag: name of the loss in the log.

    Returns:
        The means of the epoch over all processes, `loss` and `lr`.

    Raises:
        NonFiniteLoss: a loss is infinite or not a number.
        ValueError: there are no batches.
    """
    model.train()
    optimizer.zero_grad()
    losses = []
    rates = []
    for iteration, (images, labels, *_) in enumerate(data_loader):
        if iteration % args.accum_iter == 0:
            adjust_learning_rate(optimizer, epoch + iteration / len(data_loader), args)
        images = images.to(device, non_blocking=True)
        with torch.autocast("cuda", enabled=device.type == "cuda"):  # on a CPU, the published code trains in fp32
            loss = compute_loss(images, labels)
        losses.append(loss.item())
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        if not math.isfinite(losses[-1]):
            raise NonFiniteLoss(f"epoch {epoch}, batch {iteration}: loss {losses[-1]}, lr {rates[-1]:.3g}")
        is_update = (iteration + 1) % args.accum_iter == 0
        loss_scaler(
            loss / args.accum_iter, optimizer, clip_grad=max_norm or None, parameters=model.parameters(),
            update_grad=is_update,
        )  # fmt: skip
        if is_update:
            optimizer.zero_grad()
        if is_update:
            mean = _mean(losses[-1], device)  # by all processes: often, rank 0 alone has a log_writer
        if is_update and log_writer is not None:
            x = int(1000 * (epoch + iteration / len(data_loader)))
            log_writer.add_scalar(loss_tag, mean, x)
            log_writer.add_scalar("lr", rates[-1], x)
        if iteration % PRINT_EVERY == 0:
            print(f"Epoch: [{epoch}]  [{iteration}/{len(data_loader)}]  lr: {rates[-1]:.6f}  loss: {losses[-1]:.4f}")
    if not losses:
        raise ValueError("the data loader has no batches")
    stats = {"loss": _mean(sum(losses) / len(losses), device), "lr": sum(rates) / len(rates)}
    print(f"Averaged stats: lr: {stats['lr']:.6f}  loss: {stats['loss']:.4f}")
    return stats


def _mean(value: float, device: torch.device) -> float:
    """Returns the mean of a number over the processes."""
    return parallel.mean_over_processes(torch.tensor(value, device=device)).item()
