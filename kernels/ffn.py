"""The feed-forward of a GPT block, forward and backward: y = act(x w1^T + b1) w2^T + b2.

    pre = x w1^T + b1        act = f(pre)        y = act w2^T + b2
    dact = dy w2             dpre = dact * f'(pre)
    dw2 = dy^T act    db2 = sum(dy)    dw1 = dpre^T x    db1 = sum(dpre)    dx = dpre w1

The product that makes pre adds the bias and applies f as it leaves the registers; the one that
makes dact multiplies by f', makes act again and sums its columns for db1: per block of rows one
float32 partial sum, added by a second kernel, so no atomics. The other products are the vendor's.

    gelu_tanh: f(u) = u S, S = 1/2 (1 + tanh z) = sigmoid(2 z), z = sqrt(2/pi) (u + 0.044715 u^3)
               f'(u) = S + u S (1 - S) 2 z'
    gelu:      f(u) = u P(u), f'(u) = P(u) + u p(u), P and p of the normal distribution
    relu:      f(u) = max(0, u), f'(u) = [u > 0]

Where the vendor's product and a pointwise pass are known to win, they are used: see `fuses`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.column_sum import column_sum
from fastgpt.kernels.tiles import act_tile, ffn_tile, on_device

WIDEST_FUSED = 2048


def fuses(x: Tensor) -> bool:
    """Whether the product over K = x.shape[1] columns is fused with its epilogue.

    A pointwise pass costs 2 TC / (K BW) of the product, TC and BW the chip's matrix rate and
    memory bandwidth: at K = 768 a share of 0.4 to 0.8, at 2048 still 0.15 to 0.3, at 4096 only
    0.07 to 0.14 on A100, H100 and B200 at their peaks. A Triton product reaches 0.8 to 0.95 of
    cuBLAS (Triton tutorial 9 and Gluon tutorials 7, 8), so the fusion pays for K up to about 2048
    and not beyond. In float32 without TF32 a Triton product runs on the plain FMA units at a
    fraction of the vendor's rate: never fused.
    """
    return x.dtype != torch.float32 and x.shape[1] <= WIDEST_FUSED


@triton.jit
def _sigmoid_of_gelu(u):
    """S = sigmoid(2 z) of gelu_tanh, and 2 z'."""
    u2 = u * u
    z2 = u * tl.fma(u2, 0.07135481282553968, 1.5957691216057308)  # 2 sqrt(2/pi) (u + 0.044715 u^3)
    dz2 = tl.fma(u2, 0.21406443847661904, 1.5957691216057308)
    return 1.0 / (1.0 + tl.math.exp2(z2 * -1.4426950408889634)), dz2


@triton.jit
def _act(u, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.maximum(u, 0.0)
    elif ACT == "gelu":
        return u * (0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476))
    else:
        s, _ = _sigmoid_of_gelu(u)
        return u * s


@triton.jit
def _act_and_grad(u, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.maximum(u, 0.0), tl.where(u > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        phi = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476)
        density = tl.math.exp2(u * u * -0.7213475204444817) * 0.3989422804014327
        return u * phi, tl.fma(u, density, phi)
    else:
        s, dz2 = _sigmoid_of_gelu(u)
        act = u * s
        return act, tl.fma(act * (1.0 - s), dz2, s)


@triton.jit
def _product(
    a_ptr, b_ptr, start_m, start_n, stride_a, stride_b, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of the product of a (M, K) and b over K, in float32 [BLOCK_M, BLOCK_N].

    b is (N, K), read transposed, if B_ROWS; else (K, N). Rows beyond the edge read the last one
    again, so that the loop needs no mask. Columns beyond it are masked: clamped, they would no
    longer be known to lie side by side, and be read one by one.
    """
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - start_m)
    offs_n = tl.arange(0, BLOCK_N)
    keep_n = offs_n[None, :] < N - start_n
    a_ptr += start_m.to(tl.int64) * stride_a
    a_offs = offs_m[:, None] * stride_a + offs_k[None, :]
    if B_ROWS:
        b_ptr += start_n.to(tl.int64) * stride_b
        offs_n = tl.minimum(offs_n, N - 1 - start_n)
        b_offs = offs_n[:, None] * stride_b + offs_k[None, :]
    else:
        b_ptr += start_n
        b_offs = offs_k[:, None] * stride_b + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    step_b = BLOCK_K if B_ROWS else BLOCK_K * stride_b
    for i in tl.range(0, K // BLOCK_K):
        a = tl.load(a_ptr + i * BLOCK_K + a_offs)
        at = b_ptr + tl.cast(i, tl.int64) * step_b + b_offs
        if B_ROWS:
            b = tl.trans(tl.load(at))
        else:
            b = tl.load(at, mask=keep_n, other=0.0)
        acc = tl.dot(a, b, acc)
    a_ptr += K // BLOCK_K * BLOCK_K
    b_ptr += tl.cast(K // BLOCK_K, tl.int64) * step_b
    rest = K % BLOCK_K
    if rest > 0:
        a = tl.load(a_ptr + a_offs, mask=offs_k[None, :] < rest, other=0.0)
        if B_ROWS:
            b = tl.trans(tl.load(b_ptr + b_offs, mask=offs_k[None, :] < rest, other=0.0))
        else:
            b = tl.load(b_ptr + b_offs, mask=(offs_k[:, None] < rest) & keep_n, other=0.0)
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile of this program: GROUP rows of tiles together, so that they share columns in L2."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * blocks_n) * GROUP
    width = tl.minimum(GROUP, blocks_m - first)
    within = pid % (GROUP * blocks_n)
    return first + within % width, within // width


@triton.jit(do_not_specialize=["M"])
def _up_kernel(
    x_ptr, w_ptr, b_ptr, pre_ptr, act_ptr, stride_x, stride_w, M, N, K,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pre = _product(
        x_ptr, w_ptr, block_m * BLOCK_M, block_n * BLOCK_N, stride_x, stride_w, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, True,
    )  # fmt: skip
    if HAS_BIAS:
        pre += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    pre = pre.to(act_ptr.dtype.element_ty)  # backward makes act again from the rounded pre
    if SAVE_PRE:
        tl.store(pre_ptr + at, pre, mask=mask)
    act = _act(pre.to(tl.float32), ACT)
    tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _dact_kernel(
    dy_ptr, w_ptr, pre_ptr, dpre_ptr, act_ptr, part_ptr, stride_dy, stride_w, M, N, K,
    ACT: tl.constexpr, SAVE_ACT: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dact = _product(
        dy_ptr, w_ptr, block_m * BLOCK_M, block_n * BLOCK_N, stride_dy, stride_w, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, False,
    )  # fmt: skip
    # One half of the columns at a time: all of them at once do not fit in registers.
    halves = dact.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        cols = block_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        act, grad = _act_and_grad(tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32), ACT)
        if SAVE_ACT:
            tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=mask)
        dpre = tl.where(mask, halves[half] * grad, 0.0)
        tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if SUM:
            tl.store(part_ptr + block_m.to(tl.int64) * N + cols, tl.sum(dpre, 0), mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _act_kernel(
    pre_ptr, act_ptr, M, N, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """act = f(pre), where the vendor made pre with its bias; in place if the pointers are equal."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    act = _act(tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32), ACT)
    tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_each"])
def _act_grad_kernel(
    dact_ptr, pre_ptr, act_ptr, part_ptr, M, N, rows_each,
    ACT: tl.constexpr, SAVE_ACT: tl.constexpr, SUM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dact becomes dpre in place; act is made again; columns of dpre are summed per program."""
    first = tl.program_id(0) * rows_each
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(first, tl.minimum(first + rows_each, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        act, grad = _act_and_grad(tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32), ACT)
        if SAVE_ACT:
            tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=mask)
        dpre = tl.load(dact_ptr + at, mask=mask, other=0.0).to(tl.float32) * grad
        tl.store(dact_ptr + at, dpre.to(dact_ptr.dtype.element_ty), mask=mask)
        total += dpre
    if SUM:
        part = part_ptr + tl.program_id(0).to(tl.int64) * N
        tl.store(part + cols, tl.sum(total, 0), mask=cols < N)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _up_fused(
    x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """-> pre (anything unless to be saved), act, from one product."""
    x, w1 = _rows(x), _rows(w1)
    (M, K), N = x.shape, w1.shape[0]
    act = torch.empty((M, N), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(act) if save_pre else act
    tile = ffn_tile()
    _up_kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
        x, w1, None if b1 is None else b1.contiguous(), pre, act, x.stride(0), w1.stride(0), M, N,
        K, ACT=activation, HAS_BIAS=b1 is not None, SAVE_PRE=save_pre, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=8, **tile.options,
    )  # fmt: skip
    return pre, act


def _up_vendor(
    x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """The same by the vendor's product and a pointwise pass, in place unless pre is saved."""
    pre = F.linear(x, w1, b1)
    act = torch.empty_like(pre) if save_pre else pre
    M, N = pre.shape
    tile = act_tile()
    if M > 0:
        _act_kernel[(triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n))](
            pre, act, M, N, ACT=activation, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            **tile.options,
        )  # fmt: skip
    return pre, act


def _dact_fused(
    dy: Tensor, w2: Tensor, pre: Tensor, act: Tensor, activation: str, save_act: bool, sum_: bool
) -> tuple[Tensor, Tensor]:
    """-> dpre, partial sums of its columns (1, P, F); act is filled if save_act."""
    dy, w2 = _rows(dy), _rows(w2)
    (M, K), N = dy.shape, w2.shape[1]
    dpre = torch.empty_like(pre)
    tile = ffn_tile()
    blocks_m = triton.cdiv(M, tile.block_m)
    part = torch.empty((1, blocks_m, N), dtype=torch.float32, device=dy.device)
    _dact_kernel[(blocks_m * triton.cdiv(N, tile.block_n),)](
        dy, w2, pre, dpre, act, part, dy.stride(0), w2.stride(0), M, N, K, ACT=activation,
        SAVE_ACT=save_act, SUM=sum_, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUP=8, **tile.options,
    )  # fmt: skip
    return dpre, part


def _dact_vendor(
    dy: Tensor, w2: Tensor, pre: Tensor, act: Tensor, activation: str, save_act: bool, sum_: bool
) -> tuple[Tensor, Tensor]:
    """The same by the vendor's product and a pass over it in place."""
    dpre = dy @ w2
    M, N = dpre.shape
    tile = act_tile()
    each = tile.block_m * max(1, triton.cdiv(M, 64 * tile.block_m))  # rows of a program
    groups = triton.cdiv(M, each)
    part = torch.zeros((1, max(1, groups), N), dtype=torch.float32, device=dy.device)
    if M > 0:
        _act_grad_kernel[(groups, triton.cdiv(N, tile.block_n))](
            dpre, pre, act, part, M, N, each, ACT=activation, SAVE_ACT=save_act, SUM=sum_,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return dpre, part


def ffn_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str,
    save_pre: bool, save_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x: (M, C), w1: (F, C), w2: (C2, F) -> y: (M, C2), pre and act: (M, F) or empty."""
    up = _up_fused if len(x) > 0 and fuses(x) else _up_vendor
    with on_device(x):
        pre, act = up(x, w1, b1, activation, save_pre)
    y = F.linear(act, w2, b2)
    empty = (0,)
    return y, pre if save_pre else x.new_empty(empty), act if save_act else x.new_empty(empty)


def ffn_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, act: Tensor, activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dy: (M, C2), pre: (M, F), act: (M, F) or empty -> dx, dw1, db1, dw2, db2, each if needed."""
    dx, dw1, db1, dw2, db2 = (x.new_empty(0) for _ in range(5))
    save_act = needs[3] and act.numel() == 0
    act = torch.empty_like(pre) if save_act else act
    dact = _dact_fused if len(dy) > 0 and fuses(dy) else _dact_vendor
    with on_device(x):
        dpre, part = dact(dy, w2, pre, act, activation, save_act, needs[2])
    if needs[0]:
        dx = dpre @ w1
    if needs[1]:
        dw1 = dpre.T @ x
    if needs[2]:
        db1 = column_sum(part, w1.dtype)[0]
    if needs[3]:
        dw2 = dy.T @ act
    if needs[4]:
        db2 = dy.sum(0)
    return dx, dw1, db1, dw2, db2
