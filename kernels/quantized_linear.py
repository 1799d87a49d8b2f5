"""A linear layer whose weights are of 8 or 4 bits, y = f(x W^T + bias).

    8 bits   W[n, k] = scale[n] q[n, k],  or  scale[n, k // G] q[n, k]      q in -127 .. 127
    4 bits   W[n, k] = scale[n, k // G, 0] q[n, k] + scale[n, k // G, 1]    q in 0 .. 15

Two weights of 4 bits share a byte, the even column in the low half. Weights are read once, as they
are stored, and become numbers in registers; sums are float32. How depends on the rows of x:

    one, or few of float32   a program takes a few rows of W and all of K. A lane reads 16 bytes of
                             each, multiplies in float32, and adds what it has; lanes are added up
                             at the end. All of K is in flight at once where the lanes reach.
    more, in 16 bits         y^T = W x^T: W is the left operand, whose tiles are 64 rows or more
                             whatever M is, and x the right one, of 8 rows at least: no row of x is
                             made up to fill a tile of 16. Where so few tiles do not fill the chip,
                             programs share the columns of one; a second kernel adds their sums.
    many, or of columns      W as numbers once, and the vendor's product: to read 1 byte a weight
    that are no multiple     and write 2 takes less time than a product of so many rows loses
    of 16

The same input gives the same bits. Lin et al., AWQ, 2024, https://arxiv.org/abs/2306.00978; Frantar
et al., MARLIN, 2025, https://arxiv.org/abs/2408.11743: weights as the left operand.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.ffn import _act
from fastgpt.kernels.product import place
from fastgpt.kernels.tiles import (
    cdiv,
    has_ptx,
    interpreting,
    on_device,
    quantized_row_tile,
    quantized_splits,
    quantized_tile,
    unpack_tile,
)

FEW = 8  # rows of float32 that are multiplied one by one
MANY = 1024  # rows beyond which weights become numbers first


@triton.jit
def _scales(scale_ptr, at, keep, BITS: tl.constexpr):
    """Scale and low, in float32, of groups; of 8 bits there is no low."""
    if BITS == 8:
        scale = tl.load(scale_ptr + at, mask=keep, other=0.0).to(tl.float32)
        return scale, scale
    else:
        both = (at * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
        pair = tl.load(scale_ptr + both, mask=keep[:, :, None], other=0.0).to(tl.float32)
        return pair.split()


@triton.jit
def _finished(y, bias_ptr, cols, N, ACT: tl.constexpr, PTX: tl.constexpr, HAS_BIAS: tl.constexpr):
    """f(y + bias), y with columns `cols` along its last dimension."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if ACT != "none":
        y = _act(y, ACT, PTX)
    return y


@triton.jit
def _nibbles(words, x, LANES: tl.constexpr):
    """The sums of (q - 8) x over a lane's 32 columns: words [ROWS, LANES, 4], x [LANES, 32].

    The bits of v, below 2^23, in those of the number 2^23 are 2^23 + v: a mask and a difference
    make q 16^i of a word's i-th four bits, with no shift, and no conversion, which is slow. A
    second half of a word is brought down to where the first is.
    """
    even, odd = x.reshape(LANES, 4, 4, 2).split()
    a, c = even.reshape(LANES, 4, 2, 2).split()
    b, d = odd.reshape(LANES, 4, 2, 2).split()
    a, e = a.split()
    b, f = b.split()
    c, g = c.split()
    d, h = d.split()
    half = words & 0xFFFF | 0x4B000000
    acc = _nibble(half, 0) * a[None, :, :]
    acc = tl.fma(_nibble(half, 1), (b * 2.0**-4)[None, :, :], acc)
    acc = tl.fma(_nibble(half, 2), (c * 2.0**-8)[None, :, :], acc)
    acc = tl.fma(_nibble(half, 3), (d * 2.0**-12)[None, :, :], acc)
    half = (words >> 16) & 0xFFFF | 0x4B000000
    acc = tl.fma(_nibble(half, 0), e[None, :, :], acc)
    acc = tl.fma(_nibble(half, 1), (f * 2.0**-4)[None, :, :], acc)
    acc = tl.fma(_nibble(half, 2), (g * 2.0**-8)[None, :, :], acc)
    acc = tl.fma(_nibble(half, 3), (h * 2.0**-12)[None, :, :], acc)
    return tl.sum(acc, 2)


@triton.jit
def _nibble(half, I: tl.constexpr):
    """16^I (q - 8)."""
    bits = half & (0x7F800000 | 15 << 4 * I)
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * 16**I)


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, stride_x, stride_w, stride_s, M, N, K,
    BITS: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row of x by ROWS rows of W, which are bytes, or of 4 bits words of 8 columns. G is 0
    where a row has one scale."""
    VEC: tl.constexpr = 128 // BITS  # columns of a lane
    EACH: tl.constexpr = 16 if BITS == 8 else 4  # bytes, or words, of a lane
    # Rows of x beside each other: those after the first find W in a cache.
    m = (tl.program_id(0) % M).to(tl.int64)
    first = tl.program_id(0) // M * ROWS
    n = tl.arange(0, ROWS)
    near = tl.minimum(n, N - 1 - first)
    lane = tl.arange(0, LANES)
    x_ptr += m * stride_x
    w_ptr += first.to(tl.int64) * stride_w
    scale_ptr += first.to(tl.int64) * stride_s
    places = lane[:, None] * EACH + tl.arange(0, EACH)[None, :]
    offs_w = near[:, None, None] * stride_w + places[None, :, :]
    cols = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    acc = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for start in tl.range(0, K, LANES * VEC):
        x = tl.load(x_ptr + start + cols, mask=cols < K - start, other=0.0).to(tl.float32)
        done = start * EACH // VEC
        keep = (places < (K - start) * EACH // VEC)[None, :, :]
        q = tl.load(w_ptr + done + offs_w, mask=keep, other=0)
        if BITS == 8:
            part = tl.sum(q.to(tl.float32) * x[None, :, :], 2)
        else:
            part = _nibbles(q, x, LANES)
        if G == 0:
            acc += part
        else:
            k = start + lane * VEC
            at = near[:, None] * stride_s // (8 // BITS) + (k // G)[None, :]
            scale, least = _scales(scale_ptr, at, (n < ROWS)[:, None] & (k < K)[None, :], BITS)
            acc = tl.fma(scale, part, acc)
            if BITS == 4:
                acc = tl.fma(tl.fma(scale, 8.0, least), tl.sum(x, 1)[None, :], acc)
    y = tl.sum(acc, 1)
    if G == 0:
        y *= tl.load(scale_ptr + near).to(tl.float32)
    y = _finished(y, bias_ptr, first + n, N, ACT, PTX, HAS_BIAS)
    y_ptr += m * N + first
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N - first)


@triton.jit
def _weights(
    w_ptr, scale_ptr, n, start, stride_w, stride_s, K, DTYPE: tl.constexpr, BITS: tl.constexpr,
    G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows n and BLOCK_K columns of W from start on, as numbers; without its scale if G is 0."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    byte = tl.arange(0, BYTES) + start * BITS // 8
    at = w_ptr + n[:, None] * stride_w + byte[None, :]
    if EVEN:
        q = tl.load(at)
    else:
        q = tl.load(at, mask=byte[None, :] < K * BITS // 8, other=0)
    if BITS == 4:
        q = tl.join(q & 15, q >> 4).reshape(BLOCK_N, BLOCK_K)
    if G == 0:
        return q.to(DTYPE)
    else:
        GROUPS: tl.constexpr = BLOCK_K // G if BLOCK_K > G else 1
        group = start // G + tl.arange(0, GROUPS)
        keep = (group < K // G)[None, :] & (n >= 0)[:, None]
        at = n[:, None] * stride_s // (8 // BITS) + group[None, :]
        scale, least = _scales(scale_ptr, at, keep, BITS)
        w = q.to(tl.float32).reshape(BLOCK_N, GROUPS, BLOCK_K // GROUPS)
        if BITS == 4:
            w = tl.fma(w, scale[:, :, None], least[:, :, None])
        else:
            w *= scale[:, :, None]
        return w.reshape(BLOCK_N, BLOCK_K).to(DTYPE)


@triton.jit(do_not_specialize=["M", "blocks_each"])
def _rows_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, stride_x, stride_w, stride_s, M, N, K, blocks_each,
    BITS: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of y; or, if SPLIT, the sum over blocks_each blocks of K, of float32."""
    block_m, block_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    start_m, start_n = block_m * BLOCK_M, block_n * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    near = tl.minimum(n, N - 1 - start_n)
    x_ptr += start_m.to(tl.int64) * stride_x
    w_ptr += start_n.to(tl.int64) * stride_w
    scale_ptr += start_n.to(tl.int64) * stride_s
    offs_x = tl.minimum(m, M - 1 - start_m)[:, None] * stride_x + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    first = 0
    last = K
    if SPLIT:
        first = tl.program_id(1) * blocks_each * BLOCK_K
        last = tl.minimum(K, first + blocks_each * BLOCK_K)
    for start in tl.range(first, last, BLOCK_K):
        w = _weights(
            w_ptr, scale_ptr, near, start, stride_w, stride_s, K, x_ptr.dtype.element_ty, BITS, G,
            BLOCK_N, BLOCK_K, EVEN,
        )  # fmt: skip
        if EVEN:
            x = tl.load(x_ptr + start + offs_x)
        else:
            x = tl.load(x_ptr + start + offs_x, mask=k[None, :] < K - start, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    if G == 0:
        acc *= tl.load(scale_ptr + near).to(tl.float32)[:, None]
    y = tl.trans(acc)
    rows, cols = start_m + m, start_n + n
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1) * (M.to(tl.int64) * N) + at, y, mask=mask)
    else:
        y = _finished(y, bias_ptr, cols[None, :], N, ACT, PTX, HAS_BIAS)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "splits"])
def _join_kernel(
    part_ptr, bias_ptr, y_ptr, M, N, splits, ACT: tl.constexpr, PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of the programs that share a tile, added in order."""
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part_ptr += m * N
    y = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.range(0, splits):
        y += tl.load(part_ptr + split * (M.to(tl.int64) * N) + cols, mask=cols < N, other=0.0)
    y = _finished(y, bias_ptr, cols, N, ACT, PTX, HAS_BIAS)
    tl.store(y_ptr + m * N + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _unpack_kernel(
    w_ptr, scale_ptr, out_ptr, stride_w, stride_s, N, K, BITS: tl.constexpr, G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W as numbers."""
    start_n = tl.program_id(0) * BLOCK_N
    start_k = tl.program_id(1) * BLOCK_K
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K) + start_k
    near = tl.minimum(n, N - 1 - start_n)
    scale_ptr += start_n.to(tl.int64) * stride_s
    w = _weights(
        w_ptr + start_n.to(tl.int64) * stride_w, scale_ptr, near, start_k, stride_w, stride_s, K,
        tl.float32, BITS, G, BLOCK_N, BLOCK_K, False,
    )  # fmt: skip
    if G == 0:
        w *= tl.load(scale_ptr + near).to(tl.float32)[:, None]
    out_ptr += start_n.to(tl.int64) * K
    mask = (n[:, None] < N - start_n) & (k[None, :] < K)
    tl.store(out_ptr + n[:, None] * K + k[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)


def _rows(t: Tensor) -> Tensor:
    """With columns side by side, and rows so near that 32 bits count the elements of a tile."""
    return t if t.stride(1) == 1 and t.stride(0) < 1 << 22 else t.contiguous()


def _laid(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """-> weight and scale as kernels read them, bits, columns K, columns of a group or 0."""
    bits = 8 if weight.dtype == torch.int8 else 4
    K = weight.shape[1] * 8 // bits
    group = 0 if scale.ndim == 1 else K // scale.shape[1]
    return _rows(weight), scale.contiguous(), bits, K, group


def quantized_linear_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: (M, K), weight: (N, K) int8 or (N, K / 2) uint8 -> (M, N) of x's dtype."""
    M, N = len(x), len(weight)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    single = x.dtype == torch.float32
    # Other rows are read by single elements, past the copies that run beside the products.
    whole = x.shape[1] % 16 == 0 or interpreting()
    with on_device(x):
        if M == 1 or (single and M <= FEW):
            _one_by_one(x, weight, scale, bias, activation, y)
        elif single or M > MANY or not whole:
            return _activated(F.linear(x, dequantize(weight, scale, x.dtype), bias), activation)
        else:
            _by_tiles(x, weight, scale, bias, activation, y)
    return y


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu_(y)
    if activation == "silu":
        return F.silu(y, inplace=True)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _one_by_one(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, y: Tensor
) -> None:
    M, N = y.shape
    w, s, bits, K, group = _laid(weight, scale)
    if bits == 4:
        whole = w.stride(0) % 4 == 0 and w.data_ptr() % 4 == 0
        w = (w if whole else w.contiguous().clone()).view(torch.int32)
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = quantized_row_tile(N, K * bits // 8)
    _row_kernel[(M * cdiv(N, tile.block_m),)](
        x, w, s, bias if bias is None else bias.contiguous(), y, x.stride(0), w.stride(0),
        s.stride(0), M, N, K, BITS=bits, G=group, ACT=activation, PTX=has_ptx(),
        HAS_BIAS=bias is not None, ROWS=tile.block_m, LANES=tile.block_n // 16,
        **tile.options,
    )  # fmt: skip


def _by_tiles(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, y: Tensor
) -> None:
    M, N = y.shape
    w, s, bits, K, group = _laid(weight, scale)
    x = _rows(x)
    if x.data_ptr() % 16 or x.stride(0) % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    tile = quantized_tile(min(128, max(8, triton.next_power_of_2(M))), bits, group)
    blocks = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    # Sums of all programs, 4 bytes each, are to be no more bytes than the weights are.
    each, splits = quantized_splits(blocks, cdiv(K, tile.block_k), K * bits // (32 * M))
    bias = bias if bias is None else bias.contiguous()
    last = {"ACT": activation, "PTX": has_ptx(), "HAS_BIAS": bias is not None}
    out = y
    if splits > 1:
        out = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    _rows_kernel[(blocks, splits)](
        x, w, s, bias, out, x.stride(0), w.stride(0), s.stride(0), M, N, K, each, BITS=bits,
        G=group, SPLIT=splits > 1, EVEN=K % tile.block_k == 0, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=8, **last, **tile.options,
    )  # fmt: skip
    if splits > 1:
        join = unpack_tile()
        _join_kernel[(M, cdiv(N, join.block_n))](
            out, bias, y, M, N, splits, BLOCK=join.block_n, **last, **join.options
        )


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W as numbers, (N, K)."""
    w, s, bits, K, group = _laid(weight, scale)
    N = len(w)
    out = torch.empty((N, K), dtype=dtype, device=w.device)
    tile = unpack_tile()
    with on_device(w):
        _unpack_kernel[(cdiv(N, tile.block_m), cdiv(K, tile.block_n))](
            w, s, out, w.stride(0), s.stride(0), N, K, BITS=bits, G=group, BLOCK_N=tile.block_m,
            BLOCK_K=tile.block_n, **tile.options,
        )  # fmt: skip
    return out
