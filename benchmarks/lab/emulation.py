"""bf16 on CPUs without its instructions, where a product takes seven times as long as in fp32.

A product of bf16 tensors sums in fp32 and is rounded once. So is the fp32 product of the same numbers, if it is rounded
afterwards. It is one operation, so that torch.compile does not omit the rounding of its operands.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import models_vit

_linear = F.linear


@torch.library.custom_op("lab::product", mutates_args=())
def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias in the dtype of a, summed in fp32: (..., M, K), (..., K, N), (N,) -> (..., M, N)."""
    with torch.autocast(a.device.type, enabled=False):
        result = a.float() @ b.float()
        return (result if bias is None else result + bias.float()).to(a.dtype)


product.register_fake(lambda a, b, bias=None: a.new_empty(*a.shape[:-1], b.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    return product(dout, b.mT), product(a.mT, dout), dout.sum(0) if ctx.has_bias else None


product.register_autograd(_gradients, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, also under autocast."""
    if not torch.is_autocast_enabled("cpu"):
        return _linear(x, weight, bias)
    dtype = torch.get_autocast_dtype("cpu")
    bias = None if bias is None else bias.to(dtype)
    return product(x.to(dtype).flatten(0, -2), weight.to(dtype).t(), bias).unflatten(0, x.shape[:-1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`models_vit.attend` of a short sequence on a CPU."""
    if q.dtype == torch.float32:
        return models_vit.attention_weights(q, k) @ v
    return product(product(q * q.shape[-1] ** -0.5, k.mT).softmax(dim=-1).to(v.dtype), v)


@contextmanager
def fast_bf16(device: torch.device) -> Iterator[None]:
    """The context in which models compute so, on a CPU that needs it."""
    with ExitStack() as stack:
        if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            stack.enter_context(patch.object(F, "linear", linear))
            stack.enter_context(patch.object(models_vit, "attend", attend))
        yield
