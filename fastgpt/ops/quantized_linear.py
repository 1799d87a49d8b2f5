"""A linear layer whose weights are of 8 or 4 bits: specification, ops, gradient, function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.ffn import ACTIVATIONS, activate
from fastgpt.ops.library import define, fake, flops, impl


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights as numbers, (N, K); in float32, or float64 if that is asked for, then rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    if weight.dtype == torch.int8:
        per = scale[:, None] if scale.ndim == 1 else scale
        w = weight.to(wide).unflatten(1, (per.shape[1], -1)) * per.to(wide)[..., None]
    else:
        step, low = (t[..., None] for t in scale.to(wide).unbind(-1))
        q = torch.stack((weight & 15, weight >> 4), -1).flatten(1).to(wide)
        w = torch.addcmul(low, q.unflatten(1, (scale.shape[1], -1)), step)
    made: Tensor = w.flatten(1).to(dtype)
    return made


def quantized_linear_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The specification of `quantized_linear`."""
    y = F.linear(x, dequantize(weight, scale, x.dtype), bias)
    return y if activation is None else activate(y, activation)


forward_op = define(
    "quantized_linear_fwd(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str? activation)"
    " -> Tensor"
)
backward_op = define("quantized_linear_bwd(Tensor dy, Tensor weight, Tensor scale) -> Tensor")


@impl("quantized_linear_fwd")
def _quantized_linear_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """x (M, K) -> (M, N)."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.quantized_linear import quantized_linear_fwd

        return quantized_linear_fwd(x, weight, scale, bias, activation or "none")
    return quantized_linear_ref(x, weight, scale, bias, activation=activation)


@fake("quantized_linear_fwd")
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@impl("quantized_linear_bwd")
def _quantized_linear_bwd(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dy (M, N) -> dx (M, K)."""
    if backend.runs_kernel(dy):
        from fastgpt.kernels.quantized_linear import dequantize as unpacked

        return dy @ unpacked(weight, scale, dy.dtype)
    return dy @ dequantize(weight, scale, dy.dtype)


@fake("quantized_linear_bwd")
def _(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1] * (1 if weight.dtype == torch.int8 else 2)))


@flops("quantized_linear_fwd")
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


@flops("quantized_linear_bwd")
def _(dy: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return int(2 * dy[0] * dy[1] * out_shape[1])


class QuantizedLinearFunction(torch.autograd.Function):
    """(x, weight, scale, bias) -> y, x and y as rows; weight and scale have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return forward_op(x, weight, scale, bias, None)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        need_x, _, _, need_b = ctx.needs_input_grad
        dx = None
        if need_x and backend.double_backward():
            dx = dy @ dequantize(weight, scale, dy.dtype)
        elif need_x:
            dx = backward_op(dy, weight, scale)
        return dx, None, None, dy.sum(0) if need_b else None


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    op = "quantized_linear"
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    if weight.dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"{op}: weight must be int8, or uint8 with two weights of 4 bits a byte;"
            f" got {weight.dtype}"
        )
    got = f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, scale {tuple(scale.shape)}"
    four = weight.dtype == torch.uint8
    if x.ndim < 1 or weight.ndim != 2:
        raise ValueError(f"{op}: x must be (..., K) and weight (N, K), or (N, K / 2); {got}")
    N, K = weight.shape[0], weight.shape[1] * (2 if four else 1)
    if x.shape[-1] != K:
        raise ValueError(
            f"{op}: the last dimension of x must be {'twice ' if four else ''}weight's columns;"
            f" {got}"
        )
    if four:
        fits = scale.ndim == 3 and scale.shape[0] == N and scale.shape[2] == 2
        shapes = "(N, groups, 2), scale and low of each group"
    else:
        fits = scale.ndim in (1, 2) and scale.shape[0] == N
        shapes = "(N,) or (N, groups)"
    if not fits:
        raise ValueError(f"{op}: scale of {weight.dtype} weights must be {shapes}; {got}")
    if scale.ndim > 1 and (scale.shape[1] == 0 or K % scale.shape[1]):
        raise ValueError(f"{op}: the groups of scale must share K, {K}, equally; {got}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"{op}: bias must be ({N},); got {tuple(bias.shape)}")
    named = (("x", x), ("scale", scale), ("bias", bias))
    for name, t in named:
        if t is not None and not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating dtype; got {t.dtype}")
    for name, t in (("weight", weight), *named[1:]):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: all tensors must be on one device; got x {x.device}, {name} {t.device}"
            )
    if scale.requires_grad:
        raise ValueError(
            f"{op}: scale has no gradient; got one that requires it (use scale.detach())"
        )
    if bias is not None and bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: bias must have the dtype of x; got {bias.dtype}, x {x.dtype}")


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """A linear layer on weights of 8 or 4 bits: y = f(x W^T + bias).

        int8     W[n, k] = scale[n] weight[n, k]    or    scale[n, k // G] weight[n, k]
        4 bits   W[n, k] = scale[n, k // G, 0] q[n, k] + scale[n, k // G, 1]

    The kernel reads the weights as they are stored, and makes them numbers in registers. x, and
    bias, have gradients; weight and scale have none. Under a gradient the activation is a step of
    its own.

    Args:
        x: (..., K) in float32, float16 or bfloat16.
        weight: (N, K) int8; or (N, K / 2) uint8, two weights q in 0 .. 15 a byte, the even column
            in the low half.
        scale: of int8 (N,) or (N, K / G); of 4 bits (N, K / G, 2), scale and low of each group of G
            columns, as `fastgpt.quantized` makes them, float32 or bfloat16.
        bias: (N,) of x's dtype, or None.
        activation: None, "gelu_tanh", "gelu", "relu" or "silu".

    Returns:
        y: (..., N) of x's dtype (of autocast's dtype under autocast).

    Raises:
        ValueError: shapes or devices do not fit, the activation is unknown, or scale requires a
            gradient.
        TypeError: weight is neither int8 nor uint8, x, scale or bias are not floating, or bias is
            of another dtype than x (outside autocast).

    Dettmers et al., LLM.int8(), 2022, https://arxiv.org/abs/2208.07339; Frantar et al., GPTQ, 2023,
    https://arxiv.org/abs/2210.17323 (groups).
    """
    _check(x, weight, scale, bias, activation)
    if not backend.kernel_chosen("quantized_linear", x, _obstacle(x, weight, scale)):
        (x,), (bias,) = backend.autocast(x), backend.autocast(bias)
        return quantized_linear_ref(x, weight, scale, bias, activation=activation)
    (x,), (bias,) = backend.autocast(x), backend.autocast(bias)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        y = QuantizedLinearFunction.apply(*backend.traceable(rows, weight, scale, bias))
        y = y if activation is None else activate(y, activation)
    else:
        y = forward_op(rows, weight, scale, bias, activation)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _obstacle(x: Tensor, weight: Tensor, scale: Tensor) -> str | None:
    if weight.numel() == 0:
        return f"the kernel takes no empty weight; got {tuple(weight.shape)}"
    if scale.ndim > 1:
        group, least = x.shape[-1] // scale.shape[1], 16 if weight.dtype == torch.int8 else 32
        if group < least or group & (group - 1):
            return f"the kernel takes groups of a power of 2, {least} or more; got {group}"
    return None
