"""Layer norm with the residual add and dropout before it, forward and backward.

Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450. Per row of N:

    h = residual + dropout(x + x_bias)        mean = sum(h) / N        var = sum((h - mean)^2) / N
    xhat = (h - mean) * rstd         rstd = 1 / sqrt(var + eps)         y = xhat * weight + bias

    g = dy * weight
    dresidual = rstd * (g - sum(g) / N - xhat * sum(g * xhat) / N) + dh        dx = its dropout
    dweight = sum over rows of dy * xhat      dbias = sum over rows of dy      dx_bias = of dx

Without CENTER mean is 0 and sum(g) is left out: the RMS norm.

A row that fits in registers is held there in PIECES of BLOCK_N columns, of which the last alone may
be masked: 768 columns are three pieces of 256, and no lane idles. The mean comes first, then the
squares around it. A program walks over rows with weight and bias in registers; in backward with
its own float32 sums for the gradients of weight and the biases as well, which a second kernel adds.

Wider rows are read in chunks. Forward reads a row twice, the second time from cache; the means and
squares of its chunks are merged by Chan, Golub, LeVeque, 1983. In backward one kernel sums over the
rows, and a second takes a block of columns, walks over rows and makes dx and the sums for weight
and biases. Statistics and sums are float32. No atomics.
"""

# Triton's tuples grow by addition and change their type with it.
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention import kept
from fastgpt.kernels.column_sum import column_sum
from fastgpt.kernels.tiles import (
    all_registers,
    cdiv,
    layer_norm_tile,
    norm_pieces,
    on_device,
    programs,
    shared_by_more,
)


@triton.jit
def _inside(rows, cols, M, N, ROWS: tl.constexpr, FULL: tl.constexpr):
    """Which elements of a tile exist: of one row and full columns the compiler sees that all do."""
    return ((rows[:, None] < M) | (ROWS == 1)) & ((cols < N) | FULL)


@triton.jit
def _load_h(
    x_ptr, x_bias, res_ptr, h_ptr, seed, row, offs, mask, threshold, keep_scale,
    HAS_X_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """h of one tile in float32, as rounded to the residual's dtype; pointers are at the rows."""
    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        h += x_bias
    if DROPOUT:
        h = tl.where(kept(seed, 0, row, offs, threshold), h * keep_scale, 0.0)
    if HAS_RESIDUAL:
        h += tl.load(res_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _x_bias(ptr, cols, mask, HAS_X_BIAS: tl.constexpr):
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32) if HAS_X_BIAS else 0.0


@triton.jit
def _over(total, N, per_n):
    """total / N, rounded once: the mean of equal numbers is that number."""
    mean = total * per_n
    return tl.fma(tl.fma(-mean, N, total), per_n, mean)


@triton.jit(do_not_specialize=["M", "threshold"])
def _fwd_kernel(
    x_ptr, xb_ptr, res_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, seed_ptr, stride_x,
    stride_r, M, N, eps, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr,
    CENTER: tl.constexpr, HAS_X_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    count = tl.num_programs(0)
    offs = tl.arange(0, BLOCK_N)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    n = tl.cast(N, tl.float32)
    per_n = 1.0 / n
    ws, bs, xbs = (), (), ()
    for i in tl.static_range(PIECES):
        cols = i * BLOCK_N + offs
        there = (cols < N) | (FULL or i + 1 < PIECES)
        ws = ws + (tl.load(w_ptr + cols, mask=there, other=0.0).to(tl.float32),)
        if HAS_BIAS:
            bs = bs + (tl.load(b_ptr + cols, mask=there, other=0.0).to(tl.float32),)
        if HAS_X_BIAS:
            xbs = xbs + (tl.load(xb_ptr + cols, mask=there, other=0.0).to(tl.float32),)
    for start in tl.range(tl.program_id(0) * ROWS, M, count * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64)
        hs = ()
        total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        for i in tl.static_range(PIECES):
            cols = i * BLOCK_N + offs
            mask = _inside(rows, cols, M, N, ROWS, FULL or i + 1 < PIECES)
            h = _load_h(
                x_ptr + at * stride_x, xbs[i] if HAS_X_BIAS else 0.0, res_ptr + at * stride_r,
                h_ptr, seed, rows[:, None], cols, mask, threshold, keep_scale, HAS_X_BIAS,
                HAS_RESIDUAL, DROPOUT,
            )  # fmt: skip
            if HAS_RESIDUAL:
                tl.store(h_ptr + at * N + cols, h.to(h_ptr.dtype.element_ty), mask=mask)
            hs = hs + (h,)
            if CENTER:
                total += h
        if CENTER:
            mean = _over(tl.sum(total, 1), n, per_n)
            tl.store(mean_ptr + rows, mean, mask=(rows < M) | (ROWS == 1))
            total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        ds = ()
        for i in tl.static_range(PIECES):
            d = hs[i]
            if CENTER:
                there = (i * BLOCK_N + offs < N) | (FULL or i + 1 < PIECES)
                d = tl.where(there, d - mean[:, None], 0.0)
            total += d * d
            ds = ds + (d,)
        rstd = tl.rsqrt(tl.sum(total, 1) * per_n + eps)
        tl.store(rstd_ptr + rows, rstd, mask=(rows < M) | (ROWS == 1))
        for i in tl.static_range(PIECES):
            cols = i * BLOCK_N + offs
            y = ds[i] * rstd[:, None] * ws[i]
            if HAS_BIAS:
                y += bs[i]
            mask = _inside(rows, cols, M, N, ROWS, FULL or i + 1 < PIECES)
            tl.store(y_ptr + at * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _fwd_wide_kernel(
    x_ptr, xb_ptr, res_ptr, w_ptr, b_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, seed_ptr, stride_x,
    stride_r, N, eps, threshold, keep_scale,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr, CENTER: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
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
        mask = (cols < N) | FULL
        h = _load_h(
            x_ptr, _x_bias(xb_ptr, cols, mask, HAS_X_BIAS), res_ptr, h_ptr, seed, row, cols, mask,
            threshold, keep_scale, HAS_X_BIAS, HAS_RESIDUAL, DROPOUT,
        )  # fmt: skip
        if HAS_RESIDUAL:
            tl.store(h_ptr + at * N + cols, h.to(h_ptr.dtype.element_ty), mask=mask)
        if CENTER:
            count = tl.minimum(BLOCK_N, N - start)
            chunk = tl.sum(h, 0) / count
            d = tl.where(mask, h - chunk, 0.0)
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
        mask = (cols < N) | FULL
        h = _load_h(
            x_ptr, _x_bias(xb_ptr, cols, mask, HAS_X_BIAS), res_ptr, h_ptr, seed, row, cols, mask,
            threshold, keep_scale, HAS_X_BIAS, HAS_RESIDUAL, DROPOUT,
        )  # fmt: skip
        y = (h - mean) * rstd * tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_dx(
    dres, dh_ptr, dx_ptr, dres_ptr, at, row, cols, mask, seed, threshold, keep_scale, stride_dh, N,
    HAS_DH: tl.constexpr, HAS_DRES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Stores dresidual, of which dres lacks dh, and dx; -> dx."""
    if HAS_DH:
        dres += tl.load(dh_ptr + at * stride_dh + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DRES:
        tl.store(dres_ptr + at * N + cols, dres.to(dres_ptr.dtype.element_ty), mask=mask)
    if DROPOUT:
        dres = tl.where(kept(seed, 0, row, cols, threshold), dres * keep_scale, 0.0)
    tl.store(dx_ptr + at * N + cols, dres.to(dx_ptr.dtype.element_ty), mask=mask)
    return dres


@triton.jit(do_not_specialize=["M", "threshold"])
def _bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr, part_ptr, seed_ptr,
    stride_dy, stride_dh, stride_h, M, N, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr,
    CENTER: tl.constexpr, HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DH: tl.constexpr,
    HAS_DRES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    offs = tl.arange(0, BLOCK_N)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    per_n = 1.0 / tl.cast(N, tl.float32)
    ws, dws, dbs, dxbs = (), (), (), ()
    for i in tl.static_range(PIECES):
        cols = i * BLOCK_N + offs
        there = (cols < N) | (FULL or i + 1 < PIECES)
        ws = ws + (tl.load(w_ptr + cols, mask=there, other=0.0).to(tl.float32),)
        dws = dws + (tl.zeros([ROWS, BLOCK_N], dtype=tl.float32),)
        if HAS_BIAS:
            dbs = dbs + (tl.zeros([ROWS, BLOCK_N], dtype=tl.float32),)
        if HAS_X_BIAS:
            dxbs = dxbs + (tl.zeros([ROWS, BLOCK_N], dtype=tl.float32),)
    for start in tl.range(pid * ROWS, M, count * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64)
        here = (rows < M) | (ROWS == 1)
        rstd = tl.load(rstd_ptr + rows, mask=here, other=0.0)
        shift = rstd  # of xhat = h * rstd + shift
        if CENTER:
            shift = -rstd * tl.load(mean_ptr + rows, mask=here, other=0.0)
        c1 = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        c2 = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        xhats, gs, new_dws, new_dbs, new_dxbs = (), (), (), (), ()
        for i in tl.static_range(PIECES):
            cols = i * BLOCK_N + offs
            mask = _inside(rows, cols, M, N, ROWS, FULL or i + 1 < PIECES)
            h = tl.load(h_ptr + at * stride_h + cols, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
            g = dy * ws[i]  # dy is 0 where there is no element
            xhat = h * rstd[:, None]
            if CENTER:
                xhat += shift[:, None]
                c2 += g
            c1 += g * xhat
            xhats = xhats + (xhat,)
            gs = gs + (g,)
            new_dws = new_dws + (dws[i] + dy * xhat,)
            if HAS_BIAS:
                new_dbs = new_dbs + (dbs[i] + dy,)
        dws = new_dws
        dbs = new_dbs
        m1 = tl.sum(c1, 1) * per_n * -rstd
        m2 = tl.sum(c2, 1) * per_n * -rstd if CENTER else m1
        for i in tl.static_range(PIECES):
            cols = i * BLOCK_N + offs
            dres = xhats[i] * m1[:, None]
            if CENTER:
                dres += m2[:, None]
            dres += gs[i] * rstd[:, None]
            mask = _inside(rows, cols, M, N, ROWS, FULL or i + 1 < PIECES)
            dx = _store_dx(
                dres, dh_ptr, dx_ptr, dres_ptr, at, rows[:, None], cols, mask, seed, threshold,
                keep_scale, stride_dh, N, HAS_DH, HAS_DRES, DROPOUT,
            )  # fmt: skip
            if HAS_X_BIAS:
                new_dxbs = new_dxbs + (dxbs[i] + dx,)  # 0 in rows that are not there
        dxbs = new_dxbs
    part_ptr += pid.to(tl.int64) * N
    size = count.to(tl.int64) * N
    for i in tl.static_range(PIECES):
        ends = i * BLOCK_N + tl.arange(0, BLOCK_N)
        within = (ends < N) | (FULL or i + 1 < PIECES)
        tl.store(part_ptr + ends, tl.sum(dws[i], 0), mask=within)
        if HAS_BIAS:
            tl.store(part_ptr + size + ends, tl.sum(dbs[i], 0), mask=within)
        if HAS_X_BIAS:
            at_part = part_ptr + (1 + HAS_BIAS) * size
            tl.store(at_part + ends, tl.sum(dxbs[i], 0), mask=within)


@triton.jit
def _bwd_wide_sums_kernel(
    dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, sums_ptr, stride_dy, stride_h, N,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """sums: (M, 2), of each row -rstd / N times sum(g * xhat) and sum(g)."""
    row = tl.program_id(0)
    at = row.to(tl.int64)
    mean = tl.load(mean_ptr + at) if CENTER else 0.0
    rstd = tl.load(rstd_ptr + at)
    c1 = tl.zeros([BLOCK_N], dtype=tl.float32)
    c2 = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < N) | FULL
        h = tl.load(h_ptr + at * stride_h + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        c1 += g * (h - mean)  # g is 0 where there is no column
        c2 += g
    scale = -rstd / N
    tl.store(sums_ptr + 2 * at, tl.sum(c1, 0) * rstd * scale)
    if CENTER:
        tl.store(sums_ptr + 2 * at + 1, tl.sum(c2, 0) * scale)


@triton.jit(do_not_specialize=["M", "threshold"])
def _bwd_wide_kernel(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr, part_ptr, seed_ptr,
    sums_ptr, stride_dy, stride_dh, stride_h, M, N, threshold, keep_scale,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr, CENTER: tl.constexpr, HAS_X_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DH: tl.constexpr, HAS_DRES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    count = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (cols < N) | FULL
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dw = tl.zeros([BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_N], dtype=tl.float32)
    dxb = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row in tl.range(pid, M, count):
        at = tl.cast(row, tl.int64)
        rstd = tl.load(rstd_ptr + at)
        h = tl.load(h_ptr + at * stride_h + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        xhat = h * rstd
        if CENTER:
            xhat -= tl.load(mean_ptr + at) * rstd
        dres = dy * w * rstd + xhat * tl.load(sums_ptr + 2 * at)
        if CENTER:
            dres += tl.load(sums_ptr + 2 * at + 1)
        dxb += _store_dx(
            dres, dh_ptr, dx_ptr, dres_ptr, at, row, cols, mask, seed, threshold, keep_scale,
            stride_dh, N, HAS_DH, HAS_DRES, DROPOUT,
        )  # fmt: skip
        dw += dy * xhat
        db += dy
    part_ptr += pid.to(tl.int64) * N
    tl.store(part_ptr + cols, dw, mask=mask)
    if HAS_BIAS:
        tl.store(part_ptr + count.to(tl.int64) * N + cols, db, mask=mask)
    if HAS_X_BIAS:
        tl.store(part_ptr + (1 + HAS_BIAS) * count.to(tl.int64) * N + cols, dxb, mask=mask)


def _rows(t: Tensor) -> Tensor:
    """t as (M, N) with contiguous rows: a view where one exists."""
    t = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, x_bias: Tensor | None = None, center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual: (..., N), weight and biases: (N,) -> y of x's shape, h of the residual's or
    empty, mean, rstd: (M,).

    Without center it is the RMS norm, and mean is empty.
    """
    rows = _rows(x)
    M, N = rows.shape
    res = rows if residual is None else _rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0)
    if residual is not None:
        h = torch.empty_like(residual, memory_format=torch.contiguous_format)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty(M if center else 0, dtype=torch.float32, device=x.device)
    if M == 0:
        return y, h, mean, rstd
    w, b, xb = (None if t is None else t.contiguous() for t in (weight, bias, x_bias))
    args = (rows, xb, res, w, b, y, h, mean, rstd, seed, rows.stride(0), res.stride(0))
    numbers = (eps, round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p))
    with on_device(x):
        tile = layer_norm_tile(N, dropout=dropout_p > 0.0)
        if x_bias is not None:
            tile = shared_by_more(tile, norm_pieces(N, tile.block_n), False, dropout_p > 0.0)
        flags = {
            "BLOCK_N": tile.block_n,
            "FULL": N % tile.block_n == 0,
            "CENTER": center,
            "HAS_X_BIAS": x_bias is not None,
            "HAS_RESIDUAL": residual is not None,
            "HAS_BIAS": bias is not None,
            "DROPOUT": dropout_p > 0.0,
        }
        if pieces := norm_pieces(N, tile.block_n):
            P = min(cdiv(M, tile.block_m), programs(x, tile.num_warps))
            _fwd_kernel[(P,)](
                *args, M, N, *numbers, ROWS=tile.block_m, PIECES=pieces, **flags,
                **tile.options,
            )  # fmt: skip
        else:
            _fwd_wide_kernel[(M,)](*args, N, *numbers, **flags, **tile.options)
    return y, h, mean, rstd


def layer_norm_bwd(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor,
    rstd: Tensor, dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None, center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y and h, either None -> dx, dresidual or empty, dweight, dbias or empty,
    dx_bias, or empty without x_bias_dtype."""
    h_rows = _rows(h)
    M, N = h_rows.shape
    if dy is None:
        dy_rows = torch.zeros((1, N), dtype=h.dtype, device=h.device).expand(M, N)
    else:
        dy_rows = _rows(dy)
    dh_rows = dy_rows if dh is None else _rows(dh)
    dx = torch.empty_like(h, dtype=x_dtype, memory_format=torch.contiguous_format)
    has_dres = dropout_p > 0.0 or x_dtype != h.dtype
    dres = torch.empty_like(dx, dtype=h.dtype) if has_dres else h.new_empty(0)
    dtypes = [weight.dtype] * (1 + has_bias)
    if x_bias_dtype is not None:
        dtypes.append(x_bias_dtype)
    if M == 0:
        sums = [weight.new_zeros(N, dtype=dtype) for dtype in dtypes]
        return dx, dres, *_placed(sums, has_bias)
    strides = (dy_rows.stride(0), dh_rows.stride(0), h_rows.stride(0))
    numbers = (M, N, round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p))
    inputs = (dy_rows, dh_rows, h_rows, weight.contiguous(), mean, rstd, dx, dres)
    with on_device(h):
        tile = layer_norm_tile(N, backward=True, dropout=dropout_p > 0.0)
        if x_bias_dtype is not None:
            tile = shared_by_more(tile, norm_pieces(N, tile.block_n), True, dropout_p > 0.0)
        pieces = norm_pieces(N, tile.block_n)
        options = tile.options | (all_registers() if has_dres or x_bias_dtype else {})
        shared = {"BLOCK_N": tile.block_n, "FULL": N % tile.block_n == 0, "CENTER": center}
        flags = {
            "HAS_X_BIAS": x_bias_dtype is not None,
            "HAS_BIAS": has_bias,
            "HAS_DH": dh is not None,
            "HAS_DRES": has_dres,
            "DROPOUT": dropout_p > 0.0,
        }
        side, blocks = programs(h, tile.num_warps), cdiv(N, tile.block_n)
        P = min(cdiv(M, tile.block_m), side if pieces else cdiv(side, blocks))
        part = torch.empty((len(dtypes), P, N), dtype=torch.float32, device=h.device)
        if pieces:
            _bwd_kernel[(P,)](
                *inputs, part, seed, *strides, *numbers, ROWS=tile.block_m, PIECES=pieces,
                **shared, **flags, **options,
            )  # fmt: skip
        else:
            of_rows = torch.empty((M, 2), dtype=torch.float32, device=h.device)
            _bwd_wide_sums_kernel[(M,)](
                *inputs[0:1], *inputs[2:6], of_rows, strides[0], strides[2], N, **shared,
                **tile.options,
            )  # fmt: skip
            _bwd_wide_kernel[(blocks, P)](
                *inputs, part, seed, of_rows, *strides, *numbers, **shared, **flags,
                **tile.options,
            )  # fmt: skip
        sums = column_sum(part, dtypes)
    return dx, dres, *_placed(sums, has_bias)


def _placed(sums: list[Tensor], has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dweight, dbias, dx_bias of those there are, the others empty."""
    dw, *biases = sums
    db = biases.pop(0) if has_bias else dw.new_empty(0)
    return dw, db, biases[0] if biases else dw.new_empty(0)
