"""Cross-entropy of rows of logits, forward and backward, and both in one pass over a row in place.

Per row of V logits u with target t, all in float32, w the row's incoming gradient:

    z = softcap tanh(u / softcap), or u        lse = log(sum(exp(z)))
    loss = lse - (1 - eps) z[t] - eps mean(z) + z_loss lse^2
    dz = w (softmax(z) (1 + 2 z_loss lse) - (1 - eps) [t] - eps / V)
    du = dz (1 - (z / softcap)^2)

eps is the label smoothing of Szegedy et al., 2015, https://arxiv.org/abs/1512.00567, section 7; the
last term of the loss is that of Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311,
section 5. A row whose target is ignore_index is not read: its loss and gradient are 0. A row whose
target lies outside [0, V) has loss and gradient NaN.

One program takes one row. It walks over blocks of columns with a running maximum and sum in each
lane (Milakov, Gimelshein, 2018, https://arxiv.org/abs/1805.02867), rescaled once for all elements
that a lane holds of a block, and adds the lanes once at the end. In place of max and lse it keeps

    k = max(z) log2(e)        s = sum(2^(z log2(e) - k))        lse = (k + log2(s)) / log2(e)

since lse alone, at logits of 1e4, is too coarse for a gradient. A walk begins where the row crosses
the first multiple of 16 bytes, so that rows of any stride are read 16 bytes at a time; the elements
before that and after the last such piece, fewer than two pieces, are read once, one by one. The
last block stays in registers for the second pass, which therefore reads a row of one block no
second time. The second pass of a longer row walks back, from what was read last: of its three
passes over memory the least possible are two, and the third is to be served by L2. To hold all of
50257 logits would take half the registers of a multiprocessor, and nothing would run beside a
program that waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import _tanh
from fastgpt.kernels.tiles import cross_entropy_tile, on_device

How = tuple[int, float, float, float]  # ignore_index, label_smoothing, z_loss, softcap (0: none)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # below any logit; its product with log2(e) is still finite


@triton.jit
def _places(row, stride, V, VEC: tl.constexpr):
    """Where the row and its first piece begin, how many columns are in pieces, and the others."""
    at = row.to(tl.int64) * stride
    aligned = (at + (VEC - 1)) // VEC * VEC
    head = tl.minimum(aligned - at, V).to(tl.int32)
    wide = (V - head) // VEC * VEC
    e = tl.arange(0, 2 * VEC)
    edge = tl.where(e < VEC, e, e - VEC + head + wide)
    keep = tl.where(e < VEC, e < head, edge < V)
    return at, aligned, wide, edge, keep


@triton.jit
def _capped(u, cap, CAP: tl.constexpr):
    """z in float32."""
    z = u.to(tl.float32)
    if CAP:
        z = cap * _tanh(z * (1.0 / cap))
    return z


@triton.jit
def _add(u, mask, k, s, total, cap, LANES: tl.constexpr, VEC: tl.constexpr,
         MASKED: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """A block joins the running k, s and sum of z, each [LANES]."""
    z = _capped(u, cap, CAP)
    if MASKED:
        if SMOOTH:
            total += tl.sum(
                tl.sum(tl.where(mask, z, 0.0).reshape(u.shape[0] // (LANES * VEC), LANES, VEC), 2),
                0,
            )
        z = tl.where(mask, z, float("-inf"))
    z = z.reshape(u.shape[0] // (LANES * VEC), LANES, VEC)
    if SMOOTH and not MASKED:
        total += tl.sum(tl.sum(z, 2), 0)
    high = tl.maximum(k, tl.max(tl.max(z, 2), 0) * LOG2E)
    e = tl.math.exp2(tl.fma(z, LOG2E, -high[None, :, None]))
    s = tl.fma(s, tl.math.exp2(k - high), tl.sum(tl.sum(e, 2), 0))
    return high, s, total


@triton.jit
def _statistics(
    z_ptr, aligned, wide, tail, edge, keep, cap, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """k, s and the sum of z over a row, given its last block and its edges."""
    k = tl.full([LANES], LOWEST, tl.float32) * LOG2E
    s = tl.zeros([LANES], dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    cols = tl.arange(0, BLOCK)
    full = wide // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK):
        u = tl.load(z_ptr + aligned + start + cols, eviction_policy="evict_last")
        k, s, total = _add(u, True, k, s, total, cap, LANES, VEC, False, SMOOTH, CAP)
    mask = full + cols < wide
    k, s, total = _add(tail, mask, k, s, total, cap, LANES, VEC, True, SMOOTH, CAP)
    z = _capped(edge, cap, CAP)
    sum_z = tl.sum(total, 0)
    if SMOOTH:
        sum_z += tl.sum(tl.where(keep, z, 0.0), 0)
    z = tl.where(keep, z, float("-inf"))
    high = tl.maximum(tl.max(k, 0), tl.max(z, 0) * LOG2E)
    sum_e = tl.sum(s * tl.math.exp2(k - high), 0)
    sum_e += tl.sum(tl.math.exp2(tl.fma(z, LOG2E, -high)), 0)
    return high, sum_e, sum_z


@triton.jit
def _loss(z_t, k, s, sum_z, V, smoothing, z_loss, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr):
    log_s = tl.math.log2(s)
    loss = log_s - tl.fma(z_t, LOG2E, -k)
    if SMOOTH:
        loss = log_s + (1.0 - smoothing) * (loss - log_s) + smoothing * (k - sum_z / V * LOG2E)
    loss *= LN2
    if Z_LOSS:
        lse = (k + log_s) * LN2
        loss = tl.fma(z_loss * lse, lse, loss)
    return loss


@triton.jit
def _grad(u, k, f, flat, cap, SMOOTH: tl.constexpr, CAP: tl.constexpr):
    """f 2^(z log2(e) - k) - flat, and the derivative of the cap."""
    z = _capped(u, cap, CAP)
    d = tl.math.exp2(tl.fma(z, LOG2E, -k)) * f
    if SMOOTH:
        d -= flat
    if CAP:
        tanh = z * (1.0 / cap)
        d *= tl.fma(-tanh, tanh, 1.0)
    return d


@triton.jit
def _write(
    z_ptr, dz_ptr, at, aligned, wide, at_dz, tail, edge, edge_cols, keep, target, ok, counts, u_t,
    k, s, w, V, smoothing, z_loss, cap, BLOCK: tl.constexpr, SAME: tl.constexpr,
    SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, from its last block back, then its edges, then its target's column.

    Of an ignored row nothing is read: its logits are taken to be 0, and so are k, f and w.
    """
    f = w / s
    if Z_LOSS:
        f *= tl.fma(2.0 * LN2 * z_loss, k + tl.math.log2(s), 1.0)
    k = tl.where(counts, k, 0.0)
    f = tl.where(counts, f, 0.0)
    w = tl.where(counts, w, 0.0)
    flat = w * smoothing / V
    dtype = dz_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    full = wide // BLOCK * BLOCK
    dz_wide = aligned if SAME else at_dz + (aligned - at)
    d = _grad(tail, k, f, flat, cap, SMOOTH, CAP)
    tl.store(dz_ptr + dz_wide + full + cols, d.to(dtype), mask=full + cols < wide)
    for i in tl.range(0, full, BLOCK):
        start = full - BLOCK - i
        u = tl.load(
            z_ptr + aligned + start + cols, mask=counts, other=0.0, eviction_policy="evict_first"
        )
        d = _grad(u, k, f, flat, cap, SMOOTH, CAP)
        tl.store(dz_ptr + dz_wide + start + cols, d.to(dtype))
    d = _grad(edge, k, f, flat, cap, SMOOTH, CAP)
    tl.store(dz_ptr + at_dz + edge_cols, d.to(dtype), mask=keep)
    d = _grad(u_t, k, f, flat + w * (1.0 - smoothing), cap, True, CAP)
    tl.debug_barrier()  # the store below comes after the one above of the same element
    tl.store(dz_ptr + at_dz + target, d.to(dtype), mask=ok)


@triton.jit
def _begin(z_ptr, row, stride, V, target, counts, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Places of a row, its last block, its edges and its target's logit, unless it is ignored."""
    at, aligned, wide, edge_cols, keep = _places(row, stride, V, VEC)
    cols = wide // BLOCK * BLOCK + tl.arange(0, BLOCK)
    tail = tl.load(z_ptr + aligned + cols, mask=counts & (cols < wide), other=0.0)
    edge = tl.load(z_ptr + at + edge_cols, mask=counts & keep, other=0.0)
    ok = counts & (target >= 0) & (target < V)
    u_t = tl.load(z_ptr + at + target, mask=ok, other=0.0)
    return at, aligned, wide, edge_cols, keep, tail, edge, ok, u_t


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _fwd_kernel(
    z_ptr, target_ptr, loss_ptr, stat_ptr, stride_z, M, V, ignore_index, smoothing, z_loss, cap,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    _, aligned, wide, _, keep, tail, edge, ok, u_t = _begin(
        z_ptr, row, stride_z, V, target, counts, BLOCK, VEC
    )
    k, s, sum_z = _statistics(
        z_ptr, aligned, tl.where(counts, wide, 0), tail, edge, keep, cap, BLOCK, LANES, VEC,
        SMOOTH, CAP,
    )  # fmt: skip
    s = tl.where(ok, s, float("nan"))
    z_t = _capped(u_t, cap, CAP)
    loss = _loss(z_t, k, s, sum_z, V, smoothing, z_loss, SMOOTH, Z_LOSS)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(stat_ptr + row, k)
    tl.store(stat_ptr + M.to(tl.int64) + row, s)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _bwd_kernel(
    w_ptr, z_ptr, target_ptr, stat_ptr, dz_ptr, stride_w, stride_z, stride_dz, M, V, ignore_index,
    smoothing, z_loss, cap, BLOCK: tl.constexpr, VEC: tl.constexpr, SAME: tl.constexpr,
    SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    at, aligned, wide, edge_cols, keep, tail, edge, ok, u_t = _begin(
        z_ptr, row, stride_z, V, target, counts, BLOCK, VEC
    )
    w = tl.load(w_ptr + row.to(tl.int64) * stride_w)
    k = tl.load(stat_ptr + row)
    s = tl.load(stat_ptr + M.to(tl.int64) + row)
    _write(
        z_ptr, dz_ptr, at, aligned, wide, row.to(tl.int64) * stride_dz, tail, edge, edge_cols,
        keep, target, ok, counts, u_t, k, s, w, V, smoothing, z_loss, cap, BLOCK, SAME, SMOOTH,
        Z_LOSS, CAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _both_kernel(
    z_ptr, target_ptr, loss_ptr, stride_z, V, ignore_index, smoothing, z_loss, cap,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The logits of a row become their gradients, for an incoming gradient of 1."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    at, aligned, wide, edge_cols, keep, tail, edge, ok, u_t = _begin(
        z_ptr, row, stride_z, V, target, counts, BLOCK, VEC
    )
    k, s, sum_z = _statistics(
        z_ptr, aligned, tl.where(counts, wide, 0), tail, edge, keep, cap, BLOCK, LANES, VEC,
        SMOOTH, CAP,
    )  # fmt: skip
    s = tl.where(ok, s, float("nan"))
    z_t = _capped(u_t, cap, CAP)
    loss = _loss(z_t, k, s, sum_z, V, smoothing, z_loss, SMOOTH, Z_LOSS)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    _write(
        z_ptr, z_ptr, at, aligned, wide, at, tail, edge, edge_cols, keep, target, ok, counts, u_t,
        k, s, 1.0, V, smoothing, z_loss, cap, BLOCK, True, SMOOTH, Z_LOSS, CAP,
    )  # fmt: skip


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _flags(how: How) -> dict[str, bool]:
    _, smoothing, z_loss, softcap = how
    return {"SMOOTH": smoothing != 0.0, "Z_LOSS": z_loss != 0.0, "CAP": softcap != 0.0}


def cross_entropy_fwd(logits: Tensor, target: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """logits: (M, V), target: (M,) -> losses (M,), k and s (2, M), in float32."""
    logits, target = _rows(logits), target.contiguous()
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    stats = torch.empty((2, M), dtype=torch.float32, device=logits.device)
    if M > 0:
        with on_device(logits):
            tile = cross_entropy_tile(V, logits.element_size())
            _fwd_kernel[(M,)](
                logits, target, losses, stats, logits.stride(0), M, V, *how, BLOCK=tile.block_n,
                LANES=tile.lanes, VEC=tile.vec, **_flags(how), **tile.options,
            )  # fmt: skip
    return losses, stats


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, how: How, dlogits: Tensor
) -> None:
    """dloss: (M,) float32, any stride -> dlogits (M, V), which may be the logits themselves."""
    logits, target = _rows(logits), target.contiguous()
    M, V = logits.shape
    if M > 0:
        with on_device(logits):
            tile = cross_entropy_tile(V, logits.element_size())
            strides = (dloss.stride(0), logits.stride(0), dlogits.stride(0))
            _bwd_kernel[(M,)](
                dloss, logits, target, stats, dlogits, *strides, M, V, *how, BLOCK=tile.block_n,
                VEC=tile.vec, SAME=strides[1] == strides[2], **_flags(how), **tile.options,
            )  # fmt: skip


def cross_entropy_both(logits: Tensor, target: Tensor, how: How, losses: Tensor) -> None:
    """logits: (M, V), rows contiguous, become the gradient of the sum of losses (M,) float32."""
    M, V = logits.shape
    if M > 0:
        with on_device(logits):
            flags = _flags(how)
            tile = cross_entropy_tile(V, logits.element_size(), True, any(flags.values()))
            _both_kernel[(M,)](
                logits, target, losses, logits.stride(0), V, *how, BLOCK=tile.block_n,
                LANES=tile.lanes, VEC=tile.vec, **flags, **tile.options,
            )  # fmt: skip
