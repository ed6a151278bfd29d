"""The operations of the variants: Triton on a GPU; elsewhere, the same formulas and roundings in PyTorch.

Letters in shapes: B images, L tokens, h heads, d channels of a head, D channels of a token.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TILE = 2**14  # padded tokens x padded channels of a head that a program of the kernels holds without spilling
HAS_TRITON = find_spec("triton") is not None  # PyTorch's builds for CPUs lack it


def is_supported(qkv: Tensor, heads: int) -> bool:
    """Whether `attention` takes packed queries, keys and values (B, L, 3·h·d).

    On a GPU, fp32 products would need another kernel.
    """
    tile = _padded(qkv.shape[1]) * _padded(qkv.shape[2] // 3 // heads)
    is_half = qkv.dtype in (torch.bfloat16, torch.float16)
    return tile <= LARGEST_TILE and (not qkv.is_cuda or (is_half and HAS_TRITON))


def _padded(side: int) -> int:
    """The next power of two, at least 16, as in `attention_kernels.padded`."""
    return max(16, 1 << (side - 1).bit_length())


@torch.library.custom_op("lab::attention", mutates_args=())
def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of packed queries, keys and values: (B, L, 3·h·d) -> (B, L, h·d)."""
    if qkv.is_cuda:
        from benchmarks.lab import attention_kernels

        return attention_kernels.forward(qkv, heads)
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = _heads(qkv, heads)
        weights = _exponentials(q, k)
        mixed = (_rounded(weights, qkv) @ v) / weights.sum(-1, keepdim=True)
    return _packed(mixed).to(qkv.dtype)


@torch.library.custom_op("lab::attention_backward", mutates_args=())
def attention_backward(qkv: Tensor, dout: Tensor, heads: int) -> Tensor:
    """The gradient of the input of `attention` from that of its output: (B, L, h·d) -> (B, L, 3·h·d)."""
    if qkv.is_cuda:
        from benchmarks.lab import attention_kernels

        return attention_kernels.backward(qkv, dout, heads)
    q, k, v = _heads(qkv, heads)
    do = dout.float().unflatten(2, (heads, -1)).transpose(1, 2)
    weights = _exponentials(q, k)
    weights = weights / weights.sum(-1, keepdim=True)
    dweights = do @ v.transpose(2, 3)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dscores = _rounded(dscores, qkv)
    parts = (dscores @ k, dscores.transpose(2, 3) @ q, _rounded(weights, qkv).transpose(2, 3) @ do)
    return torch.cat([_packed(part) for part in parts], dim=2).to(qkv.dtype)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Packed (B, L, 3·h·d) -> queries, keys and values (B, h, L, d) in fp32."""
    return tuple(part.float().unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))


def _packed(x: Tensor) -> Tensor:
    """(B, h, L, d) -> (B, L, h·d)."""
    return x.transpose(1, 2).flatten(2)


def _exponentials(q: Tensor, k: Tensor) -> Tensor:
    """exp(scores - their maximum), (B, h, L, L)."""
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return (scores - scores.amax(-1, keepdim=True)).exp()


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    """Rounds fp32 as the operand of a matrix product in the dtype of another tensor."""
    return x.to(like.dtype).float()


@torch.library.custom_op("lab::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(a: Tensor, bias: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gelu(a + bias): that of a (..., D), and that of the bias (D,), which is in fp32."""
    if a.is_cuda:
        from benchmarks.lab import backward_kernels

        return backward_kernels.bias_gelu_backward(a, bias, dout)
    x = a.float() + bias.float()
    slope = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    gradient = dout.float() * slope
    return gradient.to(dout.dtype, memory_format=torch.contiguous_format), gradient.flatten(0, -2).sum(0)


@torch.library.custom_op("lab::add_norm_backward", mutates_args=())
def add_norm_backward(
    x: Tensor, weight: Tensor, dnorm: Tensor, dstream: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a stream x (..., D) that is passed on and normalized.

    Args:
        dnorm: the gradient of the output of LayerNorm.
        dstream: the gradient of the stream that is passed on.

    Returns:
        The gradient of x; the same in the dtype of `dnorm`; and (3, D) in fp32: the gradients of weight and bias, and
        the sum of the first over the tokens.
    """
    if x.is_cuda:
        from benchmarks.lab import backward_kernels

        return backward_kernels.add_norm_backward(x, weight, dnorm, dstream, eps)
    centered = x.float() - x.float().mean(-1, keepdim=True)
    inverse = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centered * inverse
    scaled = weight.float() * dnorm.float()
    means = [value.mean(-1, keepdim=True) for value in (scaled, scaled * normed)]
    gradient = dstream.float() + inverse * (scaled - means[0] - normed * means[1])
    sums = torch.stack([value.flatten(0, -2).sum(0) for value in (dnorm.float() * normed, dnorm.float(), gradient)])
    return gradient.to(x.dtype, copy=True), gradient.to(dnorm.dtype, copy=True), sums


# ------------------------------------------------------------------------------- shapes for traces, and derivatives

attention.register_fake(lambda qkv, heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3))
attention_backward.register_fake(lambda qkv, dout, heads: qkv.new_empty(qkv.shape))
bias_gelu_backward.register_fake(
    lambda a, bias, dout: (dout.new_empty(dout.shape), a.new_empty(a.shape[-1], dtype=torch.float32))
)
add_norm_backward.register_fake(
    lambda x, weight, dnorm, dstream, eps: (
        x.new_empty(x.shape),
        dnorm.new_empty(dnorm.shape),
        x.new_empty(3, x.shape[-1], dtype=torch.float32),
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.heads = inputs[1]


def _attention_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return attention_backward(*ctx.saved_tensors, dout, ctx.heads), None


attention.register_autograd(_attention_gradient, setup_context=_save)


class BiasGelu(torch.autograd.Function):
    """gelu(a + bias) in the dtype of a, computed in fp32: (..., D), (D,) -> (..., D)."""

    @staticmethod
    def forward(context: Any, a: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(a, bias)
        return F.gelu(a.float() + bias.float()).to(a.dtype)

    @staticmethod
    def backward(context: Any, dout: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, bias = context.saved_tensors
        da, dbias = bias_gelu_backward(a, bias, dout)
        return da, dbias.to(bias.dtype)


class AddNorm(torch.autograd.Function):
    """Adds a branch and its bias to a stream, and normalizes the sum.

    A stream (..., D), a branch (..., D), its bias (D,), weight and bias of LayerNorm (D,), eps -> the sum in the dtype
    of the stream, and its norm in the dtype of the branch.
    """

    @staticmethod
    def forward(
        context: Any, stream: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = (stream.float() + (branch.float() + branch_bias.float())).to(stream.dtype)
        normed = F.layer_norm(total.float(), total.shape[-1:], weight.float(), bias.float(), eps).to(branch.dtype)
        context.save_for_backward(total, weight)
        context.eps = eps
        return total, normed

    @staticmethod
    def backward(context: Any, dstream: Tensor, dnorm: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight = context.saved_tensors
        gradient, dbranch, sums = add_norm_backward(total, weight, dnorm, dstream, context.eps)
        return gradient, dbranch, sums[2], sums[0], sums[1], None
