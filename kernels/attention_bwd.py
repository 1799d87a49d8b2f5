"""Flash attention, backward: the gradients of q, k and v, without a T x T matrix.

Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691, algorithm 2, with the weights
p = 2^(scale' s - log2(e) lse) made again from q, k and lse:

    delta = sum(o * do) - dlse      ds = p * (do v^T - delta)
    dv = p^T do                     dk = softmax_scale * ds^T q       dq = softmax_scale * ds k

Each of dk, dv and dq has one owner, which sums in a fixed order: no atomics, the same bits each
time. A kv head's owner also sums over the query heads that share it. What each query adds,
-log2(e) lse and -delta, is made once, by the kernel of dq, which runs first.

Where the scores are changed first, ds is the gradient of the logits: with softcap, dk and dq get
(1 - tanh^2) ds. A bias gets ds itself, summed over what it is broadcast along: a tile of dbias has
one owner too, which makes ds again for every batch, head and block of queries that share the tile,
in order. That costs two more products, and no memory beyond dbias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import (
    DROPPED,
    ENDS,
    KEPT,
    LOG2E,
    _block,
    _bounds,
    _common,
    _ids_span,
    _loaded,
    _logits,
    _narrow,
    _rows,
    _sees,
    _sequence,
    _shown,
    _slope,
    _span,
    _strides,
    _tile,
    kept,
)
from fastgpt.kernels.attention_tiles import (
    attention_tiles,
    by_pointers,
    dbias_tile,
    padded_head_dim,
)
from fastgpt.kernels.tiles import cdiv, on_device


@triton.jit
def _delta(
    do, o_ptr, lse_ptr, dlse_ptr, stride_ot, stride_lt, in_m, offs_d, rows, D,
    PAD_D: tl.constexpr, HAS_DO: tl.constexpr, HAS_BIAS: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    """-log2(e) lse and -delta of a block of queries, of which rows are there."""
    ndelta = tl.zeros([in_m.shape[0]], dtype=tl.float32)
    if HAS_DO:
        o = _tile(o_ptr, stride_ot, in_m, offs_d, rows, D, True, PAD_D)
        ndelta -= tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        ndelta += tl.load(dlse_ptr + in_m * stride_lt, mask=in_m < rows, other=0.0)
    nlse = tl.load(lse_ptr + in_m, mask=in_m < rows, other=0.0) * -LOG2E
    if HAS_BIAS:  # a bias of -inf may hide every key: -inf - -inf would be NaN
        nlse = tl.where(nlse == float("inf"), 0.0, nlse)
    if TRUNCATE:
        nlse += DROPPED
    return nlse, ndelta


@triton.jit
def _dkdv_block(
    dk, dv, k, v, q_ptr, do_ptr, b, h, nlse_ptr, ndelta_ptr, stride_qt, stride_dt, start_m, offs_n,
    shift, Tq, Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale, mods,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + in_m
    q = _block(q_ptr, b, h, start_m, stride_qt, in_m, offs_d, Tq, D, MASKED, PAD_D, TMA)
    do = _block(do_ptr, b, h, start_m, stride_dt, in_m, offs_d, Tq, D, MASKED, PAD_D, TMA)
    if MASKED:
        nlse = tl.load(nlse_ptr + offs_m, mask=offs_m < Tq, other=0.0)
        ndelta = tl.load(ndelta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
    else:
        nlse = tl.load(nlse_ptr + offs_m)
        ndelta = tl.load(ndelta_ptr + offs_m)
    st = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    t_m = offs_m + shift
    st, bend = _logits(st, offs_m[None, :], t_m[None, :], offs_n[:, None], Tq, Tk, mods)
    pt = tl.math.exp2(tl.fma(st, qk_scale, nlse[None, :]))
    if MASKED:
        see = _sees(t_m[None, :], offs_n[:, None], left, right, Tk, mods)
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
    if PARTS:
        dst = pt * (dpt + ndelta[None, :])  # Triton starts the product at -delta
    else:
        dst = tl.fma(pt, dpt, pt * ndelta[None, :])
    if mods[1] is not None:
        dst = dst * bend
    dk = tl.dot(_narrow(dst, q.dtype, TRUNCATE), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "threshold", "total"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, nlse_ptr, ndelta_ptr, dk_ptr, dv_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_db, stride_dt, stride_dh,
    Tq, Tk, H, groups, D, left, right, qk_scale, softmax_scale, stride_out, threshold, keep_scale,
    inner, cap, slopes_ptr, stride_sb, stride_sh, bias_ptr, stride_bb, stride_bh, stride_bm,
    stride_bn, mask_ptr, mask_ends_ptr, ids_ptr, ids_ends_ptr, cu_q_ptr, cu_k_ptr, total,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    heads = H // groups
    blocks = tl.cdiv(Tk, BLOCK_N)
    bh = tl.program_id(0) // blocks  # of the kv heads
    start_n = tl.program_id(0) % blocks * BLOCK_N  # causal: the first keys have the most queries
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    in_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += b * stride_kb + hk * stride_kh + start_n.to(tl.int64) * stride_kt
    v_ptr += b * stride_vb + hk * stride_vh + start_n.to(tl.int64) * stride_vt
    out = b * Tk + start_n
    if cu_q_ptr is not None:
        q_start, Tq = _sequence(cu_q_ptr, b)
        k_start, Tk = _sequence(cu_k_ptr, b)
        q_ptr += q_start * stride_qt
        do_ptr += q_start * stride_dt
        k_ptr += k_start * stride_kt
        v_ptr += k_start * stride_vt
        out = k_start + start_n
        Tq = tl.where(start_n < Tk, Tq, 0)  # behind the last key there is nothing to do
    hidden = None if mask_ptr is None else mask_ptr + b * Tk
    shown = _shown(in_n, start_n, Tk, hidden)
    offs_n = start_n + shown
    k = _tile(k_ptr, stride_kt, shown, offs_d, Tk - start_n, D, True, PAD_D)
    v = _tile(v_ptr, stride_vt, shown, offs_d, Tk - start_n, D, True, PAD_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    shift = Tk - Tq
    n_last = tl.minimum(start_n + BLOCK_N, Tk) - 1
    lo = start_n - right - shift
    hi = n_last + left - shift + 1
    if mask_ptr is not None:
        hi = tl.where(tl.min(offs_n) < Tk, hi, lo)
    if ids_ptr is not None:
        first, last = _ids_span(start_n, n_last, b, ids_ptr, ids_ends_ptr, Tk, BLOCK_N)
        lo = tl.maximum(lo, first - shift)
        hi = tl.minimum(hi, last - shift)
    m_first, m_full, m_unfull, m_last = _bounds(
        lo, hi, n_last - right - shift, start_n + left - shift + 1, Tq, BLOCK_M
    )
    if mask_ptr is not None or ids_ptr is not None:
        m_full = m_last
        m_unfull = m_last
    for g in tl.range(0, groups):
        h = hk * groups + g
        row = (b * H + h) * Tq
        if cu_q_ptr is not None:
            row = h * total + q_start
        mods = (
            inner, cap,
            None if slopes_ptr is None else _slope(slopes_ptr + b * stride_sb + h * stride_sh),
            None if bias_ptr is None else bias_ptr + b * stride_bb + h * stride_bh,
            stride_bm, stride_bn,
            None if mask_ptr is None else mask_ptr + b * Tk,
            None if ids_ptr is None else ids_ptr + b * Tk,
        )  # fmt: skip
        qh = (b * H + h).to(tl.int32)
        b32, h32 = b.to(tl.int32), h.to(tl.int32)
        if TMA:
            q_head, do_head = q_ptr, do_ptr
        else:
            q_head = q_ptr + b * stride_qb + h * stride_qh
            do_head = do_ptr + b * stride_db + h * stride_dh
        if mask_ptr is None and ids_ptr is None:
            for m in tl.range(m_full, m_unfull):
                dk, dv = _dkdv_block(
                    dk, dv, k, v, q_head, do_head, b32, h32, nlse_ptr + row, ndelta_ptr + row,
                    stride_qt, stride_dt, m * BLOCK_M, offs_n, shift, Tq, Tk, D, left, right,
                    qk_scale, seed, qh, threshold, keep_scale, mods,
                    BLOCK_M, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS, TMA,
                )  # fmt: skip
        for m in tl.range(m_first, m_last - (m_unfull - m_full)):
            start_m = tl.where(m < m_full, m, m + (m_unfull - m_full)) * BLOCK_M
            dk, dv = _dkdv_block(
                dk, dv, k, v, q_head, do_head, b32, h32, nlse_ptr + row, ndelta_ptr + row,
                stride_qt, stride_dt, start_m, offs_n, shift, Tq, Tk, D, left, right, qk_scale,
                seed, qh, threshold, keep_scale, mods,
                BLOCK_M, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS, TMA,
            )  # fmt: skip

    mask = (start_n + in_n)[:, None] < Tk
    if PAD_D:
        mask &= offs_d[None, :] < D
    out = out * stride_out + hk * D  # dk and dv are (B * Tk, Hkv, D)
    ptrs = in_n[:, None] * stride_out + offs_d[None, :]
    tl.store(dk_ptr + out + ptrs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + out + ptrs, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_block(
    dq, q, do, nlse, ndelta, k_ptr, v_ptr, b, hk, stride_kt, stride_vt, start_n, t_m, offs_m, Tk, D,
    left, right, qk_scale, seed, bh, threshold, keep_scale, Tq, mods,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    offs_n = _shown(tl.arange(0, BLOCK_N), start_n, Tk, mods[6])
    offs_d = tl.arange(0, BLOCK_D)
    k = _block(k_ptr, b, hk, start_n, stride_kt, offs_n, offs_d, Tk, D, MASKED, PAD_D, TMA)
    v = _block(v_ptr, b, hk, start_n, stride_vt, offs_n, offs_d, Tk, D, MASKED, PAD_D, TMA)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    n = start_n + offs_n
    s, bend = _logits(s, offs_m[:, None], t_m[:, None], n[None, :], Tq, Tk, mods)
    p = tl.math.exp2(tl.fma(s, qk_scale, nlse[:, None]))
    if MASKED:
        see = _sees(t_m[:, None], n[None, :], left, right, Tk, mods)
        p = tl.where(see, p, 0.0)
    if DROPOUT:
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        keep = kept(seed, bh, offs_m[:, None], start_n + offs_n[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    if PARTS:
        ds = p * (dp + ndelta[:, None])  # Triton starts the product at -delta
    else:
        ds = tl.fma(p, dp, p * ndelta[:, None])
    if mods[1] is not None:
        ds = ds * bend
    return tl.dot(_narrow(ds, k.dtype, TRUNCATE), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "threshold", "total"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, nlse_ptr, ndelta_ptr, dq_ptr, seed_ptr,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_lt,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_db, stride_dt, stride_dh,
    Tq, Tk, H, groups, D, left, right, qk_scale, softmax_scale, stride_out, threshold, keep_scale,
    inner, cap, slopes_ptr, stride_sb, stride_sh, bias_ptr, stride_bb, stride_bh, stride_bm,
    stride_bn, mask_ptr, mask_ends_ptr, ids_ptr, ids_ends_ptr, cu_q_ptr, cu_k_ptr, total,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    HAS_DO: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh + start_m.to(tl.int64) * stride_qt
    do_ptr += b * stride_db + h * stride_dh + start_m.to(tl.int64) * stride_dt
    o_ptr += b * stride_ob + h * stride_oh + start_m.to(tl.int64) * stride_ot
    if dlse_ptr is not None:
        dlse_ptr += b * stride_lb + h * stride_lh + start_m.to(tl.int64) * stride_lt
    b32, hk = b.to(tl.int32), (h // groups).to(tl.int32)
    if not TMA:
        k_ptr += b * stride_kb + h // groups * stride_kh
        v_ptr += b * stride_vb + h // groups * stride_vh
    row = bh.to(tl.int64) * Tq
    out = b * Tq + start_m
    if cu_q_ptr is not None:
        q_start, Tq = _sequence(cu_q_ptr, b)
        k_start, Tk = _sequence(cu_k_ptr, b)
        q_ptr += q_start * stride_qt
        do_ptr += q_start * stride_dt
        o_ptr += q_start * stride_ot
        if dlse_ptr is not None:
            dlse_ptr += q_start * stride_lt
        k_ptr += k_start * stride_kt
        v_ptr += k_start * stride_vt
        row = h * total + q_start
        out = q_start + start_m
        Tk = tl.where(start_m < Tq, Tk, 0)  # behind the last query there is nothing to do
    mods = (
        inner, cap,
        None if slopes_ptr is None else _slope(slopes_ptr + b * stride_sb + h * stride_sh),
        None if bias_ptr is None else bias_ptr + b * stride_bb + h * stride_bh,
        stride_bm, stride_bn,
        None if mask_ptr is None else mask_ptr + b * Tk,
        None if ids_ptr is None else ids_ptr + b * Tk,
    )  # fmt: skip

    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = start_m + in_m
    t_m = offs_m + (Tk - Tq)
    q = _tile(q_ptr, stride_qt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
    do = _tile(do_ptr, stride_dt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
    nlse, ndelta = _delta(
        do, o_ptr, lse_ptr + row + start_m, dlse_ptr, stride_ot, stride_lt, in_m, offs_d,
        Tq - start_m, D, PAD_D, HAS_DO, bias_ptr is not None, TRUNCATE,
    )  # fmt: skip
    tl.store(nlse_ptr + row + offs_m, nlse, mask=offs_m < Tq)
    tl.store(ndelta_ptr + row + offs_m, ndelta, mask=offs_m < Tq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    t_first = start_m + Tk - Tq
    t_last = tl.minimum(start_m + BLOCK_M, Tq) - 1 + Tk - Tq
    lo = t_first - left
    hi = t_last + right + 1
    if mask_ptr is not None:
        first, last = _span(1, 1, mask_ends_ptr + b * 2 * tl.cdiv(Tk, ENDS), Tk)
        lo = tl.maximum(lo, first)
        hi = tl.minimum(hi, last)
    if ids_ptr is not None:
        first, last = _ids_span(t_first, t_last, b, ids_ptr, ids_ends_ptr, Tk, BLOCK_M)
        lo = tl.maximum(lo, first)
        hi = tl.minimum(hi, last)
    n_first, n_full, n_unfull, n_last = _bounds(
        lo, hi, t_last - left, t_first + right + 1, Tk, BLOCK_N
    )
    if mask_ptr is not None or ids_ptr is not None:
        n_full = n_last
        n_unfull = n_last
    if mask_ptr is None and ids_ptr is None:
        for n in tl.range(n_full, n_unfull):
            dq = _dq_block(
                dq, q, do, nlse, ndelta, k_ptr, v_ptr, b32, hk, stride_kt, stride_vt, n * BLOCK_N,
                t_m, offs_m, Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale, Tq,
                mods, BLOCK_N, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS, TMA,
            )  # fmt: skip
    for n in tl.range(n_first, n_last - (n_unfull - n_full)):
        start_n = tl.where(n < n_full, n, n + (n_unfull - n_full)) * BLOCK_N
        dq = _dq_block(
            dq, q, do, nlse, ndelta, k_ptr, v_ptr, b32, hk, stride_kt, stride_vt, start_n, t_m,
            offs_m, Tk, D, left, right, qk_scale, seed, bh, threshold, keep_scale, Tq, mods,
            BLOCK_N, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS, TMA,
        )  # fmt: skip

    mask = offs_m[:, None] < Tq
    if PAD_D:
        mask &= offs_d[None, :] < D
    ptrs = dq_ptr + out * stride_out + h * D + in_m[:, None] * stride_out + offs_d
    tl.store(ptrs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "threshold", "total"])
def _dbias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, nlse_ptr, ndelta_ptr, dbias_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_db, stride_dt, stride_dh,
    Tq, Tk, H, groups, D, left, right, qk_scale, threshold, keep_scale,
    inner, cap, slopes_ptr, stride_sb, stride_sh, bias_ptr, stride_bb, stride_bh, stride_bm,
    stride_bn, mask_ptr, mask_ends_ptr, ids_ptr, ids_ends_ptr, cu_q_ptr, cu_k_ptr, total,
    batches, heads, biases,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, ALL_M: tl.constexpr,
):  # fmt: skip
    # The tile's place in dbias: (biases, heads of a bias, Tq or 1, Tk), contiguous. It is shared
    # by batches x heads pairs, and with ALL_M by all blocks of queries.
    blocks_n = tl.cdiv(Tk, BLOCK_N)
    blocks_m = 1 if ALL_M else tl.cdiv(Tq, BLOCK_M)
    tile = tl.program_id(0) // blocks_n
    start_n = tl.program_id(0) % blocks_n * BLOCK_N
    own_m = tile % blocks_m
    own_h = tile // blocks_m % biases
    own_b = tile // blocks_m // biases
    in_n = tl.arange(0, BLOCK_N)
    in_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    shift = Tk - Tq
    n_last = tl.minimum(start_n + BLOCK_N, Tk) - 1
    m_first, _, _, m_last = _bounds(
        start_n - right - shift, n_last + left - shift + 1, 0, 0, Tq, BLOCK_M
    )
    if not ALL_M:
        m_first = tl.maximum(m_first, own_m)
        m_last = tl.minimum(m_last, own_m + 1)
    width = tl.maximum(m_last - m_first, 0)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for turn in tl.range(0, width * batches * heads):
        start_m = (m_first + turn % width) * BLOCK_M
        h = (own_h + turn // width % heads).to(tl.int64)
        b = (own_b + turn // width // heads).to(tl.int64)
        mods = (
            inner, cap,
            None if slopes_ptr is None else _slope(slopes_ptr + b * stride_sb + h * stride_sh),
            None if bias_ptr is None else bias_ptr + b * stride_bb + h * stride_bh,
            stride_bm, stride_bn,
            None if mask_ptr is None else mask_ptr + b * Tk,
            None if ids_ptr is None else ids_ptr + b * Tk,
        )  # fmt: skip
        offs_m = start_m + in_m
        shown = _shown(in_n, start_n, Tk, mods[6])
        offs_n = start_n + shown
        m0 = start_m.to(tl.int64)
        n0 = start_n.to(tl.int64)
        q_head = q_ptr + b * stride_qb + h * stride_qh + m0 * stride_qt
        do_head = do_ptr + b * stride_db + h * stride_dh + m0 * stride_dt
        k_head = k_ptr + b * stride_kb + h // groups * stride_kh + n0 * stride_kt
        v_head = v_ptr + b * stride_vb + h // groups * stride_vh + n0 * stride_vt
        q = _tile(q_head, stride_qt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
        k = _tile(k_head, stride_kt, shown, offs_d, Tk - start_n, D, True, PAD_D)
        do = _tile(do_head, stride_dt, in_m, offs_d, Tq - start_m, D, True, PAD_D)
        v = _tile(v_head, stride_vt, shown, offs_d, Tk - start_n, D, True, PAD_D)
        row = (b * H + h) * Tq
        nlse = tl.load(nlse_ptr + row + offs_m, mask=offs_m < Tq, other=0.0)
        ndelta = tl.load(ndelta_ptr + row + offs_m, mask=offs_m < Tq, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        t_m = (offs_m + shift)[:, None]
        s, _bend = _logits(s, offs_m[:, None], t_m, offs_n[None, :], Tq, Tk, mods)
        p = tl.math.exp2(tl.fma(s, qk_scale, nlse[:, None]))
        see = _sees(t_m, offs_n[None, :], left, right, Tk, mods) & (offs_m < Tq)[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = kept(seed, (b * H + h).to(tl.int32), offs_m[:, None], offs_n[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        acc += tl.where(see, p * (dp + ndelta[:, None]), 0.0)

    if TRUNCATE:  # the weights were made larger for products that drop bits; here none are dropped
        acc /= KEPT
    offs_n = start_n + in_n
    own = (own_b * biases + own_h).to(tl.int64)
    if ALL_M:
        d = tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + own * Tk + offs_n, d, mask=offs_n < Tk)
    else:
        offs_m = own_m * BLOCK_M + in_m
        ptrs = dbias_ptr + (own * Tq + offs_m[:, None]) * Tk + offs_n[None, :]
        mask = (offs_m < Tq)[:, None] & (offs_n < Tk)[None, :]
        tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


def attention_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
    key_mask: Tensor | None = None, document_ids: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, bias_grad: bool = False, packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of o and lse, either of them possibly None -> dq, dk, dv, dbias, contiguous.

    dbias is empty unless bias_grad. If packed, dq, dk and dv are parts of one tensor,
    (B, T, H + 2 Hkv, D), which comes in the place of dq, and nothing in those of the others.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, Tq, H, D = q.shape
    heads = k.shape[2]
    if packed:
        whole = torch.empty((B, Tq, H + 2 * heads, D), dtype=q.dtype, device=q.device)
        dq, dk, dv = whole.split([H, heads, heads], 2)
    else:
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.empty_like(k, memory_format=torch.contiguous_format)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    like = q if bias is None else bias
    shape = like.shape if bias_grad else (0,)
    dbias = torch.empty(shape, dtype=like.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv, dbias = dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
        return (whole, *_nothing(q), dbias) if packed else (dq, dk, dv, dbias)
    nlse, ndelta = torch.empty_like(lse), torch.empty_like(lse)
    block_d = padded_head_dim(D)
    has_do = do is not None
    do = torch.zeros_like(o) if do is None else _rows(do)
    strides = [n for t in (q, k, v, do) for n in _strides(t, cu_seqlens_q)]
    with on_device(q):
        common = _common(
            q, k, scale, left, right, dropout_p, softcap, alibi_slopes, bias, key_mask,
            document_ids, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        )  # fmt: skip
        tiles = attention_tiles(q.dtype, block_d, dropout_p > 0.0, common.extras)
        longest_q, longest_k, *_ = common.sizes
        numbers = (*strides, *common.sizes, *common.bounds)
        of_dlse: tuple[int | None, ...] = (None,) * 3
        if dlse is not None:
            of_dlse = (dlse.stride(0) if cu_seqlens_q is None else 0, *dlse.stride()[1:])
        many = B if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        tile = tiles.dq
        k_in, v_in, tma = _loaded(tile, tile.block_n, k, v, common)
        tile = tile if tma else by_pointers(tile, block_d, bias=bias is not None)
        _dq_kernel[(cdiv(longest_q, tile.block_m) * many * H,)](
            q, k_in, v_in, do, o, lse, dlse, nlse, ndelta, dq, seed, *_strides(o, cu_seqlens_q),
            *of_dlse, *numbers, scale, dq.stride(1), *common.rest, TMA=tma, HAS_DO=has_do,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **common.flags, **tile.options,
        )  # fmt: skip
        tile = tiles.dkdv
        q_in, do_in, tma = _loaded(tile, tile.block_m, q, do, common)
        tile = tile if tma else by_pointers(tile, block_d, accumulators=2)
        _dkdv_kernel[(cdiv(longest_k, tile.block_n) * many * heads,)](
            q_in, k, v, do_in, nlse, ndelta, dk, dv, seed, *numbers, scale, dk.stride(1),
            *common.rest, TMA=tma, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **common.flags,
            **tile.options,
        )  # fmt: skip
        if bias_grad:
            tile = dbias_tile(q.dtype, block_d)
            biases, bias_heads, rows, Tk = dbias.shape
            blocks_m = 1 if rows < Tq else cdiv(Tq, tile.block_m)
            blocks = cdiv(Tk, tile.block_n) * blocks_m
            _dbias_kernel[(blocks * bias_heads * biases,)](
                q, k, v, do, nlse, ndelta, dbias, seed, *numbers, *common.rest, B // biases,
                H // bias_heads, bias_heads, ALL_M=rows < Tq, BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n, **common.flags, **tile.options,
            )  # fmt: skip
    return (whole, *_nothing(q), dbias) if packed else (dq, dk, dv, dbias)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(0), q.new_empty(0)
