"""layer_norm and rms_norm."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.functional.choice import TORCHS, chosen
from fastgpt.ops import backend
from fastgpt.ops.layer_norm import LayerNormFunction
from fastgpt.ops.rms_norm import RMSNormFunction


def _widened(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """x and the others as a norm takes them under autocast, which on a GPU has them in float32."""
    if not x.is_cuda or not torch.is_autocast_enabled("cuda"):
        return x, *others
    return tuple(t if t is None else t.to(torch.float32) for t in (x, *others))


def _rule(*args: Any) -> str | None:
    *tensors, normalized_shape = args
    x = tensors[0]
    if not isinstance(normalized_shape, (tuple, list)) or not normalized_shape:
        return TORCHS
    shape = tuple(normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape or any(
        t is not None and tuple(t.shape) != shape for t in tensors[1:]
    ):
        return TORCHS
    if x.numel() == 0:
        return "the kernel takes no empty rows"
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return None
    for t in tensors[1:]:
        if t is not None and t.dtype != x.dtype:
            return f"torch decides on a mix of dtypes; got {x.dtype} and {t.dtype}"
    return None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over
    the last dimensions, those of normalized_shape.

    Args:
        input: (..., *normalized_shape). The kernel takes float32, float16 and bfloat16.
        normalized_shape: the sizes of the last dimensions.
        weight, bias: of that shape, or None. The kernel takes those of input's dtype; under
            autocast on a GPU all is float32, the result as well.
        eps: added to the variance.

    Returns:
        y: input's shape and dtype.
    """
    if not chosen("layer_norm", (input, weight, bias), _rule, normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    n = len(normalized_shape)
    x, w, b = _widened(input, weight, bias)
    w = x.new_ones(tuple(normalized_shape)) if w is None else w
    b = None if b is None else b.flatten()
    args = backend.traceable(x.flatten(-n), None, w.flatten(), b, eps, 0.0, None)
    y: Tensor = LayerNormFunction.apply(*args)
    return y.view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last
    dimensions, those of normalized_shape.

    Args:
        input, normalized_shape, weight: as in `layer_norm`.
        eps: added to the mean square; if None the epsilon of float32.

    Returns:
        y: input's shape and dtype.
    """
    if not chosen("rms_norm", (input, weight), _rule, normalized_shape):
        return F.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    n = len(normalized_shape)
    x, w = _widened(input, weight)
    w = x.new_ones(tuple(normalized_shape)) if w is None else w
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    args = backend.traceable(x.flatten(-n), None, w.flatten(), eps, 0.0, None)
    y: Tensor = RMSNormFunction.apply(*args)
    return y.view(input.shape)
