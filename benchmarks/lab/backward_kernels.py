"""Backward passes in Triton: the gradients of biases and of LayerNorm's weights are sums in the same kernel.

With TRITON_INTERPRET=1 in the environment, before Triton is imported, the kernels run on the CPU.

Letters in shapes: M rows (tokens of all images), D channels.
"""

# mypy: disallow-untyped-defs=False
# The parameters of a kernel have the types of Triton's language.

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # of a program of GELU
PROGRAMS = 1056  # of LayerNorm: 8 for each multiprocessor of an H100
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _bias_gelu_backward(
    A, BIAS, DOUT, DA, SUMS, num_rows, dim, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(BIAS + columns, mask=columns < dim, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, ROWS, STEP):
        rows = tl.program_id(0) * ROWS + first + tl.arange(0, STEP)
        index = rows[:, None].to(tl.int64) * dim + columns[None, :]
        inside = (rows[:, None] < num_rows) & (columns[None, :] < dim)
        x = tl.load(A + index, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        gradient = tl.load(DOUT + index, mask=inside, other=0.0).to(tl.float32)
        gradient *= 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * INV_SQRT_2_PI
        tl.store(DA + index, gradient.to(DA.dtype.element_ty), mask=inside)
        total += tl.sum(gradient, 0)
    tl.store(SUMS + tl.program_id(0) * dim + columns, total, mask=columns < dim)


@triton.jit
def _add_norm_backward(
    X, WEIGHT, DNORM, DSTREAM, DX, DBRANCH, SUMS, num_rows, eps, rows_per_program, DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    inside = columns < DIM
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(0) * rows_per_program
    for row in range(first, min(num_rows, first + rows_per_program)):
        index = tl.cast(row, tl.int64) * DIM + columns
        x = tl.load(X + index, mask=inside, other=0.0).to(tl.float32)
        dnorm = tl.load(DNORM + index, mask=inside, other=0.0).to(tl.float32)
        dstream = tl.load(DSTREAM + index, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, x - tl.sum(x, 0) / DIM, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centered * centered, 0) / DIM + eps)
        normed = centered * inverse
        scaled = weight * dnorm
        dx = dstream + inverse * (scaled - tl.sum(scaled, 0) / DIM - normed * tl.sum(scaled * normed, 0) / DIM)
        tl.store(DX + index, dx.to(DX.dtype.element_ty), mask=inside)
        tl.store(DBRANCH + index, dx.to(DBRANCH.dtype.element_ty), mask=inside)
        dweight += dnorm * normed
        dbias += dnorm
        total += tl.where(inside, dx, 0.0)
    sums = SUMS + tl.program_id(0) * 3 * DIM + columns
    tl.store(sums, dweight, mask=inside)
    tl.store(sums + DIM, dbias, mask=inside)
    tl.store(sums + 2 * DIM, total, mask=inside)


def bias_gelu_backward(a: Tensor, bias: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.bias_gelu_backward`."""
    a = a.contiguous()
    dout = dout.contiguous()
    dim = a.shape[-1]
    num_rows = a.numel() // dim
    da = torch.empty_like(dout)
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(dim, min(256, triton.next_power_of_2(dim))))
    sums = a.new_empty(grid[0], dim, dtype=torch.float32)
    _bias_gelu_backward[grid](
        a, bias, dout, da, sums, num_rows, dim, ROWS=ROWS, STEP=16, COLUMNS=min(256, triton.next_power_of_2(dim)),
        num_warps=4,
    )  # fmt: skip
    return da, sums.sum(0)


def add_norm_backward(
    x: Tensor, weight: Tensor, dnorm: Tensor, dstream: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.add_norm_backward`."""
    x = x.contiguous()
    dnorm = dnorm.contiguous()
    dim = x.shape[-1]
    num_rows = x.numel() // dim
    programs = min(num_rows, PROGRAMS)
    dx = torch.empty_like(x)
    dbranch = torch.empty_like(dnorm)
    sums = x.new_empty(programs, 3, dim, dtype=torch.float32)
    _add_norm_backward[(programs,)](
        x, weight, dnorm, dstream.contiguous(), dx, dbranch, sums, num_rows, eps, triton.cdiv(num_rows, programs),
        DIM=dim, COLUMNS=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return dx, dbranch, sums.sum(0)
