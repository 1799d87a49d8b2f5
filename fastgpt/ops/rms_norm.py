"""RMS normalization, with a bias, dropout and the residual add before it."""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.dropout import draw_seed, dropout_mask
from fastgpt.ops.layer_norm import (
    add_branch,
    added,
    branch_grad,
    check_norm,
    column_grad,
    norm_obstacle,
)
from fastgpt.ops.library import define, fake, impl


def _plain(h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch: its own RMS norm, in the wider of the dtypes."""
    wide = torch.promote_types(h.dtype, weight.dtype)
    return F.rms_norm(h.to(wide), weight.shape, weight.to(wide), eps).to(dtype)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `rms_norm`, in steps that each round to their own dtype."""
    h = add_branch(x, residual, dropout_p, seed, x_bias)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    xhat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (xhat * weight).to(x.dtype)
    return y if residual is None else (y, h)


forward_op = define(
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor weight, float eps, float dropout_p,"
    " Tensor? seed, Tensor? x_bias=None) -> (Tensor, Tensor, Tensor)"
)
backward_op = define(
    "rms_norm_bwd(Tensor? dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, float dropout_p,"
    " Tensor? seed, ScalarType x_dtype, ScalarType? x_bias_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@impl("rms_norm_fwd")
def _rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, h (empty without residual: h is x), rstd over x as (M, N)."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.rms_norm import rms_norm_fwd

        return rms_norm_fwd(x, residual, weight, eps, dropout_p, seed, x_bias)
    h = add_branch(x, residual, dropout_p, seed, x_bias)
    y = _plain(h, weight, eps, x.dtype).contiguous()
    wide = h.to(torch.promote_types(h.dtype, torch.float32)).reshape(-1, h.shape[-1])
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return y, x.new_empty(0) if residual is None else h.contiguous(), rstd


@fake("rms_norm_fwd")
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    stat = torch.promote_types((x if residual is None else residual).dtype, torch.float32)
    h = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), h, x.new_empty(rows, dtype=stat)


@impl("rms_norm_bwd")
def _rms_norm_bwd(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dresidual (empty where it would be dx), dweight, dx_bias (empty without its dtype)."""
    if backend.runs_kernel(h):
        from fastgpt.kernels.rms_norm import rms_norm_bwd

        return rms_norm_bwd(dy, dh, h, weight, rstd, dropout_p, seed, x_dtype, x_bias_dtype)
    N = h.shape[-1]
    wide = torch.promote_types(h.dtype, torch.float32)
    flat = h.reshape(-1, N).to(wide)
    g = torch.zeros_like(flat) if dy is None else dy.reshape(-1, N).to(wide)
    xhat = flat * rstd[:, None]
    wdy = g * weight.to(wide)
    dres = rstd[:, None] * (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True))
    if dh is not None:
        dres = dres + dh.reshape(-1, N).to(wide)
    dx = dres
    if dropout_p > 0.0 and seed is not None:
        dx = dres * dropout_mask(seed, (flat.shape[0], N), dropout_p) / (1.0 - dropout_p)
    one = dropout_p == 0.0 and x_dtype == h.dtype
    return (
        dx.to(x_dtype).reshape(h.shape),
        h.new_empty(0) if one else dres.to(h.dtype).reshape(h.shape).clone(),
        (g * xhat).sum(0).to(weight.dtype),
        weight.new_empty(0) if x_bias_dtype is None else dx.sum(0).to(x_bias_dtype),
    )


@fake("rms_norm_bwd")
def _(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    one = dropout_p == 0.0 and x_dtype == h.dtype
    return (
        h.new_empty(h.shape, dtype=x_dtype),
        h.new_empty(0) if one else h.new_empty(h.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if x_bias_dtype is None else weight.shape, dtype=x_bias_dtype),
    )


class RMSNormFunction(torch.autograd.Function):
    """(x, residual, weight, ..., x_bias) -> (y, h); without residual only y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
        dropout_p: float, seed: Tensor | None, x_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        y, h, rstd = forward_op(x, residual, weight, eps, dropout_p, seed, x_bias)
        h = x if residual is None else h
        ctx.save_for_backward(h, weight, rstd, seed)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.dropout_p, ctx.x_dtype = eps, dropout_p, x.dtype
        ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
        return y if residual is None else (y, h)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight, rstd, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x_bias_dtype = ctx.x_bias_dtype if needs[-1] else None
        if dy is None and dh is None:
            return (None,) * len(needs)
        dw: Tensor | None
        dxb: Tensor | None
        if backend.double_backward():
            dres, dw = _double(dy, dh, h, weight, ctx.eps)
            dx = branch_grad(dres, ctx.dropout_p, seed, ctx.x_dtype)
            dxb = column_grad(dx, x_bias_dtype)
        else:
            dx, dres, dw, dxb = backward_op(
                dy, dh, h, weight, rstd, ctx.dropout_p, seed, ctx.x_dtype, x_bias_dtype
            )
            dres = dx if dres.numel() == 0 else dres
        grads = (
            dx, dres if needs[1] else None, dw, None, None, None,
            None if x_bias_dtype is None else dxb,
        )  # fmt: skip
        return grads[: len(needs)]


def _double(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiable dresidual and dweight; h is an output, so its own graph goes on."""
    dres, dw = dh, None
    if dy is not None:
        dnorm, dw = backend.differentiable_grads(
            lambda h, w: _plain(h, w, eps, dy.dtype), (h, weight), (True, True), (dy,)
        )
        dres = added(dnorm, dh)
    return None if dres is None else dres.to(h.dtype), dw


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., *, residual: None = ...,
    x_bias: Tensor | None = ..., dropout_p: float = ..., seed: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor, x_bias: Tensor | None = ...,
    dropout_p: float = ..., seed: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm: y = h / sqrt(mean(h^2) + eps) * weight over the last dimension.

    With residual, h = residual + dropout(x + x_bias) is made in the same pass and returned too: it
    is the residual stream of a pre-norm transformer. Without it h = x. All is float32 until y is
    rounded, the product with weight as well.

    Args:
        x: (..., N) in float32, float16 or bfloat16, any strides, any N.
        weight: (N,), of a floating dtype, which may be wider than x's.
        eps: added to the mean square.
        residual: x's shape; its dtype may be wider than x's and is h's.
        x_bias: (N,) of a floating dtype, the bias of the product that made x; needs residual.
        dropout_p: probability in [0, 1) of dropping an element of x; needs residual.
        seed: one int64 on x's device that fixes the dropout mask (see `dropout_mask`, of shape
            (rows, N)); drawn from torch's generator if None.

    Returns:
        y: x's shape and dtype. With residual (y, h), h in residual's dtype. Without residual, on
        CUDA under autocast, y is float32, as torch's own is.

    Raises:
        ValueError: shapes or devices differ, x_bias or dropout_p without residual, or dropout_p
            outside [0, 1).
        TypeError: a dtype is not floating.

    Examples:
        >>> fastgpt.ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
        tensor([[0.8485, 1.1314]])

    Zhang, Sennrich, Root mean square layer normalization, 2019, https://arxiv.org/abs/1910.07467,
    eq. 4.
    """
    check_norm("rms_norm", x, weight, None, residual, dropout_p, seed, x_bias)
    if residual is None:
        x = backend.as_norms_under_autocast(x)
    if backend.kernel_chosen("rms_norm", x, norm_obstacle(weight, residual, x_bias)):
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        args = backend.traceable(x, residual, weight, eps, dropout_p, seed, x_bias)
        out = RMSNormFunction.apply(*args)
        return out  # type: ignore[no-any-return]
    h = add_branch(x, residual, dropout_p, seed, x_bias)
    y = _plain(h, weight, eps, x.dtype)
    return y if residual is None else (y, h)
