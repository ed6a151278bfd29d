"""Losses in fp32, whatever autocast does."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def in_fp32(loss: Callable[..., Result]) -> Callable[..., Result]:
    """Returns a loss that computes in fp32 under autocast. Without autocast, it is the same.

    Autocast multiplies in 16 bits, and PyTorch sums in the type of its input. The gradient of a loss would have errors
    of up to several percent. The positional tensors of 16 bits become fp32; the named arguments stay as they are.
    """

    @wraps(loss)
    def compute(*args: Any, **kwargs: Any) -> Result:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return loss(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return loss(*map(_full, args), **kwargs)

    return compute


def _full(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value
