"""Attention of short sequences in Triton: a program computes a head of an image, whose keys and values it holds.

The input is the packed queries, keys and values of a linear layer, and the gradient is packed as well: no tensor is
split or concatenated. A program sees whole rows of scores, so that the forward pass saves nothing but its input, and
the backward pass is one kernel without atomic additions.

With TRITON_INTERPRET=1 in the environment, before Triton is imported, the kernels run on the CPU.

Letters in shapes: B images, L tokens, h heads, d channels of a head.
"""

# mypy: disallow-untyped-defs=False
# The parameters of a kernel have the types of Triton's language.

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # the GPU has an instruction for 2^x, and none for e^x
Setting = tuple[int, int]  # rows of scores that a program computes at once; warps

# The launch settings of a kernel, "forward" or "backward", for a number of tokens and channels: `tune` finds them.
CHOSEN: dict[tuple[str, int, int], Setting] = {}


@triton.jit
def _load(start, rows, length, stride, columns, width: tl.constexpr):
    """Rows of a matrix; 0 outside of it."""
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, values, rows, length, stride, columns, width: tl.constexpr):
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    tl.store(start + rows[:, None] * stride + columns[None, :], values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _exponentials(q, k, tokens, length, scale):
    """2^(scores - their maximum) of rows of queries, in fp32; 0 at keys beyond the sequence."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    scores = tl.where(tokens[None, :] < length, scores, -float("inf"))
    return tl.exp2(scores - tl.max(scores, 1)[:, None])


@triton.jit
def _attention_forward(
    QKV, OUT, scale, length, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    dim: tl.constexpr = HEADS * WIDTH
    qkv = QKV + image * length * 3 * dim + head * WIDTH
    out = OUT + image * length * dim + head * WIDTH
    columns = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    k = _load(qkv + dim, tokens, length, 3 * dim, columns, WIDTH)
    v = _load(qkv + 2 * dim, tokens, length, 3 * dim, columns, WIDTH)
    for first in range(0, length, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = _load(qkv, rows, length, 3 * dim, columns, WIDTH)
        weights = _exponentials(q, k, tokens, length, scale)
        mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / tl.sum(weights, 1)[:, None]
        _store(out, mixed, rows, length, dim, columns, WIDTH)


@triton.jit
def _attention_backward(
    QKV, DOUT, DQKV, scale, length, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    dim: tl.constexpr = HEADS * WIDTH
    qkv = QKV + image * length * 3 * dim + head * WIDTH
    dqkv = DQKV + image * length * 3 * dim + head * WIDTH
    dout = DOUT + image * length * dim + head * WIDTH
    columns = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    k = _load(qkv + dim, tokens, length, 3 * dim, columns, WIDTH)
    v = _load(qkv + 2 * dim, tokens, length, 3 * dim, columns, WIDTH)
    dk = tl.zeros((TOKENS, COLUMNS), tl.float32)
    dv = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, length, ROWS):
        rows = first + tl.arange(0, ROWS)
        q = _load(qkv, rows, length, 3 * dim, columns, WIDTH)
        do = _load(dout, rows, length, dim, columns, WIDTH)
        weights = _exponentials(q, k, tokens, length, scale)
        weights = weights / tl.sum(weights, 1)[:, None]
        dv = tl.dot(tl.trans(weights.to(v.dtype)), do, dv, input_precision="ieee")
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale
        dscores = dscores.to(k.dtype)
        _store(dqkv, tl.dot(dscores, k, input_precision="ieee"), rows, length, 3 * dim, columns, WIDTH)
        dk = tl.dot(tl.trans(dscores), q, dk, input_precision="ieee")
    _store(dqkv + dim, dk, tokens, length, 3 * dim, columns, WIDTH)
    _store(dqkv + 2 * dim, dv, tokens, length, 3 * dim, columns, WIDTH)


def forward(qkv: Tensor, heads: int) -> Tensor:
    """Packed queries, keys and values (B, L, 3·h·d) -> mixed values (B, L, h·d)."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _launch(_attention_forward, "forward", [qkv, out], heads)
    return out


def backward(qkv: Tensor, dout: Tensor, heads: int) -> Tensor:
    """The gradient of the input of `forward` from that of its output, (B, L, h·d) -> (B, L, 3·h·d)."""
    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    _launch(_attention_backward, "backward", [qkv, dout.contiguous(), dqkv], heads)
    return dqkv


def _launch(kernel: triton.JITFunction, name: str, tensors: list[Tensor], heads: int) -> None:
    images, length, dim = tensors[0].shape
    width = dim // 3 // heads
    # No kernel of 16 rows spills registers on an H100, up to ops.LARGEST_TILE.
    rows, warps = CHOSEN.get((name, length, width), (16, 4 if length <= 64 else 8))
    kernel[(images * heads,)](
        *tensors, width**-0.5, length, HEADS=heads, WIDTH=width, COLUMNS=padded(width), ROWS=rows,
        TOKENS=padded(length), num_warps=warps, num_stages=1,
    )  # fmt: skip


def padded(size: int) -> int:
    """The side of the tile that holds a side: a power of two, at least 16, as matrix units require."""
    return max(16, triton.next_power_of_2(size))


def settings(length: int) -> list[Setting]:
    """The launch settings that `tune` compares."""
    return [(16, 2), (16, 4), (64, 4)] if length <= 64 else [(16, 4), (16, 8), (32, 8), (64, 8)]


def tune(qkv: Tensor, heads: int) -> dict[str, float | str]:
    """Chooses the fastest launch settings of both kernels for a shape, on its device.

    Returns:
        Microseconds per image by kernel and setting, or the first line of its error.
    """
    images, length, dim = qkv.shape
    dout = torch.randn(images, length, dim // 3, device=qkv.device, dtype=qkv.dtype)
    found: dict[str, float | str] = {}
    for name, call in (("forward", lambda: forward(qkv, heads)), ("backward", lambda: backward(qkv, dout, heads))):
        times: dict[Setting, float] = {}
        for setting in settings(length):
            CHOSEN[name, length, dim // 3 // heads] = setting
            title = f"{name}, {setting[0]} rows, {setting[1]} warps"
            try:
                times[setting] = 1e3 * triton.testing.do_bench(call, warmup=5, rep=20) / images
                found[title] = times[setting]
            except Exception as error:  # of the compiler, whose type depends on the version
                found[title] = str(error).partition("\n")[0][:100]
        CHOSEN[name, length, dim // 3 // heads] = min(times, key=lambda setting: times[setting])
    return found
