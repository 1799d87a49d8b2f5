"""Layer normalization, with a bias, dropout and the residual add before it."""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.dropout import check_dropout, draw_seed, dropout_mask
from fastgpt.ops.library import define, fake, impl


def add_branch(
    x: Tensor, residual: Tensor | None, p: float, seed: Tensor | None, x_bias: Tensor | None
) -> Tensor:
    """residual + dropout(x + x_bias), in residual's dtype; x itself without a residual."""
    if residual is None:
        return x
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if p > 0.0 and seed is not None:
        keep = dropout_mask(seed, (x.numel() // max(1, x.shape[-1]), x.shape[-1]), p)
        x = x * keep.view(x.shape) / (1.0 - p)
    elif p > 0.0:
        x = F.dropout(x, p)
    return (residual + x).to(residual.dtype)


def _plain(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, p: float,
    seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch: its own layer norm, in the widest of the dtypes."""
    h = add_branch(x, residual, p, seed, x_bias)
    dtype = torch.promote_types(h.dtype, weight.dtype)
    b = None if bias is None else bias.to(dtype)
    y = F.layer_norm(h.to(dtype), weight.shape, weight.to(dtype), b, eps)
    return y.to(x.dtype), h


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `layer_norm`, in steps that each round to their own dtype."""
    h = add_branch(x, residual, dropout_p, seed, x_bias)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    xhat = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(
        wide.var(-1, correction=0, keepdim=True) + eps
    )
    y = (xhat * weight + (0.0 if bias is None else bias)).to(x.dtype)
    return y if residual is None else (y, h)


forward_op = define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps,"
    " float dropout_p, Tensor? seed, Tensor? x_bias=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
backward_op = define(
    "layer_norm_bwd(Tensor? dy, Tensor? dh, Tensor h, Tensor weight, bool has_bias, Tensor mean,"
    " Tensor rstd, float dropout_p, Tensor? seed, ScalarType x_dtype,"
    " ScalarType? x_bias_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@impl("layer_norm_fwd")
def _layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, h (empty without residual: h is x), mean, rstd; all over x as (M, N)."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.layer_norm import layer_norm_fwd

        return layer_norm_fwd(x, residual, weight, bias, eps, dropout_p, seed, x_bias)
    h = add_branch(x, residual, dropout_p, seed, x_bias)
    y, _ = _plain(h, None, weight, bias, eps, 0.0, None)
    wide = h.to(torch.promote_types(h.dtype, torch.float32)).reshape(-1, h.shape[-1])
    var, mean = torch.var_mean(wide, -1, correction=0)
    rstd = torch.rsqrt(var + eps)
    y = y.to(x.dtype).contiguous()
    return y, x.new_empty(0) if residual is None else h.contiguous(), mean, rstd


@fake("layer_norm_fwd")
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    stat = torch.promote_types((x if residual is None else residual).dtype, torch.float32)
    h = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    mean, rstd = x.new_empty(rows, dtype=stat), x.new_empty(rows, dtype=stat)
    return x.new_empty(x.shape), h, mean, rstd


@impl("layer_norm_bwd")
def _layer_norm_bwd(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor,
    rstd: Tensor, dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dresidual (empty where it would be dx), dweight, dbias (empty without bias), dx_bias
    (empty without its dtype)."""
    if backend.runs_kernel(h):
        from fastgpt.kernels.layer_norm import layer_norm_bwd

        return layer_norm_bwd(
            dy, dh, h, weight, has_bias, mean, rstd, dropout_p, seed, x_dtype, x_bias_dtype
        )
    N = h.shape[-1]
    wide = torch.promote_types(h.dtype, torch.float32)
    flat = h.reshape(-1, N).to(wide)
    g = torch.zeros_like(flat) if dy is None else dy.reshape(-1, N).to(wide)
    xhat = (flat - mean[:, None]) * rstd[:, None]
    wdy = g * weight.to(wide)
    dres = rstd[:, None] * (
        wdy - wdy.mean(-1, keepdim=True) - xhat * (wdy * xhat).mean(-1, keepdim=True)
    )
    if dh is not None:
        dres = dres + dh.reshape(-1, N).to(wide)
    dx = dres
    if dropout_p > 0.0 and seed is not None:
        dx = dres * dropout_mask(seed, (flat.shape[0], N), dropout_p) / (1.0 - dropout_p)
    dw, db = (g * xhat).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)
    one = dropout_p == 0.0 and x_dtype == h.dtype
    return (
        dx.to(x_dtype).reshape(h.shape),
        h.new_empty(0) if one else dres.to(h.dtype).reshape(h.shape).clone(),
        dw,
        db if has_bias else weight.new_empty(0),
        weight.new_empty(0) if x_bias_dtype is None else dx.sum(0).to(x_bias_dtype),
    )


@fake("layer_norm_bwd")
def _(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor,
    rstd: Tensor, dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    one = dropout_p == 0.0 and x_dtype == h.dtype
    return (
        h.new_empty(h.shape, dtype=x_dtype),
        h.new_empty(0) if one else h.new_empty(h.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape) if has_bias else weight.new_empty(0),
        weight.new_empty(0 if x_bias_dtype is None else weight.shape, dtype=x_bias_dtype),
    )


class LayerNormFunction(torch.autograd.Function):
    """(x, residual, weight, bias, ..., x_bias) -> (y, h); without residual only y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
        eps: float, dropout_p: float, seed: Tensor | None, x_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        y, h, mean, rstd = forward_op(x, residual, weight, bias, eps, dropout_p, seed, x_bias)
        h = x if residual is None else h
        ctx.save_for_backward(h, weight, mean, rstd, seed)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.dropout_p, ctx.x_dtype = eps, dropout_p, x.dtype
        ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
        return y if residual is None else (y, h)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight, mean, rstd, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x_bias_dtype = ctx.x_bias_dtype if needs[-1] else None
        if dy is None and dh is None:
            return (None,) * len(needs)
        dw: Tensor | None
        db: Tensor | None
        dxb: Tensor | None
        if backend.double_backward():
            dres, dw, db = _double(dy, dh, h, weight, ctx.eps)
            dx = branch_grad(dres, ctx.dropout_p, seed, ctx.x_dtype)
            dxb = column_grad(dx, x_bias_dtype)
        else:
            dx, dres, dw, db, dxb = backward_op(
                dy, dh, h, weight, needs[3], mean, rstd, ctx.dropout_p, seed, ctx.x_dtype,
                x_bias_dtype,
            )  # fmt: skip
            dres = dx if dres.numel() == 0 else dres
        grads = (
            dx, dres if needs[1] else None, dw, db if needs[3] else None, None, None, None,
            None if x_bias_dtype is None else dxb,
        )  # fmt: skip
        return grads[: len(needs)]


def branch_grad(
    dres: Tensor | None, p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Gradient of x from that of the sum that dropout(x) went into."""
    if dres is None or p == 0.0 or seed is None:
        return None if dres is None else dres.to(dtype)
    keep = dropout_mask(seed, (dres.numel() // max(1, dres.shape[-1]), dres.shape[-1]), p)
    return (dres * keep.view(dres.shape) / (1.0 - p)).to(dtype)


def column_grad(dx: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Gradient, if one of that dtype is wanted, of a bias that was added to x."""
    if dx is None or dtype is None:
        return None
    return dx.reshape(-1, dx.shape[-1]).sum(0).to(dtype)


def _double(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Differentiable dresidual, dweight and dbias; h is an output, so its own graph goes on."""
    dres, dw, db = dh, None, None
    if dy is not None:
        dnorm, dw = backend.differentiable_grads(
            lambda h, w: _plain(h, None, w, None, eps, 0.0, None)[0],
            (h, weight),
            (True,) * 2,
            (dy,),
        )
        dres = added(dnorm, dh)
        db = dy.reshape(-1, dy.shape[-1]).sum(0).to(weight.dtype)
    return None if dres is None else dres.to(h.dtype), dw, db


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, None being none."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def check_norm(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    dropout_p: float, seed: Tensor | None, x_bias: Tensor | None,
) -> None:  # fmt: skip
    """Raise unless shapes, dtypes and devices are those of a norm."""
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1; got {tuple(x.shape)}")
    last, device = x.shape[-1:], x.device
    for name, t in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if t is not None and t.shape != last:
            raise ValueError(
                f"{op}: {name} must be ({x.shape[-1]},), the last dimension of x;"
                f" got {name} {tuple(t.shape)}, x {tuple(x.shape)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have x's shape;"
            f" got residual {tuple(residual.shape)}, x {tuple(x.shape)}"
        )
    for name, t in (
        ("x", x), ("weight", weight), ("bias", bias), ("residual", residual), ("x_bias", x_bias)
    ):  # fmt: skip
        if t is not None and not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating dtype; got {t.dtype}")
        if t is not None and t.device != device:
            raise ValueError(
                f"{op}: all tensors must be on one device; got x {device}, {name} {t.device}"
            )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"{op}: weight and bias must have one dtype; got {weight.dtype}, {bias.dtype}"
        )
    check_dropout(op, dropout_p, seed)
    if residual is None and dropout_p > 0.0:
        raise ValueError(f"{op}: dropout_p needs residual; got dropout_p {dropout_p} alone")
    if residual is None and x_bias is not None:
        raise ValueError(f"{op}: x_bias needs residual; got x_bias alone")


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., eps: float = ..., *,
    residual: None = ..., x_bias: Tensor | None = ..., dropout_p: float = ...,
    seed: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., eps: float = ..., *, residual: Tensor,
    x_bias: Tensor | None = ..., dropout_p: float = ..., seed: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm: y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension.

    With residual, h = residual + dropout(x + x_bias) is made in the same pass and returned too: it
    is the residual stream of a pre-norm transformer. Without it h = x. The variance is the biased
    one.

    Args:
        x: (..., N) in float32, float16 or bfloat16, any strides, any N.
        weight, bias: (N,), of one floating dtype, which may be wider than x's.
        eps: added to the variance.
        residual: x's shape; its dtype may be wider than x's and is h's.
        x_bias: (N,) of a floating dtype, the bias of the product that made x, so that neither that
            product nor its backward need see to it; needs residual.
        dropout_p: probability in [0, 1) of dropping an element of x; needs residual.
        seed: one int64 on x's device that fixes the dropout mask (see `dropout_mask`, of shape
            (rows, N)); drawn from torch's generator if None.

    Returns:
        y: x's shape and dtype. With residual (y, h), h in residual's dtype. Statistics are float32.
        Without residual, on CUDA under autocast, y is float32, as torch's own is.

    Raises:
        ValueError: shapes or devices differ, x_bias or dropout_p without residual, or dropout_p
            outside [0, 1).
        TypeError: a dtype is not floating, or weight's and bias's differ.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> y, h = fastgpt.ops.layer_norm(x, torch.ones(3), torch.zeros(3), residual=x)
        >>> y, h
        (tensor([[-1.2247,  0.0000,  1.2247]]), tensor([[2., 4., 6.]]))

    Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450, eq. 4.
    """
    check_norm("layer_norm", x, weight, bias, residual, dropout_p, seed, x_bias)
    if residual is None:
        x = backend.as_norms_under_autocast(x)
    if backend.kernel_chosen("layer_norm", x, norm_obstacle(weight, residual, x_bias)):
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        args = backend.traceable(x, residual, weight, bias, eps, dropout_p, seed, x_bias)
        out = LayerNormFunction.apply(*args)
        return out  # type: ignore[no-any-return]
    y, h = _plain(x, residual, weight, bias, eps, dropout_p, seed, x_bias)
    return y if residual is None else (y, h)


def norm_obstacle(weight: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> str | None:
    """What keeps a norm's kernel from running, beside x."""
    for name, t in (("weight", weight), ("residual", residual), ("x_bias", x_bias)):
        if t is not None and t.dtype == torch.float64:
            return f"the kernel takes no float64; {name} is"
    return None
