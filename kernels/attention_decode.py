"""Attention of a few new tokens to a cache of keys and values, which they are added to.

Split keys (Dao et al., Flash-Decoding, 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding,
after FlashAttention, https://arxiv.org/abs/2205.14135): there is too little work in one new token
for a program a head to fill a GPU, so a row's keys are divided among `splits` programs. Split s has
an o and an lse of its own keys, of which the whole is

    lse = log sum_s exp(lse_s)        o = sum_s exp(lse_s - lse) o_s

in float32, summed in the order of the keys by a second kernel; one split needs none.

How many keys a row holds stands on the device alone. The grid and the room for partial results
follow from the room in the cache, so one CUDA graph serves all lengths: a row's keys are divided
evenly by its length there, in whole blocks, and programs that are left without a block end.

All query heads that read a kv head, and all T new tokens, are rows of one tile, so keys and values
are read once. Where that is a single row, products are sums over the head dim, and each row of a
block of keys keeps a maximum, a sum and an output to itself, to be merged when all are read: no
thread waits for another in between. Otherwise rows are padded to 16, as matrix units have them.

The program with a row's last keys in the cache takes the new ones from where they came, k and v,
and writes them. No program reads what another writes: nobody looks behind the length in the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import LN2, LOG2E, _tanh
from fastgpt.kernels.attention_tiles import decode_tile, padded_head_dim
from fastgpt.kernels.tiles import all_registers, cdiv, multiprocessors, on_device

NONE = tl.constexpr(1e30)  # a negated maximum of nothing; finite: inf - inf would be NaN
MOST_ROWS = 64  # of a tile
ALL = 2**30  # a window that hides nothing


@triton.jit
def _share(length, T, S, window, splits, BLOCK_N: tl.constexpr):
    """Of a row that holds `length` keys, and T more if they are in the cache already.

    -> the first that any query sees, after the last, keys of a split, splits that have any.
    """
    end = tl.where(length < 0, 0, tl.minimum(length + T, S))
    lo = tl.minimum(tl.maximum(length - window + 1, 0), end)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(end - lo, splits), BLOCK_N), 1) * BLOCK_N
    return lo, end, chunk, tl.maximum(tl.cdiv(end - lo, chunk), 1)


@triton.jit
def _at(ptr, table_ptr, j, inside, stride_p, stride_t, page_size):
    """Addresses of the positions j of a row: in its pages, if it has a table of them."""
    if table_ptr is None:
        return ptr + j.to(tl.int64) * stride_t
    else:
        page = tl.load(table_ptr + j // page_size, mask=inside, other=0).to(tl.int64)
        return ptr + page * stride_p + (j % page_size).to(tl.int64) * stride_t


@triton.jit
def _mask(inside, offs_d, D, PAD_D: tl.constexpr):
    """Of rows that are inside; the head dim's padding is outside."""
    if PAD_D:
        return inside[:, None] & (offs_d[None, :] < D)
    else:
        return inside[:, None]


@triton.jit
def _in_base_2(s, qk_scale, cap):
    """Products as logits; with a cap, qk_scale is softmax_scale / softcap."""
    if cap is None:
        return s * qk_scale
    else:
        return _tanh(s * qk_scale) * cap


@triton.jit
def _merge(acc, n_i, l_i, s, v):
    """Values v with logits s, each row of them into an accumulator of its own."""
    n_new = tl.minimum(n_i, -s)
    p = tl.math.exp2(s + n_new)
    alpha = tl.math.exp2(n_new - n_i)
    return tl.fma(acc, alpha[:, None], p[:, None] * v), n_new, tl.fma(l_i, alpha, p)


@triton.jit
def _merged(acc, n_i, l_i):
    """The accumulators of all rows as one: o and lse, in base 2."""
    n = tl.min(n_i, 0)
    w = tl.math.exp2(n - n_i)
    l = tl.sum(l_i * w, 0)
    none = l == 0.0  # no key is seen: 0 and -inf; NaN stays NaN
    l = tl.where(none, 1.0, l)
    o = tl.sum(acc * w[:, None], 0) / l
    return o, tl.where(none, float("-inf"), tl.math.log2(l) - n)


@triton.jit
def _attend(acc, n_i, l_i, q, k, v, see, qk_scale, cap, ONE: tl.constexpr):
    if ONE:
        s = _in_base_2(tl.sum(k.to(tl.float32) * q[None, :], 1), qk_scale, cap)
        s = tl.where(see, s, float("-inf"))
        return _merge(acc, n_i, l_i, s, v.to(tl.float32))
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        s = tl.where(see, _in_base_2(s, qk_scale, cap), float("-inf"))
        n_new = tl.minimum(n_i, -tl.max(s, 1))
        p = tl.math.exp2(s + n_new[:, None])
        alpha = tl.math.exp2(n_new - n_i)
        l_i = tl.fma(l_i, alpha, tl.sum(p, 1))
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        return acc, n_new, l_i


@triton.jit(do_not_specialize=["B", "T", "S", "window", "splits", "tiles", "page_size"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, new_k_ptr, new_v_ptr, table_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_len, stride_nkb, stride_nkt, stride_nkh, stride_nvb, stride_nvt, stride_nvh,
    stride_table, B, T, S, H, Hkv, D, page_size, window, qk_scale, cap, splits, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
    ONE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    hk = (tl.program_id(0) // splits // tiles % Hkv).to(tl.int64)
    b = (tl.program_id(0) // splits // tiles // Hkv).to(tl.int64)
    length = tl.load(lengths_ptr + b * stride_len).to(tl.int32)
    held = 0 if new_k_ptr is not None else T
    lo, end, chunk, used = _share(length, held, S, window, splits, BLOCK_N)
    if split >= used:
        return

    if table_ptr is None:
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
    else:
        table_ptr += b * stride_table
    k_ptr += hk * stride_kh
    v_ptr += hk * stride_vh
    groups = H // Hkv
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    if ONE:
        t_m = offs_n * 0
        q_ptrs = q_ptr + b * stride_qb + hk * stride_qh + offs_d
        q = tl.load(q_ptrs, mask=offs_d < D, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        n_i = tl.full([BLOCK_N], NONE, dtype=tl.float32)
        l_i = tl.zeros([BLOCK_N], dtype=tl.float32)
    else:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        t_m = row // groups
        h_m = hk * groups + row % groups
        q_ptrs = q_ptr + b * stride_qb + t_m.to(tl.int64) * stride_qt + h_m * stride_qh
        mine = _mask(t_m < T, offs_d, D, PAD_D)
        q = tl.load(q_ptrs[:, None] + offs_d[None, :], mask=mine, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        n_i = tl.full([BLOCK_M], NONE, dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)

    start = lo + split * chunk
    stop = tl.minimum(start + chunk, end)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        j = first + offs_n
        inside = j < stop
        there = _mask(inside, offs_d, D, PAD_D)
        k_ptrs = _at(k_ptr, table_ptr, j, inside, stride_kb, stride_kt, page_size)
        v_ptrs = _at(v_ptr, table_ptr, j, inside, stride_vb, stride_vt, page_size)
        k = tl.load(k_ptrs[:, None] + offs_d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptrs[:, None] + offs_d[None, :], mask=there, other=0.0)
        if ONE:  # at the position `length`, from which on `window` counts
            see = inside
        else:
            d = (length + t_m)[:, None] - j[None, :]
            see = inside[None, :] & (d >= 0) & (d < window)
        acc, n_i, l_i = _attend(acc, n_i, l_i, q, k, v, see, qk_scale, cap, ONE)

    if new_k_ptr is not None:
        if split == used - 1:
            new_k_ptr += b * stride_nkb + hk * stride_nkh
            new_v_ptr += b * stride_nvb + hk * stride_nvh
            for first in tl.range(0, T, BLOCK_N):
                n = first + offs_n
                inside = (n < T) & (length >= 0) & (length + n < S)
                there = _mask(inside, offs_d, D, PAD_D)
                k_ptrs = new_k_ptr + n.to(tl.int64) * stride_nkt
                v_ptrs = new_v_ptr + n.to(tl.int64) * stride_nvt
                k = tl.load(k_ptrs[:, None] + offs_d[None, :], mask=there, other=0.0)
                v = tl.load(v_ptrs[:, None] + offs_d[None, :], mask=there, other=0.0)
                if tile == 0:
                    j = length + n
                    k_ptrs = _at(k_ptr, table_ptr, j, inside, stride_kb, stride_kt, page_size)
                    v_ptrs = _at(v_ptr, table_ptr, j, inside, stride_vb, stride_vt, page_size)
                    tl.store(k_ptrs[:, None] + offs_d[None, :], k, mask=there)
                    tl.store(v_ptrs[:, None] + offs_d[None, :], v, mask=there)
                if ONE:
                    see = inside
                else:
                    d = t_m[:, None] - n[None, :]
                    see = inside[None, :] & (d >= 0) & (d < window)
                acc, n_i, l_i = _attend(acc, n_i, l_i, q, k, v, see, qk_scale, cap, ONE)

    part = split * B + b  # of (splits, B) partial results, or B whole ones
    if ONE:
        o, lse = _merged(acc, n_i, l_i)
        at = part * H + hk
        tl.store(o_ptr + at * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)
        tl.store(lse_ptr + at, lse if SPLIT else lse * LN2)
    else:
        none = l_i == 0.0
        l_i = tl.where(none, 1.0, l_i)
        lse = tl.where(none, float("-inf"), tl.math.log2(l_i) - n_i)
        at = (part * T + t_m) * H + h_m
        o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(o_ptr + at[:, None] * D + offs_d[None, :], o, mask=mine)
        tl.store(lse_ptr + (part * H + h_m) * T + t_m, lse if SPLIT else lse * LN2, mask=t_m < T)


@triton.jit(do_not_specialize=["B", "T", "held", "S", "window", "splits"])
def _combine_kernel(
    part_ptr, part_lse_ptr, lengths_ptr, o_ptr, lse_ptr, stride_len, B, T, held, S, H, D, window,
    splits, KEYS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PAD_D: tl.constexpr,
):  # fmt: skip
    """One program a query. part_ptr: (splits, B, T, H, D), part_lse_ptr: (splits, B, H, T)."""
    pid = tl.program_id(0).to(tl.int64)  # of (B, T, H)
    h = pid % H
    t = pid // H % T
    b = pid // H // T
    length = tl.load(lengths_ptr + b * stride_len).to(tl.int32)
    _, _, _, used = _share(length, held, S, window, splits, KEYS)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    n_i = tl.full([BLOCK_S], NONE, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first in tl.range(0, used, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = s < used
        at = s.to(tl.int64) * B
        lse = tl.load(part_lse_ptr + ((at + b) * H + h) * T + t, mask=inside, other=float("-inf"))
        o_ptrs = part_ptr + (((at + b) * T + t) * H + h)[:, None] * D + offs_d[None, :]
        o = tl.load(o_ptrs, mask=_mask(inside, offs_d, D, PAD_D), other=0.0)
        acc, n_i, l_i = _merge(acc, n_i, l_i, lse, o)
    o, lse = _merged(acc, n_i, l_i)
    tl.store(o_ptr + pid * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(lse_ptr + (b * H + h) * T + t, lse * LN2)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def chosen_splits(q: Tensor, programs: int, keys: int, block_n: int) -> int:
    """Of that many keys at most: two programs for each multiprocessor, each with four blocks."""
    return max(1, min(cdiv(2 * multiprocessors(q), programs), keys // (4 * block_n)))


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None,
    v: Tensor | None, block_table: Tensor | None, scale: float, left: int, softcap: float,
    splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q: (B, T, H, D), caches (B, S, Hkv, D) or pages -> o: (B, T, H, D), lse: (B, H, T) float32.

    left: keys that a query sees before its own, -1 for all. splits: 0 leaves the choice to us.
    """
    q = _rows(q)
    B, T, H, D = q.shape
    page_size, Hkv = k_cache.shape[1:3]
    S = page_size * (1 if block_table is None else block_table.shape[1])
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    new: tuple[Any, ...] = (None,) * 6
    if k is not None and v is not None:
        k, v = _rows(k), _rows(v)
        new = (*k.stride()[:3], *v.stride()[:3])
    table_stride = None
    if block_table is not None:
        block_table = _rows(block_table)
        table_stride = block_table.stride(0)
    with on_device(q):
        block_d, rows = padded_head_dim(D), H // Hkv * T
        tile = decode_tile(q.dtype, block_d, min(rows, MOST_ROWS))
        tiles = cdiv(rows, tile.block_m)
        window = min(left + 1, ALL) if left >= 0 else ALL
        keys = min(S, window)
        splits = splits or chosen_splits(q, B * Hkv * tiles, keys, tile.block_n)
        sizes = {"BLOCK_D": block_d, "PAD_D": block_d != D}
        qk_scale, cap = scale * LOG2E.value, None
        if softcap:
            qk_scale, cap = scale / softcap, softcap * LOG2E.value
        o_part, lse_part = o, lse
        if splits > 1:
            o_part = torch.empty((splits, *o.shape), dtype=torch.float32, device=q.device)
            lse_part = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
        _decode_kernel[(B * Hkv * tiles * splits,)](
            q, k_cache, v_cache, lengths, k, v, block_table, o_part, lse_part,
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], lengths.stride(0), *new,
            table_stride, B, T, S, H, Hkv, D, page_size, window, qk_scale, cap, splits, tiles,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **sizes, ONE=tile.block_m == 1,
            SPLIT=splits > 1, STAGES=tile.num_stages, **tile.options, **all_registers(),
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(B * T * H,)](
                o_part, lse_part, lengths, o, lse, lengths.stride(0), B, T, 0 if k is not None
                else T, S, H, D, window, splits, KEYS=tile.block_n, BLOCK_S=8, **sizes,
                num_warps=1 if block_d <= 128 else 2, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return o, lse
