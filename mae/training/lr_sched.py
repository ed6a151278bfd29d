"""The learning rate: linear scaling, warm-up, half-cycle cosine (Goyal et al. 2017; He et al. 2021, A.1).

Segmentation has a polynomial decay instead of the cosine.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from mae.registry import Choice, default_name, find

logger = logging.getLogger(__name__)

# function(progress) -> factor of the learning rate. The progress after the warm-up is 0 to 1.
Schedule = Callable[[float], float]


def cosine(progress: float) -> float:
    """Returns the factor of a half-cycle cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {"cosine": Choice("", cosine, is_default=True)}


def named(name: str | None) -> Schedule:
    """Returns the decay of a name. None: the default.

    Raises:
        ValueError: SCHEDULES has no such name.
    """
    return find("lr_schedule", SCHEDULES, name or default_name(SCHEDULES)).function


def scaled_lr(lr: float | None, blr: float | list[float] | None, effective_batch_size: int) -> float:
    """Returns and logs `lr`, or blr x effective batch size / 256 if `lr` is None (linear scaling rule).

    Args:
        blr: of several values, the largest is used.
    """
    how = ""
    if lr is None:
        blr = max(blr) if isinstance(blr, list) else blr
        assert blr is not None
        lr = blr * effective_batch_size / 256
        how = f" = blr {blr:g} x {effective_batch_size} / 256"
    logger.info(f"effective batch size {effective_batch_size}; learning rate {lr:.3g}{how}")
    return lr


def check_warmup(warmup_epochs: float, epochs: int) -> None:
    """Logs a warning if the warm-up is not shorter than the run."""
    if warmup_epochs >= epochs:
        logger.warning(
            f"warmup_epochs={warmup_epochs:g} is not shorter than the run of epochs={epochs}: the learning "
            f"rate only rises; give warmup_epochs={epochs / 20:g}, a twentieth, or more `epochs`"
        )


def adjust_learning_rate(optimizer: Optimizer, epoch: float, args: Any, schedule: Schedule | None = None) -> float:
    """Sets the learning rate of all parameter groups, multiplied by the `lr_scale` of the group.

    Args:
        epoch: fractional epoch; 1.5 is the middle of the second epoch.
        args: has `lr`, `min_lr`, `warmup_epochs` and `epochs`. After the warm-up, the decay from `lr` to `min_lr` is a
            half-cycle cosine, or with `poly_power`, which it may lack, (1 - progress) to this power.
        schedule: the decay in place of both.

    Returns:
        The learning rate of groups with an `lr_scale` of 1.
    """
    assert args.lr is not None, "set by `scaled_lr`"
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        poly_power = getattr(args, "poly_power", None)  # scripts for the published code do not have it
        if schedule:
            factor = float(schedule(progress))  # a checkpoint has no numbers of NumPy
        elif poly_power is not None:
            factor = (1 - progress) ** poly_power
        else:
            factor = cosine(progress)
        lr = args.min_lr + (args.lr - args.min_lr) * factor
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
