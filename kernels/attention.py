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

Dropout keeps an element by Philox of (key, query, batch * H + head), so the mask does not depend
on the tiles. It acts on p after the sum l, and 1 / (1 - dropout_p) is applied once at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.tiles import attention_flags, attention_tiles, on_device, padded_head_dim

LOG2E = tl.constexpr(1.4426950408889634)
# Dropping the lower half of a float32's bits takes 0.0028 of it on average (1 / (512 ln 2), the
# mantissas' logarithms being uniform): weights that lose them are made 2^DROPPED times larger.
DROPPED = tl.constexpr(0.0040593)
KEPT = tl.constexpr(1.0028177)  # 2^DROPPED
LN2 = tl.constexpr(0.6931471805599453)
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
def _sees(t, n, left, right, Tk):
    """Whether queries at positions t see keys n; they broadcast against each other."""
    return (n < Tk) & (n <= t + right) & (n >= t - left)


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
def _fwd_block(
    acc, n_i, l_i, q, k_ptr, v_ptr, stride_kt, stride_vt, start_n, t_m, offs_m, Tk, D, left, right,
    qk_scale, seed, bh, threshold,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    start = tl.cast(start_n, tl.int64)
    end = Tk - start_n
    k = _tile(k_ptr + start * stride_kt, stride_kt, offs_n, offs_d, end, D, MASKED, PAD_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        see = _sees(t_m[:, None], (start_n + offs_n)[None, :], left, right, Tk)
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
    v = _tile(v_ptr + start * stride_vt, stride_vt, offs_n, offs_d, end, D, MASKED, PAD_D)
    acc = tl.dot(_narrow(p, v.dtype, TRUNCATE), v, acc * alpha[:, None], input_precision="ieee")
    return acc, n_new, l_i


@triton.jit(do_not_specialize=["Tq", "Tk", "left", "right", "BH", "band", "threshold"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_ob, stride_ot, stride_oh,
    Tq, Tk, H, groups, D, BH, band, left, right, qk_scale, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    DROPOUT: tl.constexpr, TRUNCATE: tl.constexpr, PARTS: tl.constexpr,
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
    k_ptr += b * stride_kb + h // groups * stride_kh
    v_ptr += b * stride_vb + h // groups * stride_vh
    o_ptr += b * stride_ob + h * stride_oh + start_m.to(tl.int64) * stride_ot

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
    n_first, n_full, n_unfull, n_last = _bounds(
        t_first - left, t_last + right + 1, t_last - left, t_first + right + 1, Tk, BLOCK_N
    )
    for n in tl.range(n_full, n_unfull):
        acc, n_i, l_i = _fwd_block(
            acc, n_i, l_i, q, k_ptr, v_ptr, stride_kt, stride_vt, n * BLOCK_N, t_m, offs_m, Tk, D,
            left, right, qk_scale, seed, bh, threshold,
            BLOCK_N, BLOCK_D, PAD_D, False, DROPOUT, TRUNCATE, PARTS,
        )  # fmt: skip
    for n in tl.range(n_first, n_last - (n_unfull - n_full)):
        start_n = tl.where(n < n_full, n, n + (n_unfull - n_full)) * BLOCK_N
        acc, n_i, l_i = _fwd_block(
            acc, n_i, l_i, q, k_ptr, v_ptr, stride_kt, stride_vt, start_n, t_m, offs_m, Tk, D,
            left, right, qk_scale, seed, bh, threshold,
            BLOCK_N, BLOCK_D, PAD_D, True, DROPOUT, TRUNCATE, PARTS,
        )  # fmt: skip

    if PARTS:
        l_i = tl.sum(l_i, 1)
    some = l_i > 0.0  # a query that sees no key gives 0 and -inf
    l_i = tl.where(some, l_i, 1.0)
    inv = tl.where(some, keep_scale / l_i, 0.0)
    if TRUNCATE:
        inv *= KEPT
    lse = tl.where(some, (tl.math.log2(l_i) - n_i) * LN2, float("-inf"))
    tl.store(lse_ptr + bh.to(tl.int64) * Tq + offs_m, lse, mask=offs_m < Tq)
    mask = offs_m[:, None] < Tq
    if PAD_D:
        mask &= offs_d[None, :] < D
    o = (acc * inv[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + in_m[:, None] * stride_ot + offs_d[None, :], o, mask=mask)


def _rows(t: Tensor) -> Tensor:
    """t with D contiguous, as kernels read it; (B, T, H) may have any strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _common(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, dropout_p: float
) -> dict[str, int | float | bool | str]:
    """Arguments that all attention kernels share; an absent bound is one that no key reaches."""
    _, Tq, H, D = q.shape
    Tk = k.shape[1]
    block_d = padded_head_dim(D)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "H": H,
        "groups": H // k.shape[2],
        "D": D,
        "left": left if left >= 0 else Tq + Tk,
        "right": right if right >= 0 else Tq + Tk,
        "qk_scale": scale * LOG2E.value,
        "threshold": round(dropout_p * 2**31),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "BLOCK_D": block_d,
        "PAD_D": block_d != D,
        "DROPOUT": dropout_p > 0.0,
        **attention_flags(q.dtype),
    }


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q: (B, Tq, H, D), k, v: (B, Tk, Hkv, D) -> o: (B, Tq, H, D), lse: (B, H, Tq) float32."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, Tq, H, D = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    with on_device(q):
        tile = attention_tiles(q.dtype, padded_head_dim(D), dropout_p > 0.0).fwd
        band = max(1, L2_BYTES // max(1, 2 * k.shape[1] * D * k.element_size()))
        _fwd_kernel[(triton.cdiv(Tq, tile.block_m) * B * H,)](
            q, k, v, o, lse, seed,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
            BH=B * H, band=min(band, B * H), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            **_common(q, k, scale, left, right, dropout_p), **tile.options,
        )  # fmt: skip
    return o, lse
