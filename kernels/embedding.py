"""Token and position embedding with dropout, forward and backward.

    h[b, t] = dropout(wte[idx[b, t]] + wpe[start + t])        dh = dropout(dy)
    dwte[v] = sum of dh[b, t] over idx[b, t] = v        dwpe[start + t] = sum over b of dh[b, t]

Forward: a program takes a few positions and a block of columns, holds its part of wpe, and walks
over the batch. An id outside [0, V) reads no row: its token counts as zero and has no gradient.

Backward: both gradients sum rows of dh by a key. The rows are put in the order of their keys: ids
are sorted, equal ones keeping their order; the order of positions is known. Then a program owns a
key and a block of columns, and writes the sum of its segment, or zero where it has no row. Segments
may be long: the sorted rows are cut into chunks, a chunk of one key throughout is summed by a
program of its own beforehand, and the owner adds that sum to the rows around it. So a program
reads at most two chunks of rows and one partial sum a chunk. Sums are float32, in an order that
only idx decides. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import kept
from fastgpt.kernels.tiles import cdiv, embedding_tile, on_device, programs

CHUNK = 16  # of the backward: rows in a chunk over rows in a tile


@triton.jit(do_not_specialize=["stride_ib", "stride_it", "B", "T", "V", "start", "threshold"])
def _fwd_kernel(
    idx_ptr, wte_ptr, wpe_ptr, h_ptr, seed_ptr, stride_ib, stride_it, stride_e, stride_p,
    B, T, V, C, start, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_WPE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (t < T)[:, None] & (cols < C)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if HAS_WPE:
        at = (start + t).to(tl.int64)[:, None] * stride_p
        position = tl.load(wpe_ptr + at + cols, mask=mask, other=0.0).to(tl.float32)
    for b in tl.range(tl.program_id(1), B, tl.num_programs(1)):
        batch = tl.cast(b, tl.int64)
        ids = tl.load(
            idx_ptr + batch * stride_ib + t.to(tl.int64) * stride_it, mask=t < T, other=-1
        )
        known = ((ids >= 0) & (ids < V))[:, None] & (cols < C)
        at = ids.to(tl.int64)[:, None] * stride_e
        h = tl.load(wte_ptr + at + cols, mask=known, other=0.0).to(tl.float32)
        if HAS_WPE:
            h += position
        if DROPOUT:
            h = tl.where(kept(seed, 0, (b * T + t)[:, None], cols, threshold), h * keep_scale, 0.0)
        row = (batch * T + t)[:, None]
        tl.store(h_ptr + row * C + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of_dh(
    dy_ptr, order_ptr, i, mask_i, cols, mask_c, seed, stride_dy, B, T, threshold, keep_scale,
    BY_POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dh of the rows at places i in the order of their keys, in float32, zero where masked."""
    row = (i % B).to(tl.int64) * T + i // B
    if not BY_POSITION:
        row = tl.load(order_ptr + i, mask=mask_i, other=0).to(tl.int64)
    at = row[:, None] * stride_dy + cols[None, :]
    dh = tl.load(dy_ptr + at, mask=mask_i[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    if DROPOUT:
        here = kept(seed, 0, row.to(tl.int32)[:, None], cols[None, :], threshold)
        dh = tl.where(here, dh * keep_scale, 0.0)
    return dh


@triton.jit(do_not_specialize=["B", "T", "V", "threshold"])
def _chunk_sum_kernel(
    dy_ptr, ids_ptr, order_ptr, part_ptr, seed_ptr, stride_dy, B, T, V, C, threshold, keep_scale,
    S: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BY_POSITION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """part: (M // S, C), the sum of every chunk of one key; nothing is written for the others."""
    chunk = tl.program_id(0)
    first = chunk * S
    if BY_POSITION:
        key = first // B
        uniform = key == (first + S - 1) // B
    else:
        key = tl.load(ids_ptr + first)
        uniform = (key == tl.load(ids_ptr + first + S - 1)) & (key >= 0) & (key < V)
    if uniform:
        cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        seed = tl.load(seed_ptr) if DROPOUT else 0
        acc = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
        for r in tl.range(0, S, ROWS):
            i = first + r + tl.arange(0, ROWS)
            acc += _rows_of_dh(
                dy_ptr, order_ptr, i, i < first + S, cols, cols < C, seed, stride_dy, B, T,
                threshold, keep_scale, BY_POSITION, DROPOUT,
            )  # fmt: skip
        tl.store(part_ptr + chunk.to(tl.int64) * C + cols, tl.sum(acc, 0), mask=cols < C)


@triton.jit(do_not_specialize=["B", "T", "start", "threshold"])
def _segment_sum_kernel(
    dy_ptr, order_ptr, ends_ptr, part_ptr, out_ptr, seed_ptr, stride_dy, B, T, C, start,
    threshold, keep_scale,
    S: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BY_POSITION: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """out: (keys, C), the sum of every key's segment [lo, hi)."""
    key = tl.program_id(0)
    if BY_POSITION:
        lo = tl.minimum(tl.maximum(key - start, 0), T) * B
        hi = tl.minimum(tl.maximum(key - start + 1, 0), T) * B
    else:
        lo = tl.load(ends_ptr + key).to(tl.int32)
        hi = tl.load(ends_ptr + key + 1).to(tl.int32)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    first, last = tl.cdiv(lo, S), hi // S  # its whole chunks
    whole = first < last
    head = (first * S if whole else hi) - lo
    tail = hi - last * S if whole else 0
    for r in tl.range(0, head + tail, ROWS):
        j = r + tl.arange(0, ROWS)
        i = tl.where(j < head, lo + j, last * S + j - head)
        acc += _rows_of_dh(
            dy_ptr, order_ptr, i, j < head + tail, cols, cols < C, seed, stride_dy, B, T,
            threshold, keep_scale, BY_POSITION, DROPOUT,
        )  # fmt: skip
    for c in tl.range(first, last, ROWS):
        chunks = c + tl.arange(0, ROWS)
        at = chunks[:, None].to(tl.int64) * C + cols[None, :]
        acc += tl.load(
            part_ptr + at, mask=(chunks < last)[:, None] & (cols < C)[None, :], other=0.0
        )
    total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + key.to(tl.int64) * C + cols, total, mask=cols < C)


def _wide(table: Tensor) -> Tensor:
    """A table whose rows are contiguous."""
    return table if table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()


def embedding_fwd(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, start: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """idx: (B, T), wte: (V, C), wpe: (P, C) -> (B, T, C)."""
    (B, T), (V, C) = idx.shape, wte.shape
    h = torch.empty((B, T, C), dtype=wte.dtype, device=wte.device)
    if h.numel() == 0:
        return h
    wte = _wide(wte)
    table = wte if wpe is None else _wide(wpe)
    with on_device(wte):
        tile = embedding_tile(C)
        blocks = cdiv(T, tile.block_m), cdiv(C, tile.block_n)
        groups = min(B, cdiv(programs(wte, tile.num_warps), blocks[0] * blocks[1]))
        _fwd_kernel[(blocks[0], groups, blocks[1])](
            idx, wte, table, h, seed, *idx.stride(), wte.stride(0), table.stride(0), B, T, V, C,
            start, round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p),
            ROWS=tile.block_m, BLOCK_C=tile.block_n, HAS_WPE=wpe is not None,
            DROPOUT=dropout_p > 0.0, **tile.options,
        )  # fmt: skip
    return h


def _sum_by_key(
    dy: Tensor, B: int, T: int, keys: int, start: int, ids: Tensor | None, order: Tensor | None,
    dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """dy: (B * T, C) -> (keys, C): by the sorted ids, or without them by position."""
    M, C = dy.shape
    out = torch.empty((keys, C), dtype=dy.dtype, device=dy.device)
    ends = None
    if ids is not None:
        ends = torch.searchsorted(
            ids, torch.arange(keys + 1, dtype=ids.dtype, device=ids.device), out_int32=True
        )
    numbers = (round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p))
    with on_device(dy):
        tile = embedding_tile(C, backward=True)
        S, blocks = CHUNK * tile.block_m, cdiv(C, tile.block_n)
        part = torch.empty((M // S, C), dtype=torch.float32, device=dy.device)
        flags = {
            "S": S,
            "ROWS": tile.block_m,
            "BLOCK_C": tile.block_n,
            "BY_POSITION": ids is None,
            "DROPOUT": dropout_p > 0.0,
        }
        if (B if ids is None else M) >= S:
            _chunk_sum_kernel[(M // S, blocks)](
                dy, ids, order, part, seed, dy.stride(0), B, T, keys, C, *numbers, **flags,
                **tile.options,
            )  # fmt: skip
        _segment_sum_kernel[(keys, blocks)](
            dy, order, ends, part, out, seed, dy.stride(0), B, T, C, start, *numbers, **flags,
            **tile.options,
        )  # fmt: skip
    return out


def embedding_bwd(
    dy: Tensor, idx: Tensor, V: int, P: int, start: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dy: (B, T, C) -> dwte: (V, C), dwpe: (P, C); one of no rows is not made."""
    (B, T), C = idx.shape, dy.shape[-1]
    if dy.numel() == 0:
        return dy.new_zeros(V, C), dy.new_zeros(P, C)
    rows = _wide(dy.reshape(-1, C))
    dwte, dwpe = dy.new_empty(0, C), dy.new_empty(0, C)
    if V:
        ids, order = torch.sort(idx.reshape(-1), stable=True)
        dwte = _sum_by_key(rows, B, T, V, start, ids, order, dropout_p, seed)
    if P:
        dwpe = _sum_by_key(rows, B, T, P, start, None, None, dropout_p, seed)
    return dwte, dwpe
