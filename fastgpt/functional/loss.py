"""cross_entropy and linear_cross_entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.functional.choice import TORCHS, chosen, obstacle
from fastgpt.ops import backend
from fastgpt.ops.cross_entropy import REDUCTIONS, CrossEntropyFunction, check_range
from fastgpt.ops.cross_entropy import reduce as reduced


def _classes(
    target: Tensor, weight: Tensor | None, reduction: Any, smoothing: Any, ignore_index: int,
    shape: Sequence[int], V: int,
) -> str | None:  # fmt: skip
    """What a loss of class indices below V, of this shape, cannot take."""
    if target.is_floating_point():
        return "the kernel takes class indices, no probabilities"
    if target.dtype != torch.int64 or tuple(target.shape) != tuple(shape):
        return TORCHS
    if weight is not None:
        return "the kernel takes no weight of the classes"
    if reduction not in REDUCTIONS or not 0.0 <= smoothing <= 1.0:
        return TORCHS
    try:
        check_range("", target, V, ignore_index)
    except ValueError:
        return TORCHS
    return None


def _rule(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: Any, smoothing: Any,
    ignore_index: int, legacy: bool,
) -> str | None:  # fmt: skip
    if legacy:
        return "the kernel takes reduction, no size_average or reduce"
    if x.ndim == 0 or x.numel() == 0:
        return TORCHS
    V, shape = (x.shape[0], ()) if x.ndim == 1 else (x.shape[1], (x.shape[0], *x.shape[2:]))
    return _classes(target, weight, reduction, smoothing, ignore_index, shape, V)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy: log sum exp(x) - x[target] over the classes.

    Args:
        input: logits, (V,), (N, V) or (N, V, d1, ...). The kernel takes float32, float16 and
            bfloat16, and reads the classes of the last form in place where they lie last, as in
            logits.transpose(1, 2).
        target: class indices, int64 of input's shape less V, which the kernel takes; or
            probabilities of input's shape.
        weight: (V,), of the classes; torch's own function takes it.
        size_average, reduce: deprecated; torch's own function takes them.
        ignore_index: a row of this target has loss 0 and gradient 0.
        reduction: "mean" over the rows not ignored, "sum" or "none".
        label_smoothing: how much of the target is spread evenly over all V.

    Returns:
        The loss, a scalar or of target's shape, in input's dtype; float32 under autocast.
    """
    legacy = size_average is not None or reduce is not None
    rest = (reduction, label_smoothing, ignore_index, legacy)
    if not chosen("cross_entropy", (input, target, weight), _rule, *rest):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    rows = input.movedim(1, -1) if input.ndim > 2 else input
    losses = CrossEntropyFunction.apply(
        rows.reshape(-1, rows.shape[-1]), target.reshape(-1), ignore_index, label_smoothing,
        0.0, 0.0,
    )  # fmt: skip
    loss = reduced(losses.view(target.shape), target, ignore_index, reduction)
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def _linear_rule(
    x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, reduction: Any, smoothing: Any, ignore_index: int, options: Any,
) -> str | None:  # fmt: skip
    if options is not None:
        return "the kernel chunks by itself and takes no options"
    if linear_weight.ndim > 2:
        return "the kernel takes no loss of more dimensions"
    if x.ndim not in (1, 2) or linear_weight.ndim < 2 or x.shape[-1] != linear_weight.shape[1]:
        return TORCHS
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        return TORCHS
    if x.numel() == 0 or linear_weight.numel() == 0:
        return "the kernel takes nothing empty"
    if not torch.is_autocast_enabled(x.device.type) and any(
        t is not None and t.dtype != x.dtype for t in (linear_weight, linear_bias)
    ):
        return TORCHS
    V, shape = len(linear_weight), x.shape[:-1]
    return _classes(target, weight, reduction, smoothing, ignore_index, shape, V)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """torch.nn.functional.linear_cross_entropy, of torch 2.13: cross_entropy(linear(input,
    linear_weight, linear_bias), target), here with only a chunk of rows of the logits at a time.

    Args:
        input: (C,) or (N, C).
        linear_weight: (V, C); (V, d1, ..., C) is torch's own function's.
        target: as in `cross_entropy`.
        linear_bias: (V,), or None.
        weight: (V,), of the classes; torch's own function takes it.
        reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: -100 if None; not to be given with probabilities.
        options: torch's LinearCrossEntropyOptions; torch's own function takes them.

    Returns:
        The loss, a scalar or of target's shape, in input's dtype; float32 under autocast.

    Raises:
        NotImplementedError: this torch has no such function, and the arguments need it.
    """
    op, tensors = "linear_cross_entropy", (input, linear_weight, target, linear_bias, weight)
    index = -100 if ignore_index is None else ignore_index
    rest = (reduction, label_smoothing, index, options)
    why = obstacle(tensors, _linear_rule, *rest)
    if why is None:
        loss = ops.linear_cross_entropy(
            input, linear_weight, target, bias=linear_bias, ignore_index=index,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip
        return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)
    if isinstance(input, Tensor):
        backend.kernel_chosen(op, input, why)
    torchs = getattr(F, op, _linear_cross_entropy)
    return torchs(  # type: ignore[no-any-return]
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
    )  # fmt: skip


def _linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None,
    weight: Tensor | None, reduction: str, ignore_index: int | None, label_smoothing: float,
    options: Any,
) -> Tensor:  # fmt: skip
    """What torch's function without options is, for a torch that has none."""
    if options is not None:
        raise NotImplementedError(
            f"linear_cross_entropy: options need torch 2.13; this is torch {torch.__version__}"
        )
    if input.ndim not in (1, 2) or linear_weight.ndim < 2 or (linear_weight.ndim > 2 > input.ndim):
        raise RuntimeError(
            "linear_cross_entropy: input must be (C,) or (N, C) and linear_weight (V, C), or"
            f" (V, d1, ..., C) for (N, C); got input {tuple(input.shape)},"
            f" linear_weight {tuple(linear_weight.shape)}"
        )
    outs = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != outs:
        raise RuntimeError(
            f"linear_cross_entropy: linear_bias must be {tuple(outs)};"
            f" got {tuple(linear_bias.shape)}"
        )
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).view(*input.shape[:-1], *outs)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError(
            "linear_cross_entropy: ignore_index must be None where target has probabilities;"
            f" got {ignore_index}"
        )
    return F.cross_entropy(
        logits, target, weight, ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
