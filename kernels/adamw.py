"""AdamW over lists of tensors: gradient norm, clipping and step in at most three kinds of launches.

Loshchilov, Hutter, Decoupled weight decay regularization, ICLR 2019, alg. 2,
https://arxiv.org/abs/1711.05101. With g the gradient times the clipping factor, for step t:

    m += (1 - beta1) (g - m)                     v += (1 - beta2) (g^2 - v)
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

The tensors lie anywhere: a table on the device holds for each its distance from the first of its
kind, in elements, and a list of chunks says which program has which part of which tensor. Tensors
whose addresses and sizes are multiples of 16 elements share a launch whose accesses are 16 bytes
wide; others have one of their own. Three kernels:

    _norm_kernel     a few programs walk over the chunks; each leaves a float32 sum of squares
    _prepare_kernel  one program adds those in order, makes the clipping factor, decides whether
                     the step is skipped, counts it, and writes what is constant over a tensor
    _step_kernel     one chunk a program; p, m and v are read and written once

1 - beta^t is made as -expm1(t ln beta), which is as exact in float32 at t = 1 as later. Stochastic
rounding to bfloat16 adds 16 random bits below the last kept one and cuts: Philox with the seed as
key, and (element, tensor, step) as counter. No atomics, nothing is read back by the host.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.tiles import adamw_tile, cdiv, on_device, programs

# Columns of the table, 8 a tensor: where it is, how long, which group's hyperparameters it has.
_P = tl.constexpr(0)
_G = tl.constexpr(1)
_M = tl.constexpr(2)
_V = tl.constexpr(3)
_LOW = tl.constexpr(4)
_STEP = tl.constexpr(5)
_COUNT = tl.constexpr(6)
_RULE = tl.constexpr(7)
_EVEN = 16  # elements that addresses and sizes are multiples of where accesses are wide


@triton.jit
def _chunk(chunk_ptr, table_ptr, chunk, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """-> the row of the chunk's tensor, its first element there, how many it has."""
    row = tl.load(chunk_ptr + 2 * chunk)
    begin = tl.load(chunk_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    left = tl.load(table_ptr + 8 * row + _COUNT) - begin
    n = tl.minimum(left, CHUNK).to(tl.int32)
    if EVEN > 1:
        n = n // EVEN * EVEN  # it is one: this tells the compiler
    return row, begin, n


@triton.jit
def _at(table_ptr, row, column: tl.constexpr, begin, EVEN: tl.constexpr):
    """Distance of a chunk from the first tensor of its kind."""
    away = tl.load(table_ptr + 8 * row + column)
    if EVEN > 1:
        away = tl.multiple_of(away, EVEN)
    return away + begin


@triton.jit(do_not_specialize=["chunks", "part"])
def _norm_kernel(
    g_ptr, table_ptr, chunk_ptr, part_ptr, chunks, part,
    LANES: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, LANES)
    acc = tl.zeros([LANES], dtype=tl.float32)
    for chunk in tl.range(tl.program_id(0), chunks, tl.num_programs(0)):
        row, begin, n = _chunk(chunk_ptr, table_ptr, chunk, CHUNK, EVEN)
        g_at = g_ptr + _at(table_ptr, row, _G, begin, EVEN)
        for i in tl.range(0, n, LANES):
            g = tl.load(g_at + i + lanes, mask=i + lanes < n, other=0.0).to(tl.float32)
            acc = tl.fma(g, g, acc)
    tl.store(part_ptr + part + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _one_minus_power(t, log_beta):
    """1 - beta^t = -expm1(t ln beta) for beta in [0, 1)."""
    x = t * log_beta
    y = tl.maximum(x, -0.5)
    s = 1.0 + y * (1.0 / 8.0)
    for k in tl.static_range(7, 1, -1):
        s = 1.0 + y * s * (1.0 / k)
    return tl.where(x >= -0.5, -y * s, 1.0 - tl.exp2(x * 1.4426950408889634))


@triton.jit(do_not_specialize=["parts", "tensors"])
def _prepare_kernel(
    part_ptr, step_ptr, table_ptr, hyper_ptr, coef_ptr, control_ptr, scale_ptr, found_ptr,
    parts, tensors, max_norm,
    BLOCK: tl.constexpr, HAS_NORM: tl.constexpr, CLIP: tl.constexpr, SKIP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr,
):  # fmt: skip
    factor = 1.0
    skip = 0.0
    if HAS_SCALE:
        factor = 1.0 / tl.load(scale_ptr).to(tl.float32)
    if HAS_NORM:
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        for start in tl.range(0, parts, BLOCK):
            at = start + tl.arange(0, BLOCK)
            acc += tl.load(part_ptr + at, mask=at < parts, other=0.0)
        norm = tl.sqrt(tl.sum(acc, 0)) * factor
        tl.store(control_ptr + 2, norm)
        if CLIP:
            ratio = max_norm / (norm + 1e-6)
            factor *= tl.where(ratio >= 1.0, 1.0, ratio)  # NaN stays NaN, as in torch
        if SKIP:
            skip = tl.where(norm - norm == 0.0, 0.0, 1.0)
    if HAS_FOUND:
        skip = tl.where(tl.load(found_ptr).to(tl.float32) != 0.0, 1.0, skip)
    tl.store(control_ptr, factor)
    tl.store(control_ptr + 1, skip)
    tl.store(control_ptr + 3, tl.load(control_ptr + 3) + skip)
    for start in tl.range(0, tensors, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < tensors
        step_at = step_ptr + tl.load(table_ptr + 8 * row + _STEP, mask=mask, other=0)
        t = tl.load(step_at, mask=mask, other=0.0) + (1.0 - skip)
        tl.store(step_at, t, mask=mask)
        t = tl.maximum(t, 1.0)  # a first step that is skipped: not used, and no 0 / 0
        rule = hyper_ptr + 8 * tl.load(table_ptr + 8 * row + _RULE, mask=mask, other=0)
        lr = tl.load(rule, mask=mask, other=0.0)
        rest1 = _one_minus_power(t, tl.load(rule + 3, mask=mask, other=-1.0))
        rest2 = _one_minus_power(t, tl.load(rule + 4, mask=mask, other=-1.0))
        coef = coef_ptr + 7 * row
        tl.store(coef, lr / rest1, mask=mask)
        tl.store(coef + 1, 1.0 - lr * tl.load(rule + 6, mask=mask, other=0.0), mask=mask)
        tl.store(coef + 2, tl.load(rule + 1, mask=mask, other=0.0), mask=mask)
        tl.store(coef + 3, tl.load(rule + 2, mask=mask, other=0.0), mask=mask)
        tl.store(coef + 4, tl.rsqrt(rest2), mask=mask)
        tl.store(coef + 5, tl.load(rule + 5, mask=mask, other=0.0), mask=mask)
        tl.store(coef + 6, t, mask=mask)


@triton.jit
def _rounded(x, seed, element, tensor, step):
    """float32 as bfloat16, up or down with the probability that makes it right on average."""
    high = (element >> 32).to(tl.int32) ^ (tensor << 8)
    low = element.to(tl.int32)
    zero = tl.zeros_like(low)
    bits, _, _, _ = tl.philox(seed, low, high, zero + step.to(tl.int32), zero, 7)
    down = (x.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)) & -65536
    cut = down.to(tl.float32, bitcast=True)
    return tl.where(x - x == 0.0, cut, x).to(tl.bfloat16)


@triton.jit
def _step_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, table_ptr, chunk_ptr, coef_ptr, control_ptr, seed_ptr,
    LANES: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, HAS_LOW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    row, begin, n = _chunk(chunk_ptr, table_ptr, tl.program_id(0), CHUNK, EVEN)
    p_at = p_ptr + _at(table_ptr, row, _P, begin, EVEN)
    g_at = g_ptr + _at(table_ptr, row, _G, begin, EVEN)
    m_at = m_ptr + _at(table_ptr, row, _M, begin, EVEN)
    v_at = v_ptr + _at(table_ptr, row, _V, begin, EVEN)
    low_at = low_ptr
    if HAS_LOW:
        low_at += _at(table_ptr, row, _LOW, begin, EVEN)
    coef = coef_ptr + 7 * row
    rate = tl.load(coef)
    decay = tl.load(coef + 1)
    c1 = tl.load(coef + 2)
    c2 = tl.load(coef + 3)
    scale2 = tl.load(coef + 4)
    eps = tl.load(coef + 5)
    step = tl.load(coef + 6)
    factor = tl.load(control_ptr)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    # A step that is skipped has nothing to walk over.
    stop = tl.where(tl.load(control_ptr + 1) == 1.0, 0, n)
    lanes = tl.arange(0, LANES)
    for i in tl.range(0, stop, LANES):
        offs = i + lanes
        mask = offs < n
        g = tl.load(g_at + offs, mask=mask, other=0.0).to(tl.float32) * factor
        p = tl.load(p_at + offs, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_at + offs, mask=mask, other=0.0)
        v = tl.load(v_at + offs, mask=mask, other=0.0)
        m = tl.fma(g - m, c1, m)
        v = tl.fma(tl.fma(g, g, -v), c2, v)
        p = p * decay - rate * (m / tl.fma(tl.sqrt(v), scale2, eps))
        tl.store(m_at + offs, m, mask=mask)
        tl.store(v_at + offs, v, mask=mask)
        if STOCHASTIC:
            tl.store(p_at + offs, _rounded(p, seed, begin + offs, row, step), mask=mask)
        else:
            tl.store(p_at + offs, p.to(p_ptr.dtype.element_ty), mask=mask)
        if HAS_LOW:
            tl.store(low_at + offs, p.to(low_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Share:
    """Tensors of one launch: the row of the first, the chunks, what they are multiples of."""

    first: int
    chunks: Tensor
    even: int


# What a captured CUDA graph reads lives as long as the process: the graph may be replayed.
_captured: list[Tensor] = []


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if not _capturing(device):
        return values.to(device, non_blocking=True)
    pinned = values.pin_memory()
    made = pinned.to(device, non_blocking=True)
    _captured.extend((pinned, made))
    return made


@lru_cache(maxsize=64)
def _chunks(
    rows: tuple[int, ...], counts: tuple[int, ...], chunk: int, device: torch.device
) -> Tensor:
    """(chunks, 2) int32: row of the tensor, number of the chunk in it."""
    many = torch.tensor([cdiv(n, chunk) for n in counts], device="cpu")
    row = torch.repeat_interleave(torch.tensor(rows, device="cpu"), many)
    first = torch.repeat_interleave(many.cumsum(0) - many, many)
    number = torch.arange(len(row), device="cpu") - first
    return _upload(torch.stack([row, number], 1).int(), device)


@lru_cache(maxsize=16)
def _plan(
    addresses: tuple[tuple[int, ...], ...], counts: tuple[int, ...], rules: tuple[int, ...],
    dtypes: tuple[tuple[torch.dtype, ...], ...], chunk: int, device: torch.device,
) -> tuple[Tensor, list[_Share]]:  # fmt: skip
    """The table, (tensors, 8) int64, and the launches; addresses and dtypes are by column."""
    shares: dict[object, list[int]] = {}
    for row, count in enumerate(counts):
        columns = [(a[row], d[row]) for a, d in zip(addresses[:5], dtypes, strict=True) if a]
        even = count % _EVEN == 0 and all(at % (_EVEN * d.itemsize) == 0 for at, d in columns)
        if count:
            shares.setdefault((tuple(d for _, d in columns), even), []).append(row)
    table = torch.zeros(len(counts), 8, dtype=torch.int64, device="cpu")
    for rows in shares.values():
        for column, (a, d) in enumerate(zip(addresses[:5], dtypes, strict=True)):
            if a:
                away = [(a[row] - a[rows[0]]) // d[row].itemsize for row in rows]
                table[rows, column] = torch.tensor(away, device="cpu")
    steps = addresses[5]
    table[:, 5] = torch.tensor([(at - steps[0]) // 4 for at in steps], device="cpu")
    table[:, 6] = torch.tensor(counts, device="cpu")
    table[:, 7] = torch.tensor(rules, device="cpu")
    made = [
        _Share(
            rows[0],
            _chunks(tuple(rows), tuple(counts[r] for r in rows), chunk, device),
            _EVEN if key[1] else 1,  # type: ignore[index]
        )
        for key, rows in shares.items()
    ]
    return _upload(table, device), made


@lru_cache(maxsize=64)
def _hyper(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(groups, 8) float32 of (lr, 1 - beta1, 1 - beta2, ln beta1, ln beta2, eps, weight decay)."""
    lr, beta1, beta2, eps, decay = torch.tensor(
        values, dtype=torch.float64, device="cpu"
    ).view(-1, 5).unbind(1)  # fmt: skip
    columns = [lr, 1 - beta1, 1 - beta2, beta1.log(), beta2.log(), eps, decay, lr * 0]
    return _upload(torch.stack(columns, 1).float(), device)


def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], low: list[Tensor], lrs: list[Tensor], hyper: list[float],
    rules: list[int], control: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    max_grad_norm: float | None, skip_nonfinite: bool, seed: Tensor | None,
) -> None:  # fmt: skip
    """One step, in place. The five tensors of a parameter are dense and of one layout.

    Args:
        low: copies of the parameters in another dtype, or empty.
        lrs: a learning rate for each group, or empty: those in hyper count.
        hyper: 5 a group: lr, beta1, beta2, eps, weight_decay.
        rules: the group of each parameter.
        control: (4,) float32: factor of the gradients, whether the step was skipped, norm of the
            gradients, how many steps were skipped so far; only the last is read.
        seed: of stochastic rounding; None rounds to nearest.
    """
    x = params[0]
    device = torch.device("cpu") if x.is_meta else x.device
    columns = (params, grads, exp_avgs, exp_avg_sqs, low)
    with on_device(x):
        tile = adamw_tile()
        chunk = tile.block_m * tile.block_n
        table, shares = _plan(
            tuple(tuple(t.data_ptr() for t in column) for column in (*columns, steps)),
            tuple(p.numel() for p in params), tuple(rules),
            tuple(tuple(t.dtype for t in column) for column in columns), chunk, device,
        )  # fmt: skip
        numbers = _hyper(tuple(hyper), device)
        if _capturing(device):
            _captured.extend((table, numbers, *(share.chunks for share in shares)))
        if lrs:
            numbers = numbers.clone()
            numbers[:, 0] = torch.stack([lr.reshape(()).float() for lr in lrs])
        coef = torch.empty(len(params), 7, dtype=torch.float32, device=x.device)
        shape = {"LANES": tile.block_n, "CHUNK": chunk}
        has_norm = max_grad_norm is not None or skip_nonfinite
        many = [min(len(s.chunks), programs(x, tile.num_warps)) for s in shares]
        part = torch.empty(max(1, sum(many)) * has_norm, dtype=torch.float32, device=x.device)
        if has_norm:
            if not shares:
                part.zero_()
            for n, (share, P) in enumerate(zip(shares, many, strict=True)):
                _norm_kernel[(P,)](
                    grads[share.first], table, share.chunks, part, len(share.chunks),
                    sum(many[:n]), EVEN=share.even, **shape, **tile.options,
                )  # fmt: skip
        _prepare_kernel[(1,)](
            part, steps[0], table, numbers, coef, control, grad_scale, found_inf, part.numel(),
            len(params), 0.0 if max_grad_norm is None else max_grad_norm,
            BLOCK=adamw_tile(prepare=True).block_n, HAS_NORM=has_norm,
            CLIP=max_grad_norm is not None, SKIP=skip_nonfinite,
            HAS_SCALE=grad_scale is not None, HAS_FOUND=found_inf is not None,
            **adamw_tile(prepare=True).options,
        )  # fmt: skip
        for share in shares:
            at = share.first
            _step_kernel[(len(share.chunks),)](
                params[at], grads[at], exp_avgs[at], exp_avg_sqs[at], low[at] if low else None,
                table, share.chunks, coef, control, seed, EVEN=share.even, HAS_LOW=bool(low),
                STOCHASTIC=seed is not None and params[at].dtype == torch.bfloat16, **shape,
                **tile.options,
            )  # fmt: skip
