"""One tile of a matrix product, in float32: the loop that the feed-forward's kernels share.

a is (M, K). b is (N, K), read transposed, if B_ROWS; else (K, N). With TWO there is c beside b, of
its shape, and both products are made from the same tiles of a. Three ways to load them:

    descriptors  where the chip has a tensor memory accelerator and the layout allows it: one thread
                 asks for a tile, the hardware computes the addresses and fills what lies beyond the
                 edges with zeros, and no register holds a pointer (CUDA C++ Programming Guide)
    pointers     elsewhere
    interleaved  two products on NVIDIA: rows of b and c in turn make one operand twice as wide. Of
                 its product, columns 2 n and 2 n + 1 belong to row n of b and of c, and a thread
                 holds them side by side. One wide product reads a from shared memory once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.tiles import ProductTile, has_tma, interleaves


@triton.jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile of this program: GROUP rows of tiles together, so that they share columns in L2."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * blocks_n) * GROUP
    width = tl.minimum(GROUP, blocks_m - first)
    within = pid % (GROUP * blocks_n)
    return first + within % width, within // width


@triton.jit
def product(
    a, b, c, start_m, start_n, stride_a, stride_b, stride_c, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_ROWS: tl.constexpr,
    TWO: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """-> a b and a c, each [BLOCK_M, BLOCK_N] from row start_m and column start_n on; a c is
    anything unless TWO."""
    if LOADS == "descriptors":
        acc, acc_c = _by_descriptors(
            a, b, c, start_m, start_n, K, BLOCK_M, BLOCK_N, BLOCK_K, B_ROWS, TWO
        )
    elif LOADS == "interleaved":
        acc, acc_c = _interleaved(
            a, b, c, start_m, start_n, stride_a, stride_b, stride_c, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc, acc_c = _by_pointers(
            a, b, c, start_m, start_n, stride_a, stride_b, stride_c, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, B_ROWS, TWO,
        )  # fmt: skip
    return acc, acc_c


@triton.jit
def _by_descriptors(
    a, b, c, start_m, start_n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_ROWS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc_c = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        tile = a.load([start_m, k])
        if B_ROWS:
            acc = tl.dot(tile, tl.trans(b.load([start_n, k])), acc)
        else:
            acc = tl.dot(tile, b.load([k, start_n]), acc)
        if TWO:
            acc_c = tl.dot(tile, tl.trans(c.load([start_n, k])), acc_c)
    return acc, acc_c


@triton.jit
def _by_pointers(
    a_ptr, b_ptr, c_ptr, start_m, start_n, stride_a, stride_b, stride_c, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_ROWS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Rows beyond the edge read the last one again, so that the loop needs no mask. Columns beyond
    it are masked: clamped, they would no longer be known to lie side by side, and be read one by
    one."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - start_m)
    offs_n = tl.arange(0, BLOCK_N)
    keep_n = offs_n[None, :] < N - start_n
    a_ptr += start_m.to(tl.int64) * stride_a
    a_offs = offs_m[:, None] * stride_a + offs_k[None, :]
    if B_ROWS:
        b_ptr += start_n.to(tl.int64) * stride_b
        c_ptr += start_n.to(tl.int64) * stride_c
        offs_n = tl.minimum(offs_n, N - 1 - start_n)
        c_offs = offs_n[:, None] * stride_c + offs_k[None, :]
        b_offs = offs_n[:, None] * stride_b + offs_k[None, :]
    else:
        b_ptr += start_n
        b_offs = offs_k[:, None] * stride_b + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc_c = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    step_b = BLOCK_K if B_ROWS else BLOCK_K * stride_b
    for i in tl.range(0, K // BLOCK_K):
        a = tl.load(a_ptr + i * BLOCK_K + a_offs)
        at = b_ptr + tl.cast(i, tl.int64) * step_b + b_offs
        if B_ROWS:
            b = tl.trans(tl.load(at))
        else:
            b = tl.load(at, mask=keep_n, other=0.0)
        acc = tl.dot(a, b, acc)
        if TWO:
            acc_c = tl.dot(a, tl.trans(tl.load(c_ptr + i * BLOCK_K + c_offs)), acc_c)
    a_ptr += K // BLOCK_K * BLOCK_K
    b_ptr += tl.cast(K // BLOCK_K, tl.int64) * step_b
    rest = K % BLOCK_K
    if rest > 0:
        a = tl.load(a_ptr + a_offs, mask=offs_k[None, :] < rest, other=0.0)
        if B_ROWS:
            b = tl.trans(tl.load(b_ptr + b_offs, mask=offs_k[None, :] < rest, other=0.0))
        else:
            b = tl.load(b_ptr + b_offs, mask=(offs_k[:, None] < rest) & keep_n, other=0.0)
        acc = tl.dot(a, b, acc)
        if TWO:
            c = tl.load(c_ptr + (K - rest) + c_offs, mask=offs_k[None, :] < rest, other=0.0)
            acc_c = tl.dot(a, tl.trans(c), acc_c)
    return acc, acc_c


@triton.jit
def _interleaved(
    a_ptr, b_ptr, c_ptr, start_m, start_n, stride_a, stride_b, stride_c, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - start_m)
    both = tl.arange(0, 2 * BLOCK_N)
    offs_n = tl.minimum(both // 2, N - 1 - start_n)
    a_ptr += start_m.to(tl.int64) * stride_a
    b_ptr += start_n.to(tl.int64) * stride_b
    c_ptr += start_n.to(tl.int64) * stride_c
    a_offs = offs_m[:, None] * stride_a + offs_k[None, :]
    rows = tl.where(both % 2 == 0, b_ptr + offs_n * stride_b, c_ptr + offs_n * stride_c)
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], dtype=tl.float32)
    for i in tl.range(0, K // BLOCK_K):
        a = tl.load(a_ptr + i * BLOCK_K + a_offs)
        b = tl.load(rows[:, None] + (i * BLOCK_K + offs_k)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    rest = K % BLOCK_K
    if rest > 0:
        last = K - rest
        keep = offs_k[None, :] < rest
        a = tl.load(a_ptr + last + a_offs, mask=keep, other=0.0)
        b = tl.load(rows[:, None] + (last + offs_k)[None, :], mask=keep, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc.reshape(BLOCK_M, BLOCK_N, 2).split()


def how_to_load(a: Tensor, *bs: Tensor) -> str:
    """Of the three ways, the one for a and b, or a, b and c, whose columns lie side by side.

    A descriptor asks for base and rows at multiples of 16 bytes.
    """
    aligned = all(
        t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        for t in (a, *bs)
    )
    if has_tma() and aligned:
        return "descriptors"
    return "interleaved" if len(bs) == 2 and interleaves() else "pointers"


def operands(how: str, tile: ProductTile, a: Tensor, *bs: Tensor, b_rows: bool) -> tuple[Any, ...]:
    """What the kernel is handed for them."""
    if how != "descriptors":
        return a, *bs
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = TensorDescriptor.from_tensor
    block = [tile.block_n, tile.block_k] if b_rows else [tile.block_k, tile.block_n]
    return described(a, [tile.block_m, tile.block_k]), *(described(b, block) for b in bs)
