# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Small kernels without a fault, for the lab's tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def add_row(x_ptr, row_ptr, scale, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    row = tl.load(row_ptr + cols + rows * 0)
    x = tl.load(x_ptr + rows * COLS + cols)
    tl.store(y_ptr + rows * COLS + cols, x + row * scale.to(tl.float32))


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m * K + k[None, :])
        acc = tl.dot(a, tl.load(b_ptr + k[:, None] * N + n), acc)
    tl.store(c_ptr + m * N + n, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def matmul_descriptors(
    a_desc, b_desc, c_desc, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([m, k]), b_desc.load([k, n]), acc)
    c_desc.store([m, n], acc.to(tl.float16))


@triton.jit
def add_in_place(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(x_ptr + offs, x + 1, mask=offs < n)


@triton.jit
def histogram(x_ptr, counts_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts_ptr + tl.load(x_ptr + offs), 1)


@triton.jit
def choose(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    """Lanes of one load that point into two tensors."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(tl.where(offs % 2 == 0, a_ptr + offs, b_ptr + offs)))


@triton.jit
def gelu(x_ptr, y_ptr, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """x * sigmoid(FACTOR * (x + 0.044715 x^3)); the tanh form of GELU if FACTOR is 1.5957691."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(FACTOR * (x + 0.044715 * x * x * x))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def double(x):
    return x + x


@triton.jit
def apply(x_ptr, y_ptr, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, ACT(x), mask=offs < n)


@triton.jit
def tanh(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, libdevice.tanh(x), mask=offs < n)


@triton.jit
def sum_rows(x_ptr, y_ptr, m_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
    total = tl.sum(x, 0)
    tl.store(y_ptr + row, total)
    tl.store(m_ptr + row, total / N)


def gelu_reference(x_ptr: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x_ptr, approximate="tanh")


def add_in_place_reference(x_ptr: Tensor) -> dict[str, Tensor]:
    return {"x_ptr": x_ptr.add_(1)}


def apply_reference(x_ptr: Tensor) -> Tensor:
    return x_ptr + x_ptr


def tanh_reference(x_ptr: Tensor) -> Tensor:
    return x_ptr.tanh()


def matmul_reference(a_ptr: Tensor, b_ptr: Tensor) -> Tensor:
    return a_ptr @ b_ptr


def sum_rows_reference(x_ptr: Tensor, N: int) -> dict[str, Tensor]:
    total = x_ptr.sum(1)
    return {"y_ptr": total, "m_ptr": total / N}
