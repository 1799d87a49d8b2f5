"""Softmax with a temperature over the rows of a matrix, forward and backward.

    y_j = exp(x_j / t) / sum_i exp(x_i / t)        dx_j = y_j (dy_j - sum_i y_i dy_i) / t

One program owns a row and goes over it twice, in chunks of BLOCK_N. The first time each lane keeps
the maximum m and the sum l of the columns it has seen (Milakov, Gimelshein, Online normalizer
calculation for softmax, 2018, https://arxiv.org/abs/1805.02867), in base 2:

    s = x log2(e) / t        m' = max(m, s)        l' = l 2^(m - m') + 2^(s - m')

Then the lanes are brought to one maximum and added, and the second time writes 2^(s - m) / l.
Backward makes y again from x and the row's m and 1 / l, since what forward wrote is rounded to x's
dtype. All sums are float32, and no two programs write to one place.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 4096  # columns of a chunk: at 16 warps a lane has eight, one load of 16 bytes
WARPS = 16


def tempered_softmax_ref(x: Tensor, temperature: float) -> Tensor:
    return torch.softmax(x / temperature, -1)


@triton.jit
def fwd_kernel(x_ptr, y_ptr, m_ptr, inv_ptr, N, scale, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * N
    y_ptr += row * N
    cols = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_N], -1e30, dtype=tl.float32)  # finite: -inf - -inf would be NaN
    l = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        mask = start + cols < N
        x = tl.load(x_ptr + start + cols, mask=mask, other=float("-inf"))
        s = x.to(tl.float32) * scale
        m_new = tl.maximum(m, s)
        l = l * tl.math.exp2(m - m_new) + tl.math.exp2(s - m_new)
        m = m_new
    top = tl.max(m, 0)
    inv = 1.0 / tl.sum(l * tl.math.exp2(m - top), 0)
    tl.store(m_ptr + row, top)
    tl.store(inv_ptr + row, inv)
    for start in tl.range(0, N, BLOCK_N):
        mask = start + cols < N
        s = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32) * scale
        y = tl.math.exp2(s - top) * inv
        tl.store(y_ptr + start + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bwd_kernel(
    x_ptr, dy_ptr, m_ptr, inv_ptr, dx_ptr, N, scale, inv_t, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * N
    dy_ptr += row * N
    dx_ptr += row * N
    top = tl.load(m_ptr + row)
    inv = tl.load(inv_ptr + row)
    cols = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        mask = start + cols < N
        s = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32) * scale
        dy = tl.load(dy_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        acc += tl.where(mask, tl.math.exp2(s - top) * inv * dy, 0.0)
    c = tl.sum(acc, 0)
    for start in tl.range(0, N, BLOCK_N):
        mask = start + cols < N
        s = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32) * scale
        dy = tl.load(dy_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        dx = tl.math.exp2(s - top) * inv * (dy - c) * inv_t
        tl.store(dx_ptr + start + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class TemperedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float, block_n: int) -> Tensor:
        x = x.contiguous()
        N = x.shape[-1]
        M = x.numel() // max(N, 1)
        y = torch.empty_like(x)
        m = torch.empty(M, dtype=torch.float32, device=x.device)
        inv = torch.empty_like(m)
        scale = math.log2(math.e) / temperature
        if y.numel():
            fwd_kernel[(M,)](x, y, m, inv, N, scale, BLOCK_N=block_n, num_warps=WARPS)
        ctx.save_for_backward(x, m, inv)
        ctx.numbers = (N, scale, 1.0 / temperature, block_n)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, m, inv = ctx.saved_tensors
        dx = torch.empty_like(x)
        if dx.numel():
            grid = (len(m),)
            bwd_kernel[grid](x, dy.contiguous(), m, inv, dx, *ctx.numbers, num_warps=WARPS)
        return dx, None, None


def tempered_softmax(x: Tensor, temperature: float = 1.0, *, block_n: int = BLOCK_N) -> Tensor:
    """softmax(x / temperature) over the last dimension.

    Args:
        x: (..., N), float32, float16 or bfloat16, on a GPU.
        temperature: positive.
        block_n: columns of a chunk, a power of two.

    Returns:
        (..., N), of x's dtype. The sums are float32.

    Raises:
        ValueError: temperature is not positive, or x has no dimension.
    """
    if temperature <= 0.0:
        raise ValueError(f"tempered_softmax: temperature must be positive; got {temperature}")
    if x.ndim == 0:
        raise ValueError("tempered_softmax: x must have a dimension; got a scalar")
    return TemperedSoftmax.apply(x, temperature, block_n)
