"""Cross-entropy of a linear layer in chunks of rows: specification, ops, gradient, function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.cross_entropy import (
    How,
    check_how,
    check_range,
    cross_entropy_ref,
    reduce,
)
from fastgpt.ops.library import define, fake, flops, impl
from fastgpt.ops.vocabulary import head

# Bytes of logits that may exist at a time. The cost of a small chunk is that dweight, in float32,
# is read and written for each: with n rows a share of 4 R / (3 n) of the three products' time, R
# the chip's ratio of matrix rate to memory bandwidth (about 300 FLOP a byte): 10 % at 4096 rows.
GPU_BUDGET = 2**29


def chunk_rows(M: int, V: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk: chunks of one size, as few as keep V logits a row within the budget.

    With GPT-2's vocabulary in 16 bits the budget of a GPU is 5336 rows, and 8192 or 16384 rows go
    in chunks of 4096. The rule of next_power_of_2(M / ceil(V / C)) rows, by which the logits take
    no more than x, would come to 256 rows and rewrite dweight 64 times.
    """
    most = max(1, budget // (V * itemsize))
    count = max(1, -(-M // most))
    return max(1, -(-M // count))


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The specification of `linear_cross_entropy`, which makes all logits at once."""
    return cross_entropy_ref(
        F.linear(x, weight, bias), target, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
    )  # fmt: skip


forward_op = define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap, ScalarType dtype,"
    " int? chunk, bool[] needs, bool kernel, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
backward_op = define(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor stats, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " ScalarType dtype, int? chunk, bool[] needs, bool kernel) -> (Tensor, Tensor, Tensor)"
)


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """For the kernels: all in the dtype of the products, and the rows of a chunk."""
    rows = chunk_rows(len(x), len(weight), dtype.itemsize, GPU_BUDGET)
    bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), weight.to(dtype), bias, chunk or rows


@impl("linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype, chunk: int | None,
    needs: list[bool], kernel: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, C), in products of dtype -> losses (M,), stats (2, M) unless gradients are needed, and
    the gradients of the sum of losses, times scale: dx (M, C), dw (V, C), db (V,), all in float32.
    """
    how = (ignore_index, label_smoothing, z_loss, softcap)
    with backend.without_autocast(x):
        if not (kernel and backend.runs_kernel(x)):
            return head(x.to(dtype), weight, bias, target, how, chunk, needs, scale=scale)
        from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy_fwd

        x, weight, bias, rows = _prepared(x, weight, bias, dtype, chunk)
        made = linear_cross_entropy_fwd(x, weight, bias, target, how, rows, needs)
        if scale is not None:
            for grad in made[2:]:
                grad.mul_(scale)
        return made


@fake("linear_cross_entropy_fwd")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype, chunk: int | None,
    needs: list[bool], kernel: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    M, wide = x.shape[0], torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(M, dtype=wide),
        x.new_empty((2, 0 if any(needs) else M), dtype=wide),
        x.new_empty(x.shape if needs[0] else 0, dtype=wide),
        x.new_empty(weight.shape if needs[1] else 0, dtype=wide),
        x.new_empty(weight.shape[0] if needs[2] else 0, dtype=wide),
    )


@impl("linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, stats: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype,
    chunk: int | None, needs: list[bool], kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients for a dloss (M,) of each row, from logits made again."""
    how = (ignore_index, label_smoothing, z_loss, softcap)
    with backend.without_autocast(x):
        if not (kernel and backend.runs_kernel(x)):
            return head(x.to(dtype), weight, bias, target, how, chunk, needs, dloss, stats)[2:]
        from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy_bwd

        x, weight, bias, rows = _prepared(x, weight, bias, dtype, chunk)
        return linear_cross_entropy_bwd(dloss, x, weight, bias, target, stats, how, rows, needs)


@fake("linear_cross_entropy_bwd")
def _(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, stats: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype,
    chunk: int | None, needs: list[bool], kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(x.shape if needs[0] else 0, dtype=wide),
        x.new_empty(weight.shape if needs[1] else 0, dtype=wide),
        x.new_empty(weight.shape[0] if needs[2] else 0, dtype=wide),
    )


@flops("linear_cross_entropy_fwd")
def _(
    x: Any, weight: Any, bias: Any, target: Any, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, dtype: Any, chunk: Any, needs: list[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return int(2 * x[0] * weight[0] * weight[1] * (1 + needs[0] + needs[1]))


@flops("linear_cross_entropy_bwd")
def _(
    dloss: Any, x: Any, weight: Any, bias: Any, target: Any, stats: Any, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, dtype: Any, chunk: Any,
    needs: list[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return int(2 * x[0] * weight[0] * weight[1] * (1 + needs[0] + needs[1]))


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(x (M, C), weight (V, C), bias (V,), target (M,), ...) -> the scalar, or losses (M,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: How,
        reduction: str, dtype: torch.dtype, chunk: int | None, kernel: bool,
    ) -> Tensor:  # fmt: skip
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        now = needs if reduction != "none" else [False] * 3
        # A kernel's gradients meet 1 / count in backward, with dloss; here that would be a pass.
        ctx.scaled = reduction == "mean" and not kernel
        wide = torch.promote_types(dtype, torch.float32)
        scale = _one_over_count(target, how[0], wide) if ctx.scaled else None
        losses, stats, dx, dw, db = forward_op(
            x, weight, bias, target, *how, dtype, chunk, now, kernel, scale
        )
        ctx.save_for_backward(x, weight, bias, target, stats, dx, dw, db)
        ctx.how, ctx.reduction, ctx.needs = how, reduction, needs
        ctx.rest = (dtype, chunk, needs, kernel)
        return reduce(losses, target, how[0], reduction)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, target, stats, *grads = ctx.saved_tensors
        grads = _grads(ctx, dloss, x, weight, bias, target, stats, grads)
        return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *[None] * 6


def _grads(
    ctx: Any, dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    stats: Tensor, made: list[Tensor],
) -> Any:  # fmt: skip
    ignore_index, label_smoothing, z_loss, softcap = ctx.how
    if backend.double_backward():
        dtype = ctx.rest[0]

        def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = None if bias is None else bias.to(dtype)
            return linear_cross_entropy_ref(
                x.to(dtype), weight.to(dtype), target, bias=bias,
                ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                softcap=softcap, reduction=ctx.reduction,
            )  # fmt: skip

        return backend.differentiable_grads(again, (x, weight, bias), tuple(ctx.needs), (dloss,))
    if ctx.reduction == "none":
        made = backward_op(dloss, x, weight, bias, target, stats, *ctx.how, *ctx.rest)
    else:
        scale = dloss
        if ctx.reduction == "mean" and not ctx.scaled:
            scale = dloss * _one_over_count(target, ignore_index, dloss.dtype)
        if ctx.rest[-1] or not _is_one(scale):  # a kernel's host does not wait for the value
            made = [g * scale.view([1] * g.ndim) for g in made]
    dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return [g.to(dtype) for g, dtype in zip(made, dtypes, strict=True)]


def _one_over_count(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """1 / how many targets count; 0 where none does, for none has a gradient."""
    count = (target != ignore_index).sum()
    return torch.where(count > 0, count.to(dtype).reciprocal(), 0.0)


def _is_one(scale: Tensor) -> bool:
    """Whether a scale is known to be 1, and can be left out."""
    if torch.compiler.is_compiling() or type(scale) is not Tensor or scale.device.type != "cpu":
        return False
    return float(scale) == 1.0


def _check(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, chunk: int | None
) -> None:
    op = "linear_cross_entropy"
    got = f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}"
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(f"{op}: x must be (..., C) and weight (V, C), V and C at least 1; {got}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"{op}: target must be (...) for x (..., C); {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({len(weight)},); got {tuple(bias.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk must be None or at least 1; got {chunk}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating dtype; got {t.dtype}")
        if t is not None and t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{op}: x, weight and bias must have one dtype; got x {x.dtype}, {name} {t.dtype}"
            )
    for name, t in (("weight", weight), ("bias", bias), ("target", target)):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: all tensors must be on one device; got x {x.device}, {name} {t.device}"
            )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """The loss of a language model's head: `cross_entropy` of x weight^T + bias, of whose logits
    only a chunk of rows exists at a time.

    Of N rows, C columns and V logits, in products of e bytes (those of autocast's dtype under
    autocast) and P = 64 ceil(V / 64). "mean" and "sum" make their gradients in forward, at a peak
    of chunk P e bytes of logits, and keep until backward x, weight, dx and dweight: 4 C (N + V)
    bytes of their own. "none" keeps x, weight and 8 N bytes, and makes the logits again in
    backward: a fourth matrix product to the three. Gradients are float32 until the incoming one
    has scaled them. Losses do not depend on the chunk, bit for bit, as far as the vendor's
    products do not.

    Args:
        x: (..., C) in float32, float16 or bfloat16.
        weight: (V, C), bias: (V,) or None: as nn.Linear keeps them, of x's dtype.
        target: (...) int64 or int32, each in [0, V) or ignore_index. On a GPU the loss of a row
            whose target is neither is NaN, and so are the gradients that it is part of.
        ignore_index, label_smoothing, z_loss, softcap, reduction: see `cross_entropy`.
        chunk: rows of logits that may exist at a time; by default as many as 512 MiB hold on a
            GPU, in chunks of one size, and 1024 on a CPU.

    Returns:
        The loss, a scalar or (...), in float32 (float64 of float64).

    Raises:
        ValueError: shapes or devices do not fit, an option is out of range, or, on a CPU, a target.
        TypeError: dtypes differ (outside autocast) or are not floating, or targets no int64 or
            int32.

    Wijmans et al., 2024, https://arxiv.org/abs/2411.09009 (the memory of the logits); Hsu et al.,
    Liger Kernel, 2024, https://arxiv.org/abs/2410.10989 (chunks and gradients in forward).
    """
    op = "linear_cross_entropy"
    _check(x, weight, target, bias, chunk)
    check_how(op, target, label_smoothing, z_loss, softcap, reduction)
    check_range(op, target, len(weight), ignore_index)
    kernel = backend.kernel_chosen(op, x)
    if backend.transformed():
        return linear_cross_entropy_ref(
            x, weight, target, bias=bias, ignore_index=ignore_index, z_loss=z_loss,
            label_smoothing=label_smoothing, softcap=softcap, reduction=reduction,
        )  # fmt: skip
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype in backend.KERNEL_DTYPES:
        dtype = torch.get_autocast_dtype(x.device.type)
    how = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        loss = LinearCrossEntropyFunction.apply(
            *backend.traceable(rows, weight, bias, flat), how, reduction, dtype, chunk, kernel
        )
    else:
        none = [False] * 3
        losses = forward_op(rows, weight, bias, flat, *how, dtype, chunk, none, kernel, None)[0]
        loss = reduce(losses, flat, ignore_index, reduction)
    return loss.view(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]
