"""Rotary position embedding of q and k, with an RMS norm of each head before it.

Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864, eq. 34. Of a head x of D elements, at a
position whose angles have cosines c and sines s, the pair i is (x[i], x[i + R / 2]), or interleaved
(x[2 i], x[2 i + 1]), for i < R / 2:

    y_a = x_a c - x_b s        y_b = x_b c + x_a s

What lies beyond R is left as it is: pairs turned by no angle. With weights w each head is
normalised first (Dehghani et al., 2023, https://arxiv.org/abs/2302.05442, section 2.1):

    rstd = 1 / sqrt(sum(x^2) / D + eps)        xhat = x * rstd        y = turn(xhat * w)

Backward turns the gradient back, which is the forward with -s; with the norm

    g = turn_back(dy)        dx = rstd * (g w - xhat * sum(g w xhat) / D)        dw = sum of g xhat

A program takes all heads of a token, those of q and then those of k, so that cosines and sines are
read once. Backward through the norm has a few programs walk over the tokens, each with its own
float32 sums for dw; a second kernel adds those. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.column_sum import column_sum
from fastgpt.kernels.tiles import cdiv, on_device, programs, rotary_tile


@triton.jit
def _offsets(HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the first and the second elements of the pairs are, [1, BLOCK_D] each."""
    i = tl.arange(0, BLOCK_D)[None, :]
    if ROT == HALF:
        a = i
        b = i + HALF
    else:
        a = i + tl.where(i < ROT, 0, ROT)
        b = i + tl.where(i < ROT, ROT, HALF)
    return i, a, b


@triton.jit
def _load_pairs(
    ptrs, mask, HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The pairs of the heads at ptrs [BLOCK_H, 1], in float32, two of [BLOCK_H, BLOCK_D]."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        if BLOCK_D != HALF:
            mask &= d < 2 * HALF
        x = tl.load(ptrs + d, mask=mask, other=0.0)
        x_a, x_b = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_D, 2]))
    else:
        i, a, b = _offsets(HALF, ROT, BLOCK_D)
        if BLOCK_D != HALF:
            mask &= i < HALF
        x_a = tl.load(ptrs + a, mask=mask, other=0.0)
        x_b = tl.load(ptrs + b, mask=mask, other=0.0)
    return x_a.to(tl.float32), x_b.to(tl.float32)


@triton.jit
def _store_pairs(
    ptrs, y_a, y_b, mask, HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        if BLOCK_D != HALF:
            mask &= d < 2 * HALF
        y = tl.join(y_a.to(dtype), y_b.to(dtype))
        tl.store(ptrs + d, tl.reshape(y, [BLOCK_H, 2 * BLOCK_D]), mask=mask)
    else:
        i, a, b = _offsets(HALF, ROT, BLOCK_D)
        if BLOCK_D != HALF:
            mask &= i < HALF
        tl.store(ptrs + a, y_a.to(dtype), mask=mask)
        tl.store(ptrs + b, y_b.to(dtype), mask=mask)


@triton.jit
def _load_turn(cos_ptr, sin_ptr, at, ROT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of a token, [1, BLOCK_D] each: those of no angle beyond ROT."""
    i = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + at + i, mask=i < ROT, other=1.0)
    sin = tl.load(sin_ptr + at + i, mask=i < ROT, other=0.0)
    return cos, sin


@triton.jit
def _load_weight(
    w_ptr, HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The weights of the pairs, in float32, two of [1, BLOCK_D]."""
    return _load_pairs(
        w_ptr + tl.zeros([1, 1], dtype=tl.int32), tl.full([1, 1], 1, dtype=tl.int1), HALF, ROT, 1,
        BLOCK_D, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _store_sums(
    out_ptr, a, b, HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The sums over rows of a and b, of pairs, as one head at out_ptr."""
    i, at_a, at_b = _offsets(HALF, ROT, BLOCK_D)
    if INTERLEAVED:
        at_a = 2 * i
        at_b = 2 * i + 1
    sums = tl.join(tl.sum(a, 0)[None, :], tl.sum(b, 0)[None, :])  # [1, BLOCK_D, 2]
    tl.store(out_ptr + tl.join(at_a, at_b), sums, mask=(i < HALF)[:, :, None])


@triton.jit
def _fwd_heads(
    x_ptr, y_ptr, stride_h, cos, sin, w_a, w_b, heads, eps,
    HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token: those at x_ptr, into those at y_ptr."""
    for start in tl.range(0, heads, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H))[:, None]
        at = h.to(tl.int64)
        mask = h < heads
        a, b = _load_pairs(
            x_ptr + at * stride_h, mask, HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED
        )  # fmt: skip
        if HAS_NORM:
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
            a *= rstd * w_a
            b *= rstd * w_b
        _store_pairs(
            y_ptr + at * (2 * HALF), a * cos - b * sin, b * cos + a * sin, mask, HALF, ROT,
            BLOCK_H, BLOCK_D, INTERLEAVED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "T"])
def _fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, yq_ptr, yk_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_cb, stride_ct,
    M, T, Hq, Hk, eps,
    ROWS: tl.constexpr, HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    if HAS_NORM:
        qw_a, qw_b = _load_weight(qw_ptr, HALF, ROT, BLOCK_D, INTERLEAVED)
        kw_a, kw_b = _load_weight(kw_ptr, HALF, ROT, BLOCK_D, INTERLEAVED)
    else:
        qw_a, qw_b, kw_a, kw_b = 1.0, 1.0, 1.0, 1.0
    first = tl.program_id(0) * ROWS
    for row in tl.range(first, tl.minimum(first + ROWS, M)):
        b = (row // T).to(tl.int64)
        t = (row % T).to(tl.int64)
        cos, sin = _load_turn(cos_ptr, sin_ptr, b * stride_cb + t * stride_ct, ROT, BLOCK_D)
        if INVERSE:
            sin = -sin
        at = tl.cast(row, tl.int64) * (2 * HALF)
        _fwd_heads(
            q_ptr + b * stride_qb + t * stride_qt, yq_ptr + at * Hq, stride_qh, cos, sin, qw_a,
            qw_b, Hq, eps, HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED, HAS_NORM,
        )  # fmt: skip
        _fwd_heads(
            k_ptr + b * stride_kb + t * stride_kt, yk_ptr + at * Hk, stride_kh, cos, sin, kw_a,
            kw_b, Hk, eps, HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED, HAS_NORM,
        )  # fmt: skip


@triton.jit
def _bwd_heads(
    dy_ptr, x_ptr, dx_ptr, stride_dh, stride_h, cos, sin, w_a, w_b, dw_a, dw_b, heads, eps,
    HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dx of all heads of one token; dw_a, dw_b [BLOCK_H, BLOCK_D] with their share added."""
    for start in tl.range(0, heads, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H))[:, None]
        at = h.to(tl.int64)
        mask = h < heads
        dy_a, dy_b = _load_pairs(
            dy_ptr + at * stride_dh, mask, HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED
        )  # fmt: skip
        a, b = _load_pairs(
            x_ptr + at * stride_h, mask, HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED
        )  # fmt: skip
        g_a = dy_a * cos + dy_b * sin
        g_b = dy_b * cos - dy_a * sin
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a *= rstd
        b *= rstd
        dw_a += g_a * a
        dw_b += g_b * b
        g_a *= w_a
        g_b *= w_b
        mean = (tl.sum(g_a * a + g_b * b, 1) / (2 * HALF))[:, None]
        _store_pairs(
            dx_ptr + at * (2 * HALF), rstd * (g_a - a * mean), rstd * (g_b - b * mean), mask,
            HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED,
        )  # fmt: skip
    return dw_a, dw_b


@triton.jit(do_not_specialize=["M", "T"])
def _bwd_norm_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, dq_ptr, dk_ptr, part_ptr,
    stride_dqb, stride_dqt, stride_dqh, stride_dkb, stride_dkt, stride_dkh,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_cb, stride_ct,
    M, T, Hq, Hk, eps,
    HALF: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    qw_a, qw_b = _load_weight(qw_ptr, HALF, ROT, BLOCK_D, INTERLEAVED)
    kw_a, kw_b = _load_weight(kw_ptr, HALF, ROT, BLOCK_D, INTERLEAVED)
    dqw_a = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    dqw_b = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    dkw_a = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    dkw_b = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for row in tl.range(pid, M, count):
        b = (row // T).to(tl.int64)
        t = (row % T).to(tl.int64)
        cos, sin = _load_turn(cos_ptr, sin_ptr, b * stride_cb + t * stride_ct, ROT, BLOCK_D)
        at = tl.cast(row, tl.int64) * (2 * HALF)
        dqw_a, dqw_b = _bwd_heads(
            dyq_ptr + b * stride_dqb + t * stride_dqt, q_ptr + b * stride_qb + t * stride_qt,
            dq_ptr + at * Hq, stride_dqh, stride_qh, cos, sin, qw_a, qw_b, dqw_a, dqw_b, Hq, eps,
            HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED,
        )  # fmt: skip
        dkw_a, dkw_b = _bwd_heads(
            dyk_ptr + b * stride_dkb + t * stride_dkt, k_ptr + b * stride_kb + t * stride_kt,
            dk_ptr + at * Hk, stride_dkh, stride_kh, cos, sin, kw_a, kw_b, dkw_a, dkw_b, Hk, eps,
            HALF, ROT, BLOCK_H, BLOCK_D, INTERLEAVED,
        )  # fmt: skip
    part_ptr += pid.to(tl.int64) * (2 * HALF)
    _store_sums(part_ptr, dqw_a, dqw_b, HALF, ROT, BLOCK_D, INTERLEAVED)
    part_ptr += count.to(tl.int64) * (2 * HALF)
    _store_sums(part_ptr, dkw_a, dkw_b, HALF, ROT, BLOCK_D, INTERLEAVED)


def _dense(t: Tensor) -> Tensor:
    """t with its last dimension contiguous: itself where it is."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _turn(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """cos and sin of one layout, and its strides along B and T."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2))


def rotary_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float, interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q: (B, T, H, D), k: (B, T, Hkv, D) -> both turned, contiguous; inverse turns back."""
    B, T, H, D = q.shape
    yq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    yk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if B * T == 0:
        return yq, yk
    q, k = _dense(q), _dense(k)
    cos, sin, strides = _turn(cos, sin)
    weights = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    with on_device(q):
        tile = rotary_tile(D)
        rows = 1 if q_weight is None else 2  # the weights are read once for so many
        _fwd_kernel[(cdiv(B * T, rows),)](
            q, k, cos, sin, *weights, yq, yk, *q.stride()[:3], *k.stride()[:3], *strides,
            B * T, T, H, k.shape[2], eps, ROWS=rows, HALF=D // 2, ROT=cos.shape[-1],
            BLOCK_H=tile.block_m, BLOCK_D=tile.block_n,
            INTERLEAVED=interleaved, HAS_NORM=q_weight is not None, INVERSE=inverse,
            **tile.options,
        )  # fmt: skip
    return yq, yk


def rotary_norm_bwd(
    dyq: Tensor, dyk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor,
    k_weight: Tensor, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, contiguous, and the gradients of both weights."""
    B, T, H, D = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if B * T == 0:
        return dq, dk, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    tensors = tuple(_dense(t) for t in (dyq, dyk, q, k))
    cos, sin, strides = _turn(cos, sin)
    with on_device(q):
        tile = rotary_tile(D)
        P = min(B * T, programs(q, tile.num_warps))
        part = torch.empty((2, P, D), dtype=torch.float32, device=q.device)
        _bwd_norm_kernel[(P,)](
            *tensors, cos, sin, q_weight.contiguous(), k_weight.contiguous(), dq, dk, part,
            *(n for t in tensors for n in t.stride()[:3]), *strides,
            B * T, T, H, k.shape[2], eps, HALF=D // 2, ROT=cos.shape[-1], BLOCK_H=tile.block_m,
            BLOCK_D=tile.block_n, INTERLEAVED=interleaved, **tile.options,
        )  # fmt: skip
        dqw, dkw = column_sum(part, [q_weight.dtype, k_weight.dtype])
    return dq, dk, dqw, dkw
