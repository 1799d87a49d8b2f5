"""Flash attention, forward, without a T x T matrix; attention_bwd.py has the gradients.

Forward (Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691, algorithm 1): one program
owns BLOCK_M queries of one head and walks over the keys they see, holding the running maximum m
(as n = -m), the sum l (in eight parts, where a row is spread over threads) and the unnormalised
output acc, in float32 and base 2 (2^x is one instruction):

    s = q k^T        m' = max(m, scale' s)   with scale' = softmax_scale * log2(e)
    p = 2^(scale' s - m')                    a = 2^(m - m')
    l' = a l + sum(p)                        acc' = a acc + p v
    o = acc / l                              lse = (m + log2 l) / log2(e)

The keys that the query at position t = i + Tk - Tq sees are t - left .. t + right. Blocks inside
those bounds for every row run without a mask; those on an edge run in a loop of their own. Blocks
with the most work start first: in causal attention, the last queries.

A score may be changed before the softmax: s -> softcap tanh(s / softcap) - slope |t - j| + bias.
`mods` carries what does that; what is absent is None and leaves no instruction behind. A key that
key_mask hides counts as one behind the last key, so neither it nor its value is read. With
document_ids or key_mask every block is masked, and blocks where nothing can match are skipped by
the least and the greatest id of each 64 positions. Sequences of differing length lie end to end in
(1, total, H, D), cut at cu_seqlens; a program finds its own on the device.

Dropout keeps an element by Philox of (key, query, batch * H + head), so the mask does not depend
on the tiles. It acts on p after the sum l, and 1 / (1 - dropout_p) is applied once at the end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.attention_tiles import (
    attention_flags,
    attention_tiles,
    by_pointers,
    padded_head_dim,
)
from fastgpt.kernels.tiles import Tile, cdiv, on_device

LOG2E = tl.constexpr(1.4426950408889634)
# Dropping the lower half of a float32's bits takes 0.0028 of it on average (1 / (512 ln 2), the
# mantissas' logarithms being uniform): weights that lose them are made 2^DROPPED times larger.
DROPPED = tl.constexpr(0.0040593)
KEPT = tl.constexpr(1.0028177)  # 2^DROPPED
LN2 = tl.constexpr(0.6931471805599453)
ENDS = tl.constexpr(64)  # positions whose ids are summed up as their least and greatest
L2_BYTES = 2**25  # of keys and values that neighbouring programs share: below every target's L2


@triton.jit
def kept(seed, bh, i, j, threshold):
    """Whether dropout keeps the elements at (i, j); i and j broadcast against each other."""
    c2 = bh + tl.zeros_like(j)
    bits, _, _, _ = tl.philox(seed, j, i, c2, tl.zeros_like(j), 7)
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def _narrow(x, dtype: tl.constexpr, TRUNCATE: tl.constexpr):
    """x in the dtype of the products; TRUNCATE drops the lower half of a float32's bits."""
    if TRUNCATE:
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _bounds(lo, hi, full_lo, full_hi, end, BLOCK: tl.constexpr):
    """Blocks over [lo, hi): -> first, first full, after the last full, after the last."""
    lo = tl.maximum(lo, 0)
    hi = tl.maximum(tl.minimum(hi, end), lo)
    first = lo // BLOCK
    last = tl.cdiv(hi, BLOCK)
    full = tl.minimum(tl.cdiv(tl.maximum(full_lo, lo), BLOCK), last)
    unfull = tl.maximum(tl.minimum(full_hi, hi), 0) // BLOCK
    return first, full, tl.maximum(tl.minimum(unfull, last), full), last


@triton.jit
def _sees(t, n, left, right, Tk, mods):
    """Whether queries at positions t see keys n; they broadcast against each other."""
    see = (n < Tk) & (n <= t + right) & (n >= t - left)
    if mods[7] is not None:  # document ids
        mine = tl.load(mods[7] + t, mask=(t >= 0) & (t < Tk), other=0)
        see &= mine == tl.load(mods[7] + n, mask=n < Tk, other=0)
    return see


@triton.jit
def _shown(offs_n, start_n, Tk, mask_ptr):
    """Keys offs_n from start_n on, those that key_mask hides moved behind the last."""
    if mask_ptr is not None:
        at = start_n + offs_n
        offs_n = tl.where(tl.load(mask_ptr + at, mask=at < Tk, other=0) != 0, offs_n, Tk - start_n)
    return offs_n


@triton.jit
def _tanh(x):
    """tanh within 5e-7 of itself: its series near zero, where 1 - 2 / (e^2x + 1) cancels."""
    x2 = x * x
    near = tl.fma(x2, tl.fma(x2, tl.fma(x2, -17.0 / 315.0, 2.0 / 15.0), -1.0 / 3.0), 1.0) * x
    far = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def _logits(s, i, t, j, Tq, Tk, mods):
    """Products s of queries i, at positions t, and keys j -> logits, and softcap's derivative.

    The logits are in base 2 and want no scale any more, unless nothing changes them.
    """
    bend = 1.0
    if mods[1] is not None:  # softcap
        th = _tanh(s * mods[0])
        s = th * mods[1]
        bend = tl.fma(th, -th, 1.0)
    elif mods[0] is not None:
        s = s * mods[0]
    if mods[2] is not None:  # ALiBi
        s = tl.fma(tl.abs(t - j).to(tl.float32), -mods[2], s)
    if mods[3] is not None:  # bias
        ptrs = mods[3] + i.to(tl.int64) * mods[4] + j.to(tl.int64) * mods[5]
        bias = tl.load(ptrs, mask=(i < Tq) & (j < Tk), other=0.0)
        s = tl.fma(bias.to(tl.float32), LOG2E, s)
    return s, bend


@triton.jit
def _slope(ptr):
    return tl.load(ptr) * LOG2E


@triton.jit
def _span(lo, hi, ends_ptr, T):
    """First and last + 1 of the positions whose ids may lie in lo .. hi."""
    blocks = tl.cdiv(T, ENDS)
    first = T
    last = 0
    for start in tl.range(0, blocks, 128):
        at = start + tl.arange(0, 128)
        least = tl.load(ends_ptr + at, mask=at < blocks, other=0)
        greatest = tl.load(ends_ptr + blocks + at, mask=at < blocks, other=0)
        meet = (at < blocks) & (least <= hi) & (greatest >= lo)
        first = tl.minimum(first, tl.min(tl.where(meet, at * ENDS, T)))
        last = tl.maximum(last, tl.max(tl.where(meet, at * ENDS + ENDS, 0)))
    return first, last


@triton.jit
def _ids_span(t_first, t_last, b, ids_ptr, ends_ptr, T, BLOCK: tl.constexpr):
    """First and last + 1 of the positions that may share an id with t_first .. t_last."""
    at = tl.minimum(tl.maximum(t_first + tl.arange(0, BLOCK), 0), tl.minimum(t_last, T - 1))
    ids = tl.load(ids_ptr + b * T + at)
    return _span(tl.min(ids), tl.max(ids), ends_ptr + b * 2 * tl.cdiv(T, ENDS), T)


@triton.jit
def _sequence(cu_ptr, b):
    """First row and length of sequence b."""
    start = tl.load(cu_ptr + b)
    return start.to(tl.int64), (tl.load(cu_ptr + b + 1) - start).to(tl.int32)


@triton.jit(do_not_specialize=["T"])
def _ends_kernel(ids_ptr, ends_ptr, T):
    """The least and the greatest id of each ENDS positions, (B, T) -> (B, 2, blocks)."""
    blocks = tl.cdiv(T, ENDS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = tl.minimum(block * ENDS + tl.arange(0, ENDS), T - 1)
    ids = tl.load(ids_ptr + b * T + at)
    tl.store(ends_ptr + b * 2 * blocks + block, tl.min(ids).to(ends_ptr.dtype.element_ty))
    tl.store(ends_ptr + (b * 2 + 1) * blocks + block, tl.max(ids).to(ends_ptr.dtype.element_ty))


@triton.jit
def _tile(ptr, stride_t, offs_t, offs_d, T, D, MASK_T: tl.constexpr, PAD_D: tl.constexpr):
    """Rows offs_t of the (T, D) matrix at ptr, as [len(offs_t), BLOCK_D]."""
    ptrs = ptr + offs_t[:, None] * stride_t + offs_d[None, :]
    if MASK_T and PAD_D:
        return tl.load(ptrs, mask=(offs_t[:, None] < T) & (offs_d[None, :] < D), other=0.0)
    elif MASK_T:
        return tl.load(ptrs, mask=offs_t[:, None] < T, other=0.0)
    elif PAD_D:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _block(
    ptr, b, h, start, stride_t, offs_t, offs_d, T, D,
    MASK_T: tl.constexpr, PAD_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows start + offs_t of one head: ptr is that head's, or with TMA describes all heads."""
    if TMA:
        return ptr.load([b, start, h, 0]).reshape(offs_t.shape[0], offs_d.shape[0])
    else:
        at = ptr + tl.cast(start, tl.int64) * stride_t
        return _tile(at, stride_t, offs_t, offs_d, T - start, D, MASK_T, PAD_D)


@triton.jit
def _fwd_block(
    acc, n_i, l_i, q, k_ptr, v_ptr, b, hk, stride_kt, stride_vt, start_n, t_m, offs_m, Tk, D, left,
    right, qk_scale, seed, bh, threshold, Tq, mods,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    offs_n = _shown(tl.arange(0, BLOCK_N), start_n, Tk, mods[6])
    offs_d = tl.arange(0, BLOCK_D)
    k = _block(k_ptr, b, hk, start_n, stride_kt, offs_n, offs_d, Tk, D, MASKED, PAD_D, TMA)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    s, _bend = _logits(s, offs_m[:, None], t_m[:, None], (start_n + offs_n)[None, :], Tq, Tk, mods)
    if MASKED:
        see = _sees(t_m[:, None], (start_n + offs_n)[None, :], left, right, Tk, mods)
        s = tl.where(see, s, float("-inf"))
    if TRUNCATE:
        n_new = tl.minimum(n_i, tl.fma(tl.max(s, 1), -qk_scale, DROPPED))
    else:
        n_new = tl.minimum(n_i, tl.max(s, 1) * -qk_scale)
    p = tl.math.exp2(tl.fma(s, qk_scale, n_new[:, None]))
    alpha = tl.math.exp2(n_new - n_i)
    if PARTS:
        parts = tl.reshape(p, [s.shape[0], BLOCK_N // 8, 8])
        l_i = tl.fma(l_i, alpha[:, None], tl.sum(parts, 1))
    else:
        l_i = tl.fma(l_i, alpha, tl.sum(p, 1))
    if DROPOUT:
        p = tl.where(kept(seed, bh, offs_m[:, None], start_n + offs_n[None, :], threshold), p, 0.0)
    v = _block(v_ptr, b, hk, start_n, stride_vt, offs_n, offs_d, Tk, D, MASKED, PAD_D, TMA)
    acc = tl.dot(_narrow(p, v.dtype, TRUNCATE), v, acc * alpha[:, None], input_precision="ieee")
    return acc, n_new, l_i


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "BH", "band", "threshold", "total"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_ob, stride_ot, stride_oh,
    Tq, Tk, H, groups, D, BH, band, left, right, qk_scale, threshold, keep_scale,
    inner, cap, slopes_ptr, stride_sb, stride_sh, bias_ptr, stride_bb, stride_bh, stride_bm,
    stride_bn, mask_ptr, mask_ends_ptr, ids_ptr, ids_ends_ptr, cu_q_ptr, cu_k_ptr, total,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Programs go band by band of heads whose keys fit the L2 cache, in a band last queries first.
    pid = tl.program_id(0)
    blocks = tl.cdiv(Tq, BLOCK_M)
    first = pid // (band * blocks) * band
    width = tl.minimum(band, BH - first)
    within = pid - first * blocks
    start_m = (blocks - 1 - within // width) * BLOCK_M
    bh = first + within % width
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh + start_m.to(tl.int64) * stride_qt
    b32, hk = b.to(tl.int32), (h // groups).to(tl.int32)
    if not TMA:
        k_ptr += b * stride_kb + h // groups * stride_kh
        v_ptr += b * stride_vb + h // groups * stride_vh
    o_ptr += b * stride_ob + h * stride_oh + start_m.to(tl.int64) * stride_ot
    row = bh.to(tl.int64) * Tq
    if cu_q_ptr is not None:
        q_start, Tq = _sequence(cu_q_ptr, b)
        k_start, Tk = _sequence(cu_k_ptr, b)
        q_ptr += q_start * stride_qt
        k_ptr += k_start * stride_kt
        v_ptr += k_start * stride_vt
        o_ptr += q_start * stride_ot
        row = h * total + q_start
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    n_i = tl.full([BLOCK_M], 1e30, dtype=tl.float32)  # -m; finite: inf - inf would be NaN
    if PARTS:
        l_i = tl.zeros([BLOCK_M, 8], dtype=tl.float32)
    else:
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
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
    else:
        for n in tl.range(n_full, n_unfull):
            acc, n_i, l_i = _fwd_block(
                acc, n_i, l_i, q, k_ptr, v_ptr, b32, hk, stride_kt, stride_vt, n * BLOCK_N, t_m,
                offs_m, Tk, D, left, right, qk_scale, seed, bh, threshold, Tq, mods,
                BLOCK_N, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS, TMA,
            )  # fmt: skip
    for n in tl.range(n_first, n_last - (n_unfull - n_full)):
        start_n = tl.where(n < n_full, n, n + (n_unfull - n_full)) * BLOCK_N
        acc, n_i, l_i = _fwd_block(
            acc, n_i, l_i, q, k_ptr, v_ptr, b32, hk, stride_kt, stride_vt, start_n, t_m, offs_m,
            Tk, D, left, right, qk_scale, seed, bh, threshold, Tq, mods,
            BLOCK_N, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS, TMA,
        )  # fmt: skip

    if PARTS:
        l_i = tl.sum(l_i, 1)
    none = l_i == 0.0  # a query that sees no key gives 0 and -inf; NaN stays NaN
    l_i = tl.where(none, 1.0, l_i)
    inv = tl.where(none, 0.0, keep_scale / l_i)
    if TRUNCATE:
        inv *= KEPT
    lse = tl.where(none, float("-inf"), (tl.math.log2(l_i) - n_i) * LN2)
    tl.store(lse_ptr + row + offs_m, lse, mask=offs_m < Tq)
    mask = offs_m[:, None] < Tq
    if PAD_D:
        mask &= offs_d[None, :] < D
    o = (acc * inv[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + in_m[:, None] * stride_ot + offs_d[None, :], o, mask=mask)


def _rows(t: Tensor) -> Tensor:
    """t with D contiguous, as kernels read it; (B, T, H) may have any strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(t: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Of B, T and H; sequences that lie end to end are found by their rows, so their B has none."""
    b, t_, h, _ = t.stride()
    return (b if cu_seqlens is None else 0), t_, h


def _loaded(
    tile: Tile, block_t: int, a: Tensor, b: Tensor, common: "Common"
) -> tuple[Any, Any, bool]:
    """a and b, or descriptors of their blocks of rows if wanted and possible; and which."""
    # A block that reaches over the end of a sequence, or over hidden keys, is masked as it loads.
    if not tile.descriptors or common.masked:
        return a, b, False
    pair = []
    for t in (a, b):
        strides = [s if n > 1 else 16 for n, s in zip(t.shape, t.stride(), strict=True)][:3]
        if t.data_ptr() % 16 or any(s <= 0 or s * t.element_size() % 16 for s in strides):
            return a, b, False
        block = [1, block_t, 1, padded_head_dim(t.shape[3])]
        pair.append(TensorDescriptor(t, list(t.shape), [*strides, 1], block))
    return pair[0], pair[1], True


def _ends(ids: Tensor) -> Tensor:
    """ids: (B, T) contiguous -> (B, 2, blocks): the least and the greatest of each ENDS."""
    B, T = ids.shape
    blocks = cdiv(T, ENDS.value)
    dtype = torch.int64 if ids.dtype == torch.int64 else torch.int32
    ends = torch.empty((B, 2, blocks), dtype=dtype, device=ids.device)
    if ids.numel():
        _ends_kernel[(B * blocks,)](ids, ends, T, num_warps=1, num_stages=1)
    return ends


class Common(NamedTuple):
    """Arguments that all attention kernels share, in the order in which they take them.

    By position: a launch that names so many takes a fifth longer on the host.
    """

    sizes: tuple[int, int, int, int, int]  # Tq, Tk, H, groups, D
    bounds: tuple[int, int, float]  # left, right, qk_scale
    rest: tuple[Any, ...]  # threshold .. total
    flags: dict[str, Any]
    extras: bool  # whether scores are changed or keys hidden
    masked: bool  # whether keys are hidden by key_mask, or sequences lie end to end


def _common(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, dropout_p: float, softcap: float,
    alibi_slopes: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    document_ids: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int,
) -> Common:  # fmt: skip
    """An absent bound is one that no key reaches."""
    _, Tq, H, D = q.shape
    Tk = k.shape[1]
    block_d = padded_head_dim(D)
    plain = not softcap and alibi_slopes is None and bias is None
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    ids = document_ids
    if ids is not None:
        wide = ids.dtype == torch.int64
        ids = ids.to(torch.int64 if wide else torch.int32).contiguous()
    slopes: tuple[int | None, ...] = (None, None)
    if alibi_slopes is not None:
        slopes = (0, *alibi_slopes.stride())[-2:]
    whole = cu_seqlens_q is None
    return Common(
        (Tq if whole else max_seqlen_q, Tk if whole else max_seqlen_k, H, H // k.shape[2], D),
        (
            left if left >= 0 else Tq + Tk,
            right if right >= 0 else Tq + Tk,
            scale * LOG2E.value if plain else 1.0,
        ),
        (
            round(dropout_p * 2**31),  # threshold
            1.0 / (1.0 - dropout_p),  # keep_scale
            None if plain else scale / softcap if softcap else scale * LOG2E.value,  # inner
            softcap * LOG2E.value if softcap else None,  # cap
            alibi_slopes,
            *slopes,
            bias,
            *_bias_strides(q, k, bias),
            mask,
            None if mask is None else _ends(mask),
            ids,
            None if ids is None else _ends(ids),
            cu_seqlens_q,
            cu_seqlens_k,
            None if whole else Tq,  # total
        ),
        {
            "BLOCK_D": block_d,
            "PAD_D": block_d != D,
            "DROPOUT": dropout_p > 0.0,
            **attention_flags(q.dtype),
        },
        not plain or key_mask is not None or document_ids is not None,
        key_mask is not None or not whole,
    )


def _bias_strides(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[int | None, ...]:
    """Of a bias that is broadcast: 0 along what all of (B, H, Tq, Tk) share."""
    if bias is None:
        return (None,) * 4
    return bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).stride()


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None, key_mask: Tensor | None = None, document_ids: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q: (B, Tq, H, D), k, v: (B, Tk, Hkv, D) -> o: (B, Tq, H, D), lse: (B, H, Tq) float32.

    With cu_seqlens B is 1, and the T of q and of k are totals.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, Tq, H, D = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    with on_device(q):
        common = _common(
            q, k, scale, left, right, dropout_p, softcap, alibi_slopes, bias, key_mask,
            document_ids, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        )  # fmt: skip
        tile = attention_tiles(q.dtype, padded_head_dim(D), dropout_p > 0.0, common.extras).fwd
        longest_q, longest_k, *_ = common.sizes
        band = max(1, L2_BYTES // max(1, 2 * longest_k * D * k.element_size()))
        BH = H * (B if cu_seqlens_q is None else cu_seqlens_q.numel() - 1)
        k_in, v_in, tma = _loaded(tile, tile.block_n, k, v, common)
        tile = tile if tma else by_pointers(tile, padded_head_dim(D), bias=bias is not None)
        _fwd_kernel[(cdiv(longest_q, tile.block_m) * BH,)](
            q, k_in, v_in, o, lse, seed,
            *_strides(q, cu_seqlens_q), *_strides(k, cu_seqlens_q), *_strides(v, cu_seqlens_q),
            *_strides(o, cu_seqlens_q), *common.sizes, BH, min(band, BH), *common.bounds,
            *common.rest, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TMA=tma, **common.flags,
            **tile.options,
        )  # fmt: skip
    return o, lse
