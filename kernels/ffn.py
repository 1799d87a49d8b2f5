"""The feed-forward of a transformer block, forward and backward: y = h w2^T + b2.

    plain:  u = x w1^T + b1                                h = f(u)
    gated:  u = x w_gate^T + b_gate,  z = x w1^T + b1      h = f(u) z

    dh = dy w2        du = dh f'(u)  or  dh z f'(u)        dz = dh f(u)
    dw2 = dy^T h   db2 = sum(dy)   dw = du^T x   db = sum(du)   dx = du w   (+ the same of dz)

One kernel makes u, and z beside it from the same tiles of x, adds the biases and applies f as they
leave the registers. The one that makes dh multiplies by f', makes h again and sums the columns of
du and dz: per block of rows one float32 partial sum, added by a second kernel, so no atomics. The
other products are the vendor's. u and z lie in one tensor, pre: (1 or 2, M, F), and so do du, dz.

    gelu_tanh: f(u) = u S, S = 1/2 (1 + tanh t) = sigmoid(2 t), t = sqrt(2/pi) (u + 0.044715 u^3)
               f'(u) = S + u S (1 - S) 2 t'
    gelu:      f(u) = u P(u), f'(u) = P(u) + u p(u), P and p of the normal distribution
    silu:      f(u) = u S, S = sigmoid(u), f'(u) = S + u S (1 - S)
    relu:      f(u) = max(0, u), f'(u) = [u > 0]

Where the vendor's product and a pointwise pass are known to win, they are used: see `fuses`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.column_sum import column_sum
from fastgpt.kernels.product import how_to_load, operands, place, product
from fastgpt.kernels.tiles import (
    act_tile,
    cdiv,
    ffn_parts,
    ffn_tile,
    has_ptx,
    interpreting,
    on_device,
)

WIDEST_FUSED = 2048


def fuses(x: Tensor) -> bool:
    """Whether the product over K = x.shape[1] columns is fused with its epilogue.

    A pointwise pass costs 2 TC / (K BW) of the product, TC and BW the chip's matrix rate and
    memory bandwidth: at K = 768 a share of 0.4 to 0.8, at 2048 still 0.15 to 0.3, at 4096 only
    0.07 to 0.14 on A100, H100 and B200 at their peaks. A Triton product reaches 0.8 to 0.95 of
    cuBLAS (Triton tutorial 9 and Gluon tutorials 7, 8), so the fusion pays for K up to about 2048
    and not beyond. In float32 without TF32 a Triton product runs on the plain FMA units at a
    fraction of the vendor's rate: never fused. Rows that are no multiple of 16 bytes are read by
    single elements, past the copies that run beside the products, into registers that are not
    there: left to the vendor too.
    """
    whole = x.shape[1] * x.element_size() % 16 == 0 or interpreting()
    return x.dtype != torch.float32 and x.shape[1] <= WIDEST_FUSED and whole


if interpreting():

    @triton.jit
    def _sigmoid(t, PTX: tl.constexpr):
        """1 / (1 + 2^t)."""
        return 1.0 / (1.0 + tl.math.exp2(t))

else:

    @triton.jit
    def _sigmoid(t, PTX: tl.constexpr):
        """1 / (1 + 2^t). NVIDIA's own instructions err by about 2^-22 of the value (PTX ISA, ex2
        and rcp); guarded for denormal numbers, as Triton writes them, they are some more."""
        if PTX:
            e = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
            )
            return tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True,
                pack=1,
            )  # fmt: skip
        else:
            return 1.0 / (1.0 + tl.math.exp2(t))


@triton.jit
def _sigmoid_of(u, ACT: tl.constexpr, PTX: tl.constexpr):
    """S of f(u) = u S, and the derivative of what the sigmoid is taken of."""
    if ACT == "silu":
        return _sigmoid(u * -1.4426950408889634, PTX), 1.0
    else:
        u2 = u * u
        minus_t2 = u * tl.fma(u2, -0.1029432346069663, -2.302208198144325)  # -2 t log2(e)
        dt2 = tl.fma(u2, 0.21406443847661904, 1.5957691216057308)  # 2 t'
        return _sigmoid(minus_t2, PTX), dt2


@triton.jit
def _act(u, ACT: tl.constexpr, PTX: tl.constexpr):
    if ACT == "relu":
        return tl.where(u < 0.0, 0.0, u)  # not the maximum, which drops NaN
    elif ACT == "gelu":
        return u * (0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476))
    else:
        s, _ = _sigmoid_of(u, ACT, PTX)
        return u * s


@triton.jit
def _act_and_grad(u, ACT: tl.constexpr, PTX: tl.constexpr):
    if ACT == "relu":
        return tl.where(u < 0.0, 0.0, u), tl.where(u <= 0.0, 0.0, 1.0)
    elif ACT == "gelu":
        phi = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476)
        density = tl.math.exp2(u * u * -0.7213475204444817) * 0.3989422804014327
        return u * phi, tl.fma(u, density, phi)
    else:
        s, dt = _sigmoid_of(u, ACT, PTX)
        act = u * s
        return act, tl.fma(act * (1.0 - s), dt, s)


@triton.jit
def _with_bias(u, b_ptr, cols, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        u += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def _halves(t):
    return t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _parts(t, PARTS: tl.constexpr):
    """The columns of t in 2, 4 or 8 parts."""
    a, b = _halves(t)
    if PARTS == 2:
        return a, b
    else:
        a, b = _halves(a), _halves(b)
        if PARTS == 4:
            return a[0], a[1], b[0], b[1]
        else:
            return _halves(a[0]) + _halves(a[1]) + _halves(b[0]) + _halves(b[1])


@triton.jit(do_not_specialize=["M"])
def _up_kernel(
    x, w, v, b_ptr, c_ptr, pre_ptr, h_ptr, stride_x, stride_w, stride_v, M, N, K,
    ACT: tl.constexpr, PTX: tl.constexpr, GATED: tl.constexpr, HAS_B: tl.constexpr,
    HAS_C: tl.constexpr, SAVE_PRE: tl.constexpr, W_ROWS: tl.constexpr, LOADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """u = x w^T + b; if GATED z = x v^T + c; h = f(u) or f(u) z. x, w and v: see `product`."""
    block_m, block_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    u, z = product(
        x, w, v, block_m * BLOCK_M, block_n * BLOCK_N, stride_x, stride_w, stride_v, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, GATED, LOADS,
    )  # fmt: skip
    us, zs = _parts(u, PARTS), _parts(z, PARTS)
    for part in tl.static_range(PARTS):
        cols = block_n * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        # Rounded, because backward makes h again from what is saved.
        u = _with_bias(us[part], b_ptr, cols, N, HAS_B).to(h_ptr.dtype.element_ty)
        if SAVE_PRE:
            tl.store(pre_ptr + at, u, mask=mask)
        h = _act(u.to(tl.float32), ACT, PTX)
        if GATED:
            z = _with_bias(zs[part], c_ptr, cols, N, HAS_C).to(h_ptr.dtype.element_ty)
            if SAVE_PRE:
                tl.store(pre_ptr + M.to(tl.int64) * N + at, z, mask=mask)
            h *= z.to(tl.float32)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _through(
    dh, pre_ptr, dpre_ptr, h_ptr, at, mask, size,
    ACT: tl.constexpr, PTX: tl.constexpr, GATED: tl.constexpr, SAVE_H: tl.constexpr,
):  # fmt: skip
    """Stores du, and dz if GATED, a tensor's size further on, and h if SAVE_H; -> du, dz."""
    u = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h, grad = _act_and_grad(u, ACT, PTX)
    dz = dh * h
    if GATED:
        z = tl.load(pre_ptr + size + at, mask=mask, other=0.0).to(tl.float32)
        dh *= z
        h *= z
        dz = tl.where(mask, dz, 0.0)
        tl.store(dpre_ptr + size + at, dz.to(dpre_ptr.dtype.element_ty), mask=mask)
    du = tl.where(mask, dh * grad, 0.0)
    tl.store(dpre_ptr + at, du.to(dpre_ptr.dtype.element_ty), mask=mask)
    if SAVE_H:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)
    return du, dz


@triton.jit(do_not_specialize=["M"])
def _dh_kernel(
    dy, w, pre_ptr, dpre_ptr, h_ptr, part_ptr, stride_dy, stride_w, M, N, K,
    ACT: tl.constexpr, PTX: tl.constexpr, GATED: tl.constexpr, SAVE_H: tl.constexpr,
    SUM: tl.constexpr, W_ROWS: tl.constexpr, LOADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block_m, block_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dh, _ = product(
        dy, w, w, block_m * BLOCK_M, block_n * BLOCK_N, stride_dy, stride_w, stride_w, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, W_ROWS, False, LOADS,
    )  # fmt: skip
    size = M.to(tl.int64) * N
    part_ptr += block_m.to(tl.int64) * N
    parts = _parts(dh, PARTS)
    for part in tl.static_range(PARTS):
        cols = block_n * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        du, dz = _through(
            parts[part], pre_ptr, dpre_ptr, h_ptr, at, mask, size, ACT, PTX, GATED, SAVE_H
        )
        if SUM:
            tl.store(part_ptr + cols, tl.sum(du, 0), mask=cols < N)
            if GATED:
                second = part_ptr + tl.cdiv(M, BLOCK_M).to(tl.int64) * N
                tl.store(second + cols, tl.sum(dz, 0), mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _act_kernel(
    pre_ptr, h_ptr, M, N, ACT: tl.constexpr, PTX: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h of what the vendor made with its biases; in place of u if the pointers are equal."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    h = _act(tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32), ACT, PTX)
    if GATED:
        h *= tl.load(pre_ptr + M.to(tl.int64) * N + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_each"])
def _act_grad_kernel(
    dpre_ptr, pre_ptr, h_ptr, part_ptr, M, N, rows_each,
    ACT: tl.constexpr, PTX: tl.constexpr, GATED: tl.constexpr, SAVE_H: tl.constexpr,
    SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh, where du is to be, becomes du in place; the columns are summed per program."""
    first = tl.program_id(0) * rows_each
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    total_z = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    size = M.to(tl.int64) * N
    for start in tl.range(first, tl.minimum(first + rows_each, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        dh = tl.load(dpre_ptr + at, mask=mask, other=0.0).to(tl.float32)
        du, dz = _through(dh, pre_ptr, dpre_ptr, h_ptr, at, mask, size, ACT, PTX, GATED, SAVE_H)
        total += du
        if GATED:
            total_z += dz
    if SUM:
        part = part_ptr + tl.program_id(0).to(tl.int64) * N
        tl.store(part + cols, tl.sum(total, 0), mask=cols < N)
        if GATED:
            part += tl.num_programs(0).to(tl.int64) * N
            tl.store(part + cols, tl.sum(total_z, 0), mask=cols < N)


def _rows(t: Tensor) -> Tensor:
    """With columns side by side, and rows so near that 32 bits count the elements of a tile."""
    return t if t.stride(1) == 1 and t.stride(0) < 1 << 22 else t.contiguous()


def _transposed(w: Tensor) -> bool:
    """Whether it lies in memory as its transpose, (in, out), as Hugging Face's GPT-2 keeps it."""
    return w.stride(0) == 1 and w.stride(1) != 1


def _grad(w: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """d^T x, in memory as w is: else whoever adds it to w's gradient would copy it first."""
    return (x.T @ d).T if _transposed(w) else d.T @ x


Weights = tuple[Tensor, ...]  # w1, or w_gate and w1: the one that f is applied to comes first
Biases = tuple[Tensor | None, ...]


def _up_fused(
    x: Tensor, ws: Weights, bs: Biases, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """-> pre (anything unless to be saved), h, from one pass over x."""
    (M, K), N = x.shape, len(ws[0])
    w_rows = len(ws) == 2 or not _transposed(ws[0])
    x, ws = _rows(x), tuple(_rows(w if w_rows else w.T) for w in ws)
    bs = tuple(None if b is None else b.contiguous() for b in bs)
    h = torch.empty((M, N), dtype=x.dtype, device=x.device)
    pre = torch.empty((len(ws), M, N), dtype=x.dtype, device=x.device) if save_pre else h
    how = how_to_load(x, *ws)
    tile = ffn_tile("up", len(ws) == 2, how)
    x_, *ws_ = operands(how, tile, x, *ws, b_rows=w_rows)
    _up_kernel[(cdiv(M, tile.block_m) * cdiv(N, tile.block_n),)](
        x_, ws_[0], ws_[-1], bs[0], bs[-1], pre, h, x.stride(0), ws[0].stride(0),
        ws[-1].stride(0), M, N, K, ACT=activation, PTX=has_ptx(),
        GATED=len(ws) == 2, HAS_B=bs[0] is not None, HAS_C=bs[-1] is not None, SAVE_PRE=save_pre,
        W_ROWS=w_rows, LOADS=how, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUP=8, PARTS=ffn_parts(tile, len(ws) == 2), **tile.options,
    )  # fmt: skip
    return pre, h


def _up_vendor(
    x: Tensor, ws: Weights, bs: Biases, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """The same by the vendor's products and a pointwise pass, in place unless pre is saved."""
    M, N = len(x), len(ws[0])
    pre = torch.empty((len(ws), M, N), dtype=x.dtype, device=x.device)
    for u, w, b in zip(pre, ws, bs, strict=True):
        if b is None:
            torch.mm(x, w.T, out=u)
        else:
            torch.addmm(b, x, w.T, out=u)
    h = torch.empty_like(pre[0]) if save_pre else pre[0]
    tile = act_tile()
    if M > 0:
        _act_kernel[(cdiv(M, tile.block_m), cdiv(N, tile.block_n))](
            pre, h, M, N, ACT=activation, PTX=has_ptx(), GATED=len(ws) == 2,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return pre, h


def _dh_fused(
    dy: Tensor, w2: Tensor, pre: Tensor, h: Tensor, activation: str, save_h: bool, sum_: bool
) -> tuple[Tensor, Tensor]:
    """-> dpre like pre, partial sums of its columns (1 or 2, P, F); h is filled if save_h."""
    (M, K), N = dy.shape, w2.shape[1]
    w_rows = _transposed(w2)
    dy, w2 = _rows(dy), _rows(w2.T if w_rows else w2)
    dpre = torch.empty_like(pre)
    how = how_to_load(dy, w2)
    tile = ffn_tile("dh", len(pre) == 2, how)
    blocks_m = cdiv(M, tile.block_m)
    part = torch.empty((len(pre), blocks_m, N), dtype=torch.float32, device=dy.device)
    _dh_kernel[(blocks_m * cdiv(N, tile.block_n),)](
        *operands(how, tile, dy, w2, b_rows=w_rows), pre, dpre, h, part, dy.stride(0), w2.stride(0),
        M, N, K, ACT=activation, PTX=has_ptx(), GATED=len(pre) == 2, SAVE_H=save_h,
        SUM=sum_, W_ROWS=w_rows, LOADS=how, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUP=8, PARTS=ffn_parts(tile, len(pre) == 2), **tile.options,
    )  # fmt: skip
    return dpre, part


def _dh_vendor(
    dy: Tensor, w2: Tensor, pre: Tensor, h: Tensor, activation: str, save_h: bool, sum_: bool
) -> tuple[Tensor, Tensor]:
    """The same by the vendor's product and a pass over it in place."""
    _, M, N = pre.shape
    dpre = torch.empty_like(pre)
    torch.mm(dy, w2, out=dpre[0])
    tile = act_tile(len(pre) == 2)
    each = tile.block_m * max(1, cdiv(M, 64 * tile.block_m))  # rows of a program
    groups = cdiv(M, each)
    part = torch.zeros((len(pre), max(1, groups), N), dtype=torch.float32, device=dy.device)
    if M > 0:
        _act_grad_kernel[(groups, cdiv(N, tile.block_n))](
            dpre, pre, h, part, M, N, each, ACT=activation, PTX=has_ptx(),
            GATED=len(pre) == 2, SAVE_H=save_h, SUM=sum_, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return dpre, part


def _first(
    w1: Tensor, b1: Tensor | None, w_gate: Tensor | None, b_gate: Tensor | None
) -> tuple[Weights, Biases]:
    return ((w1,), (b1,)) if w_gate is None else ((w_gate, w1), (b_gate, b1))


def _up(
    x: Tensor, ws: Weights, bs: Biases, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    with on_device(x):
        return (_up_fused if len(x) > 0 and fuses(x) else _up_vendor)(
            x, ws, bs, activation, save_pre
        )


def ffn_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, activation: str, save_pre: bool, save_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x: (M, C), w1 and w_gate: (F, C), w2: (C2, F) -> y: (M, C2), pre: (1 or 2, M, F) or empty,
    h: (M, F) or empty."""
    pre, h = _up(x, *_first(w1, b1, w_gate, b_gate), activation, save_pre)
    y = F.linear(h, w2, b2)
    empty = (0,)
    return y, pre if save_pre else x.new_empty(empty), h if save_h else x.new_empty(empty)


def ffn_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, w_gate: Tensor | None,
    b_gate: Tensor | None, pre: Tensor, h: Tensor, activation: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """dy: (M, C2), pre and h as forward gives them -> dx, dw1, db1, dw2, db2, dw_gate, db_gate,
    each if needed."""
    dx, dw1, db1, dw2, db2, dw_gate, db_gate = (x.new_empty(0) for _ in range(7))
    ws, bs = _first(w1, b1, w_gate, b_gate)
    if pre.numel() == 0:
        pre, h = _up(x, ws, bs, activation, True)
    save_h = needs[3] and h.numel() == 0
    h = torch.empty_like(pre[0]) if save_h else h
    dh = _dh_fused if len(dy) > 0 and fuses(dy) else _dh_vendor
    with on_device(x):
        dpre, part = dh(dy, w2, pre, h, activation, save_h, needs[2] or needs[6])
    if needs[0]:
        dx = dpre[0] @ ws[0]
        if w_gate is not None:
            dx = torch.addmm(dx, dpre[1], w1)
    if needs[1]:
        dw1 = _grad(w1, dpre[-1], x)
    if needs[5] and w_gate is not None:
        dw_gate = _grad(w_gate, dpre[0], x)
    if needs[2] or needs[6]:
        sums = column_sum(part, [w1.dtype] * len(part))
        db1 = sums[-1] if needs[2] else db1
        db_gate = sums[0] if needs[6] else db_gate
    if needs[3]:
        dw2 = _grad(w2, dy, h)
    if needs[4]:
        db2 = dy.sum(0)
    return dx, dw1, db1, dw2, db2, dw_gate, db_gate
