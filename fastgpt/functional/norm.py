"""layer_norm and rms_norm."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from fastgpt.functional.choice import TORCHS, chosen
from fastgpt.ops import backend
from fastgpt.ops.layer_norm import LayerNormFunction
from fastgpt.ops.rms_norm import RMSNormFunction

# Which of torch's norms autocast on a GPU gives float32; rms_norm since 2.12.
WIDENED = {"layer_norm": True, "rms_norm": TorchVersion(torch.__version__) >= "2.12"}


def _widened(op: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as torch's op takes them under autocast."""
    if not WIDENED[op] or not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(
        t.float() if t is not None and t.is_cuda and t.dtype in backend.KERNEL_DTYPES else t
        for t in tensors
    )


def _rule(*args: Any) -> str | None:
    *tensors, op, normalized_shape = args
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
    x, *tensors = _widened(op, *tensors)
    for t in tensors:
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
    if not chosen("layer_norm", (input, weight, bias), _rule, "layer_norm", normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    n = len(normalized_shape)
    x, w, b = _widened("layer_norm", input, weight, bias)
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
    if not chosen("rms_norm", (input, weight), _rule, "rms_norm", normalized_shape):
        return F.rms_norm(input, normalized_shape, weight, eps)  # type: ignore[arg-type]
    n = len(normalized_shape)
    x, w = _widened("rms_norm", input, weight)
    w = x.new_ones(tuple(normalized_shape)) if w is None else w
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    args = backend.traceable(x.flatten(-n), None, w.flatten(), eps, 0.0, None)
    y: Tensor = RMSNormFunction.apply(*args)
    return y.view(input.shape)
