"""Flash attention, backward: the gradients of q, k and v, without a T x T matrix.

Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691, algorithm 2, with the weights
p = 2^(scale' s - log2(e) lse) made again from q, k and lse:

    delta = sum(o * do) - dlse      ds = p * (do v^T - delta)
    dv = p^T do                     dk = softmax_scale * ds^T q       dq = softmax_scale * ds k

Each of dk, dv and dq has one owner, which sums in a fixed order: no atomics, the same bits each
time. A kv head's owner also sums over the query heads that share it. What each query adds,
-log2(e) lse and -delta, is made once, by the kernel of delta.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import (
    DROPPED,
    LOG2E,
    _bounds,
    _common,
    _narrow,
    _rows,
    _sees,
    _tile,
    kept,
)
from fastgpt.kernels.tiles import attention_tiles, on_device, padded_head_dim


@triton.jit(do_not_specialize=["Tq"])
def _delta_kernel(
    do_ptr, o_ptr, lse_ptr, dlse_ptr, nlse_ptr, ndelta_ptr,
    stride_db, stride_dt, stride_dh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    stride_lt, Tq, H, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, HAS_DO: tl.constexpr,
    HAS_DLSE: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    start_m = tl.program_id(0) % blocks * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + in_m
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_DO:
        do_ptr += b * stride_db + h * stride_dh + start_m.to(tl.int64) * stride_dt
        o_ptr += b * stride_ob + h * stride_oh + start_m.to(tl.int64) * stride_ot
        do = _tile(do_ptr, stride_dt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
        o = _tile(o_ptr, stride_ot, in_m, offs_d, Tq - start_m, D, True, PAD_D)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += b * stride_lb + h * stride_lh + start_m.to(tl.int64) * stride_lt
        delta -= tl.load(dlse_ptr + in_m * stride_lt, mask=offs_m < Tq, other=0.0)
    row = bh.to(tl.int64) * Tq
    nlse = tl.load(lse_ptr + row + offs_m, mask=offs_m < Tq, other=0.0) * -LOG2E
    if TRUNCATE:
        nlse += DROPPED
    tl.store(nlse_ptr + row + offs_m, nlse, mask=offs_m < Tq)
    tl.store(ndelta_ptr + row + offs_m, -delta, mask=offs_m < Tq)


@triton.jit
def _dkdv_block(
    dk, dv, k, v, q_ptr, do_ptr, nlse_ptr, ndelta_ptr, stride_qt, stride_dt, start_m, offs_n, shift,
    Tq, Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + in_m
    start = tl.cast(start_m, tl.int64)
    end = Tq - start_m
    q = _tile(q_ptr + start * stride_qt, stride_qt, in_m, offs_d, end, D, MASKED, PAD_D)
    do = _tile(do_ptr + start * stride_dt, stride_dt, in_m, offs_d, end, D, MASKED, PAD_D)
    if MASKED:
        nlse = tl.load(nlse_ptr + offs_m, mask=offs_m < Tq, other=0.0)
        ndelta = tl.load(ndelta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
    else:
        nlse = tl.load(nlse_ptr + offs_m)
        ndelta = tl.load(ndelta_ptr + offs_m)
    st = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    pt = tl.math.exp2(tl.fma(st, qk_scale, nlse[None, :]))
    if MASKED:
        see = _sees((offs_m + shift)[None, :], offs_n[:, None], left, right, Tk)
        see &= (offs_m < Tq)[None, :]
        pt = tl.where(see, pt, 0.0)
    dpt = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    if DROPOUT:
        keep = kept(seed, bh, offs_m[None, :], offs_n[:, None], threshold)
        pd = tl.where(keep, pt, 0.0)
        dpt = tl.where(keep, dpt * keep_scale, 0.0)
    else:
        pd = pt
    dv = tl.dot(_narrow(pd, do.dtype, TRUNCATE), do, dv, input_precision="ieee")
    dst = pt * (dpt + ndelta[None, :])
    dk = tl.dot(_narrow(dst, q.dtype, TRUNCATE), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "threshold"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, nlse_ptr, ndelta_ptr, dk_ptr, dv_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_db, stride_dt, stride_dh,
    Tq, Tk, H, groups, D, left, right, qk_scale, softmax_scale, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    heads = H // groups
    blocks = tl.cdiv(Tk, BLOCK_N)
    bh = tl.program_id(0) // blocks  # of the kv heads
    start_n = tl.program_id(0) % blocks * BLOCK_N  # causal: the first keys have the most queries
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    in_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = start_n + in_n
    k_ptr += b * stride_kb + hk * stride_kh + start_n.to(tl.int64) * stride_kt
    v_ptr += b * stride_vb + hk * stride_vh + start_n.to(tl.int64) * stride_vt
    k = _tile(k_ptr, stride_kt, in_n, offs_d, Tk - start_n, D, True, PAD_D)
    v = _tile(v_ptr, stride_vt, in_n, offs_d, Tk - start_n, D, True, PAD_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    shift = Tk - Tq
    n_last = tl.minimum(start_n + BLOCK_N, Tk) - 1
    m_first, m_full, m_unfull, m_last = _bounds(
        start_n - right - shift, n_last + left - shift + 1,
        n_last - right - shift, start_n + left - shift + 1, Tq, BLOCK_M,
    )  # fmt: skip
    for g in tl.range(0, groups):
        h = hk * groups + g
        row = (b * H + h) * Tq
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_db + h * stride_dh
        qh = (b * H + h).to(tl.int32)
        for m in tl.range(m_full, m_unfull):
            dk, dv = _dkdv_block(
                dk, dv, k, v, q_head, do_head, nlse_ptr + row, ndelta_ptr + row, stride_qt,
                stride_dt, m * BLOCK_M, offs_n, shift, Tq, Tk, D, left, right, qk_scale, seed, qh,
                threshold, keep_scale, BLOCK_M, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS,
            )  # fmt: skip
        for m in tl.range(m_first, m_last - (m_unfull - m_full)):
            start_m = tl.where(m < m_full, m, m + (m_unfull - m_full)) * BLOCK_M
            dk, dv = _dkdv_block(
                dk, dv, k, v, q_head, do_head, nlse_ptr + row, ndelta_ptr + row, stride_qt,
                stride_dt, start_m, offs_n, shift, Tq, Tk, D, left, right, qk_scale, seed, qh,
                threshold, keep_scale, BLOCK_M, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS,
            )  # fmt: skip

    mask = offs_n[:, None] < Tk
    if PAD_D:
        mask &= offs_d[None, :] < D
    stride_t = heads * D  # dk and dv are contiguous (B, Tk, Hkv, D)
    out = (b * Tk + start_n) * stride_t + hk * D
    ptrs = in_n[:, None] * stride_t + offs_d[None, :]
    tl.store(dk_ptr + out + ptrs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + out + ptrs, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_block(
    dq, q, do, nlse, ndelta, k_ptr, v_ptr, stride_kt, stride_vt, start_n, t_m, offs_m, Tk, D, left,
    right, qk_scale, seed, bh, threshold, keep_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    start = tl.cast(start_n, tl.int64)
    end = Tk - start_n
    k = _tile(k_ptr + start * stride_kt, stride_kt, offs_n, offs_d, end, D, MASKED, PAD_D)
    v = _tile(v_ptr + start * stride_vt, stride_vt, offs_n, offs_d, end, D, MASKED, PAD_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    p = tl.math.exp2(tl.fma(s, qk_scale, nlse[:, None]))
    if MASKED:
        see = _sees(t_m[:, None], (start_n + offs_n)[None, :], left, right, Tk)
        p = tl.where(see, p, 0.0)
    if DROPOUT:
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        keep = kept(seed, bh, offs_m[:, None], start_n + offs_n[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0) + ndelta[:, None]
    elif PARTS:  # the sum starts at -delta, which stays in registers
        dp = tl.broadcast_to(ndelta[:, None], s.shape)
        dp = tl.dot(do, tl.trans(v), dp, input_precision="ieee")
    else:
        dp = tl.dot(do, tl.trans(v), input_precision="ieee") + ndelta[:, None]
    ds = p * dp
    return tl.dot(_narrow(ds, k.dtype, TRUNCATE), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "threshold"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, nlse_ptr, ndelta_ptr, dq_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_db, stride_dt, stride_dh,
    Tq, Tk, H, groups, D, left, right, qk_scale, softmax_scale, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh + start_m.to(tl.int64) * stride_qt
    do_ptr += b * stride_db + h * stride_dh + start_m.to(tl.int64) * stride_dt
    k_ptr += b * stride_kb + h // groups * stride_kh
    v_ptr += b * stride_vb + h // groups * stride_vh

    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + in_m
    t_m = offs_m + (Tk - Tq)
    row = bh.to(tl.int64) * Tq
    q = _tile(q_ptr, stride_qt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
    do = _tile(do_ptr, stride_dt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
    nlse = tl.load(nlse_ptr + row + offs_m, mask=offs_m < Tq, other=0.0)
    ndelta = tl.load(ndelta_ptr + row + offs_m, mask=offs_m < Tq, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    t_first = start_m + Tk - Tq
    t_last = tl.minimum(start_m + BLOCK_M, Tq) - 1 + Tk - Tq
    n_first, n_full, n_unfull, n_last = _bounds(
        t_first - left, t_last + right + 1, t_last - left, t_first + right + 1, Tk, BLOCK_N
    )
    for n in tl.range(n_full, n_unfull):
        dq = _dq_block(
            dq, q, do, nlse, ndelta, k_ptr, v_ptr, stride_kt, stride_vt, n * BLOCK_N, t_m, offs_m,
            Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale,
            BLOCK_N, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS,
        )  # fmt: skip
    for n in tl.range(n_first, n_last - (n_unfull - n_full)):
        start_n = tl.where(n < n_full, n, n + (n_unfull - n_full)) * BLOCK_N
        dq = _dq_block(
            dq, q, do, nlse, ndelta, k_ptr, v_ptr, stride_kt, stride_vt, start_n, t_m, offs_m,
            Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale,
            BLOCK_N, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS,
        )  # fmt: skip

    mask = offs_m[:, None] < Tq
    if PAD_D:
        mask &= offs_d[None, :] < D
    stride_t = H * D  # dq is contiguous (B, Tq, H, D)
    ptrs = dq_ptr + (b * Tq + start_m) * stride_t + h * D + in_m[:, None] * stride_t + offs_d
    tl.store(ptrs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


def attention_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of o and lse, either of them possibly None -> dq, dk, dv, contiguous."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, Tq, H, D = q.shape
    Tk, heads = k.shape[1:3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    nlse, ndelta = torch.empty_like(lse), torch.empty_like(lse)
    block_d = padded_head_dim(D)
    has_do = do is not None
    do = torch.zeros_like(o) if do is None else _rows(do)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    common = _common(q, k, scale, left, right, dropout_p)
    with on_device(q):
        tiles = attention_tiles(q.dtype, block_d, dropout_p > 0.0)
        _delta_kernel[(triton.cdiv(Tq, tiles.delta.block_m) * B * H,)](
            do, o, lse, dlse, nlse, ndelta,
            *do.stride()[:3], *o.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride()),
            Tq, H, D, BLOCK_M=tiles.delta.block_m, BLOCK_D=block_d, PAD_D=block_d != D,
            HAS_DO=has_do, HAS_DLSE=dlse is not None, TRUNCATE=common["TRUNCATE"],
            **tiles.delta.options,
        )  # fmt: skip
        _dkdv_kernel[(triton.cdiv(Tk, tiles.dkdv.block_n) * B * heads,)](
            q, k, v, do, nlse, ndelta, dk, dv, seed, *strides, softmax_scale=scale,
            BLOCK_M=tiles.dkdv.block_m, BLOCK_N=tiles.dkdv.block_n, **common, **tiles.dkdv.options,
        )  # fmt: skip
        _dq_kernel[(triton.cdiv(Tq, tiles.dq.block_m) * B * H,)](
            q, k, v, do, nlse, ndelta, dq, seed, *strides, softmax_scale=scale,
            BLOCK_M=tiles.dq.block_m, BLOCK_N=tiles.dq.block_n, **common, **tiles.dq.options,
        )  # fmt: skip
    return dq, dk, dv
