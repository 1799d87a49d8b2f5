"""Layer norm with the residual add and dropout before it, forward and backward.

Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450. Per row of N:

    h = residual + dropout(x)        mean = sum(h) / N        var = sum((h - mean)^2) / N
    xhat = (h - mean) * rstd         rstd = 1 / sqrt(var + eps)         y = xhat * weight + bias

    g = dy * weight
    dresidual = rstd * (g - sum(g) / N - xhat * sum(g * xhat) / N) + dh        dx = its dropout
    dweight = sum over rows of dy * xhat        dbias = sum over rows of dy

A row that fits in registers is read once: the mean first, then the squares around it. Wider rows
are read in chunks, whose means and squares are merged by Chan, Golub, LeVeque, 1983. In backward a
few programs walk over all rows, each with its own float32 sums for dweight and dbias; a second
kernel adds those. Statistics and sums are float32. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import kept
from fastgpt.kernels.column_sum import column_sum
from fastgpt.kernels.tiles import layer_norm_tile, on_device, programs


@triton.jit
def _load_h(
    x_ptr, res_ptr, h_ptr, seed, row, offs, mask, threshold, keep_scale,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """h of one tile in float32, as rounded to the residual's dtype; pointers are at the rows."""
    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        h = tl.where(kept(seed, 0, row, offs, threshold), h * keep_scale, 0.0)
    if HAS_RESIDUAL:
        h += tl.load(res_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit(do_not_specialize=["M", "threshold"])
def _fwd_kernel(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, seed_ptr, stride_x, stride_r,
    M, N, eps, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)[None, :]
    at = rows[:, None].to(tl.int64)
    mask = (rows[:, None] < M) & (cols < N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    h = _load_h(
        x_ptr + at * stride_x, res_ptr + at * stride_r, h_ptr, seed, rows[:, None], cols, mask,
        threshold, keep_scale, HAS_RESIDUAL, DROPOUT,
    )  # fmt: skip
    if HAS_RESIDUAL:
        tl.store(h_ptr + at * N + cols, h.to(h_ptr.dtype.element_ty), mask=mask)
    d = h
    if CENTER:
        mean = tl.sum(h, 1) / N
        d = tl.where(cols < N, h - mean[:, None], 0.0)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    rstd = tl.rsqrt(tl.sum(d * d, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = d * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _fwd_wide_kernel(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, seed_ptr, stride_x, stride_r,
    N, eps, threshold, keep_scale,
    BLOCK_N: tl.constexpr, CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = row.to(tl.int64)
    x_ptr += at * stride_x
    res_ptr += at * stride_r
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = 0.0
    m2 = 0.0
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        h = _load_h(
            x_ptr, res_ptr, h_ptr, seed, row, cols, cols < N, threshold, keep_scale,
            HAS_RESIDUAL, DROPOUT,
        )  # fmt: skip
        if HAS_RESIDUAL:
            tl.store(h_ptr + at * N + cols, h.to(h_ptr.dtype.element_ty), mask=cols < N)
        if CENTER:
            count = tl.minimum(BLOCK_N, N - start)
            chunk = tl.sum(h, 0) / count
            d = tl.where(cols < N, h - chunk, 0.0)
            delta = chunk - mean
            m2 += tl.sum(d * d, 0) + delta * delta * (start * (count / (start + count)))
            mean += delta * (count / (start + count))
        else:
            m2 += tl.sum(h * h, 0)
    rstd = tl.rsqrt(m2 / N + eps)
    if CENTER:
        tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        h = _load_h(
            x_ptr, res_ptr, h_ptr, seed, row, cols, cols < N, threshold, keep_scale,
            HAS_RESIDUAL, DROPOUT,
        )  # fmt: skip
        y = (h - mean) * rstd * tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + at * N + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _store_dx(
    dres, dh_ptr, dx_ptr, dres_ptr, at, row, cols, mask, seed, threshold, keep_scale, stride_dh, N,
    HAS_DH: tl.constexpr, HAS_DRES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    if HAS_DH:
        dres += tl.load(dh_ptr + at * stride_dh + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DRES:
        tl.store(dres_ptr + at * N + cols, dres.to(dres_ptr.dtype.element_ty), mask=mask)
    if DROPOUT:
        dres = tl.where(kept(seed, 0, row, cols, threshold), dres * keep_scale, 0.0)
    tl.store(dx_ptr + at * N + cols, dres.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def _bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr, part_ptr, seed_ptr,
    stride_dy, stride_dh, stride_h, M, N, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DH: tl.constexpr, HAS_DRES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)[None, :]
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    for start in tl.range(pid * ROWS, M, count * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64)
        mask = (rows[:, None] < M) & (cols < N)
        h = tl.load(h_ptr + at * stride_h + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        g = dy * w
        if CENTER:
            h -= tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        xhat = h * rstd[:, None]  # g and dy are 0 where there is no element
        c1 = tl.sum(g * xhat, 1) / N
        dres = g - xhat * c1[:, None]
        if CENTER:
            dres -= (tl.sum(g, 1) / N)[:, None]
        dres *= rstd[:, None]
        _store_dx(
            dres, dh_ptr, dx_ptr, dres_ptr, at, rows[:, None], cols, mask, seed, threshold,
            keep_scale, stride_dh, N, HAS_DH, HAS_DRES, DROPOUT,
        )  # fmt: skip
        dw += dy * xhat
        if HAS_BIAS:
            db += dy
    offs = tl.arange(0, BLOCK_N)
    part_ptr += pid.to(tl.int64) * N
    tl.store(part_ptr + offs, tl.sum(dw, 0), mask=offs < N)
    if HAS_BIAS:
        tl.store(part_ptr + count.to(tl.int64) * N + offs, tl.sum(db, 0), mask=offs < N)


@triton.jit(do_not_specialize=["threshold"])
def _bwd_wide_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr, seed_ptr,
    stride_dy, stride_dh, stride_h, N, threshold, keep_scale,
    BLOCK_N: tl.constexpr, CENTER: tl.constexpr, HAS_DH: tl.constexpr, HAS_DRES: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = row.to(tl.int64)
    mean = tl.load(mean_ptr + at) if CENTER else 0.0
    rstd = tl.load(rstd_ptr + at)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c1 = tl.zeros([BLOCK_N], dtype=tl.float32)
    c2 = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        h = tl.load(h_ptr + at * stride_h + cols, mask=cols < N, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at * stride_dy + cols, mask=cols < N, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        c1 += g * (h - mean) * rstd  # g is 0 where there is no column
        c2 += g
    m1 = tl.sum(c1, 0) / N
    m2 = tl.sum(c2, 0) / N if CENTER else 0.0
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        h = tl.load(h_ptr + at * stride_h + cols, mask=cols < N, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at * stride_dy + cols, mask=cols < N, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        dres = (g - (h - mean) * rstd * m1 - m2) * rstd
        _store_dx(
            dres, dh_ptr, dx_ptr, dres_ptr, at, row, cols, cols < N, seed, threshold, keep_scale,
            stride_dh, N, HAS_DH, HAS_DRES, DROPOUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _bwd_wide_weight_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, part_ptr, stride_dy, stride_h, M, N,
    BLOCK_N: tl.constexpr, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    count = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row in tl.range(pid, M, count):
        at = tl.cast(row, tl.int64)
        h = tl.load(h_ptr + at * stride_h + cols, mask=cols < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at * stride_dy + cols, mask=cols < N, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + at) if CENTER else 0.0
        dw += dy * (h - mean) * tl.load(rstd_ptr + at)
        db += dy
    part_ptr += pid.to(tl.int64) * N
    tl.store(part_ptr + cols, dw, mask=cols < N)
    if HAS_BIAS:
        tl.store(part_ptr + count.to(tl.int64) * N + cols, db, mask=cols < N)


def _rows(t: Tensor) -> Tensor:
    """t as (M, N) with contiguous rows: a view where one exists."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual: (..., N) -> y of x's shape, h of the residual's or empty, mean, rstd: (M,).

    Without center it is the RMS norm, and mean is empty.
    """
    rows = _rows(x)
    M, N = rows.shape
    res = rows if residual is None else _rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape if residual is not None else 0, dtype=res.dtype, device=x.device)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty(M if center else 0, dtype=torch.float32, device=x.device)
    if M == 0:
        return y, h, mean, rstd
    tensors = (rows, res, weight.contiguous(), None if bias is None else bias.contiguous())
    args = (*tensors, y, h, mean, rstd, seed, rows.stride(0), res.stride(0))
    numbers = (eps, round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p))
    flags = {
        "CENTER": center,
        "HAS_RESIDUAL": residual is not None,
        "HAS_BIAS": bias is not None,
        "DROPOUT": dropout_p > 0.0,
    }
    with on_device(x):
        tile = layer_norm_tile(N)
        if N <= tile.block_n:
            _fwd_kernel[(triton.cdiv(M, tile.block_m),)](
                *args, M, N, *numbers, ROWS=tile.block_m, BLOCK_N=tile.block_n, **flags,
                **tile.options,
            )  # fmt: skip
        else:
            _fwd_wide_kernel[(M,)](
                *args, N, *numbers, BLOCK_N=tile.block_n, **flags, **tile.options
            )
    return y, h, mean, rstd


def layer_norm_bwd(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor,
    rstd: Tensor, dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype, center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y and h, either None -> dx, dresidual or empty, dweight, dbias or empty."""
    h_rows = _rows(h)
    M, N = h_rows.shape
    dy_rows = torch.zeros((1, N), dtype=h.dtype, device=h.device).expand(M, N)
    dy_rows = dy_rows if dy is None else _rows(dy)
    dh_rows = dy_rows if dh is None else _rows(dh)
    dx = torch.empty(h.shape, dtype=x_dtype, device=h.device)
    has_dres = dropout_p > 0.0 or x_dtype != h.dtype
    dres = torch.empty(h.shape if has_dres else 0, dtype=h.dtype, device=h.device)
    if M == 0:
        dw = torch.zeros_like(weight)
        return dx, dres, dw, torch.zeros_like(weight) if has_bias else weight.new_empty(0)
    strides = (dy_rows.stride(0), dh_rows.stride(0), h_rows.stride(0))
    numbers = (round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p))
    flags = {
        "CENTER": center,
        "HAS_DH": dh is not None,
        "HAS_DRES": has_dres,
        "DROPOUT": dropout_p > 0.0,
    }
    inputs = (dy_rows, dh_rows, h_rows, weight.contiguous(), mean, rstd, dx, dres)
    with on_device(h):
        tile = layer_norm_tile(N, backward=True)
        wide = tile.block_n < N
        P = min(triton.cdiv(M, 1 if wide else tile.block_m), programs(h, tile.num_warps))
        part = torch.empty((1 + has_bias, P, N), dtype=torch.float32, device=h.device)
        if wide:
            _bwd_wide_kernel[(M,)](
                *inputs, seed, *strides, N, *numbers, BLOCK_N=tile.block_n, **flags, **tile.options
            )
            P = min(P, 64)  # column blocks share the work: few row groups are enough
            part = torch.empty((1 + has_bias, P, N), dtype=torch.float32, device=h.device)
            _bwd_wide_weight_kernel[(triton.cdiv(N, tile.block_n), P)](
                dy_rows, h_rows, mean, rstd, part, strides[0], strides[2], M, N,
                BLOCK_N=tile.block_n, CENTER=center, HAS_BIAS=has_bias, **tile.options,
            )  # fmt: skip
        else:
            _bwd_kernel[(P,)](
                *inputs, part, seed, *strides, M, N, *numbers, ROWS=tile.block_m,
                BLOCK_N=tile.block_n, HAS_BIAS=has_bias, **flags, **tile.options,
            )  # fmt: skip
        sums = column_sum(part, weight.dtype)
    return dx, dres, sums[0], sums[1] if has_bias else weight.new_empty(0)
