"""The feed-forward of a GPT block: specification, ops, gradient, function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.library import define, fake, flops, impl

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")


def activate(pre: Tensor, activation: str) -> Tensor:
    """relu: max(0, u). gelu: u Phi(u), Phi the normal distribution function by erf. gelu_tanh:
    u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))), GPT-2's (Hendrycks, Gimpel, 2016,
    https://arxiv.org/abs/1606.08415)."""
    if activation == "relu":
        return F.relu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def ffn_ref(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    recompute: bool = True,
) -> Tensor:
    """The specification of `ffn`; what is kept for backward is PyTorch's affair here."""
    return F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)


define(
    "ffn_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save_pre,"
    " bool save_act) -> (Tensor, Tensor, Tensor)"
)
define(
    "ffn_bwd(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pre, Tensor act, str activation,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@impl("ffn_fwd")
def _ffn_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str,
    save_pre: bool, save_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, C) -> y (M, C2), pre (M, F), act (M, F); pre and act empty where not to be saved."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.ffn import ffn_fwd

        return ffn_fwd(x, w1, b1, w2, b2, activation, save_pre, save_act)
    pre = F.linear(x, w1, b1)
    act = activate(pre, activation)
    none = x.new_empty(0)
    return F.linear(act, w2, b2), pre if save_pre else none, act if save_act else none.clone()


@fake("ffn_fwd")
def _(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str,
    save_pre: bool, save_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = (x.shape[0], w1.shape[0])
    pre = x.new_empty(wide if save_pre else 0)
    act = x.new_empty(wide if save_act else 0)
    return x.new_empty((x.shape[0], w2.shape[0])), pre, act


@impl("ffn_bwd")
def _ffn_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, act: Tensor, activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dw1, db1, dw2, db2, each empty where needs says so; act may be empty."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.ffn import ffn_bwd

        return ffn_bwd(dy, x, w1, w2, pre, act, activation, needs)
    none = x.new_empty(0)
    dact = dy @ w2
    if activation == "relu":
        dpre = torch.ops.aten.threshold_backward(dact, pre, 0)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        dpre = torch.ops.aten.gelu_backward(dact, pre, approximate=how)
    made = activate(pre, activation) if act.numel() == 0 else act
    return (
        dpre @ w1 if needs[0] else none,
        dpre.T @ x if needs[1] else none.clone(),
        dpre.sum(0) if needs[2] else none.clone(),
        dy.T @ made if needs[3] else none.clone(),
        dy.sum(0) if needs[4] else none.clone(),
    )


@fake("ffn_bwd")
def _(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, act: Tensor, activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (
        x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw1, db1, dw2, db2


@flops("ffn_fwd")
def _(x: Any, w1: Any, b1: Any, w2: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * (w1[0] * w1[1] + w2[0] * w2[1]))


@flops("ffn_bwd")
def _(
    dy: Any, x: Any, w1: Any, w2: Any, pre: Any, act: Any, activation: str, needs: list[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    up, down = 2 * x[0] * w1[0] * w1[1], 2 * x[0] * w2[0] * w2[1]
    return int(up * (needs[0] + needs[1]) + down * (any(needs[:3]) + needs[3]))


class FFNFunction(torch.autograd.Function):
    """(x, w1, b1, w2, b2, ...) -> y, x and y as rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
        activation: str, recompute: bool,
    ) -> Tensor:  # fmt: skip
        y, pre, act = torch.ops.fastgpt.ffn_fwd(x, w1, b1, w2, b2, activation, True, not recompute)
        ctx.save_for_backward(x, w1, b1, w2, b2, pre, act)
        ctx.activation = activation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, b1, w2, b2, pre, act = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if backend.double_backward():
            grads = backend.differentiable_grads(
                lambda *args: ffn_ref(*args, activation=ctx.activation),
                (x, w1, b1, w2, b2), needs, (dy,),
            )  # fmt: skip
        else:
            grads = torch.ops.fastgpt.ffn_bwd(dy, x, w1, w2, pre, act, ctx.activation, list(needs))
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"ffn: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    got = f"got x {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
    if x.ndim < 1 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(f"ffn: x must be (..., C), w1 (F, C), w2 (C, F); {got}")
    if x.shape[-1] != w1.shape[1]:
        raise ValueError(f"ffn: the columns of w1 must be the last dimension of x; {got}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"ffn: the columns of w2 must be the rows of w1; {got}")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"ffn: {name} must be ({w.shape[0]},); got {tuple(b.shape)}")
    named = (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
    for name, t in named:
        if t is not None and not t.dtype.is_floating_point:
            raise TypeError(f"ffn: {name} must have a floating dtype; got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(
                f"ffn: all tensors must be on one device; got x {x.device}, {name} {t.device}"
            )
    if not torch.is_autocast_enabled(x.device.type):
        for name, t in named:
            if t is not None and t.dtype != x.dtype:
                raise TypeError(
                    f"ffn: all tensors must have one dtype; got x {x.dtype}, {name} {t.dtype}"
                )


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    recompute: bool = True,
) -> Tensor:
    """The feed-forward of a transformer block: y = act(x w1^T + b1) w2^T + b2.

    Args:
        x: (..., C) in float32, float16 or bfloat16.
        w1: (F, C), b1: (F,) or None: as nn.Linear keeps them.
        w2: (C, F), b2: (C,) or None.
        activation: "gelu_tanh" (GPT-2's), "gelu" (by erf) or "relu".
        recompute: keep for backward only the pre-activation x w1^T + b1 and make the activation
            again from it, which costs no matrix product and saves as much memory as the
            pre-activation takes; if False keep both. Plain PyTorch keeps both in any case.

    Returns:
        y: (..., C) of x's dtype (of autocast's dtype under autocast).

    Raises:
        ValueError: shapes or devices do not fit, or the activation is unknown.
        TypeError: dtypes differ (outside autocast) or are not floating.

    Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2); Vaswani et
    al., 2017, https://arxiv.org/abs/1706.03762, eq. 2.
    """
    _check(x, w1, b1, w2, b2, activation)
    if not backend.kernel_chosen("ffn", x, _obstacle(x, w1)):
        return ffn_ref(x, w1, b1, w2, b2, activation=activation)
    x, w1, w2 = backend.autocast(x, w1, w2)
    b1, b2 = backend.autocast(b1, b2)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)
    ):
        y = FFNFunction.apply(rows, w1, b1, w2, b2, activation, recompute)
    else:
        y, _, _ = torch.ops.fastgpt.ffn_fwd(rows, w1, b1, w2, b2, activation, False, False)
    return y.view(*x.shape[:-1], w2.shape[0])  # type: ignore[no-any-return]


def _obstacle(x: Tensor, w1: Tensor) -> str | None:
    if w1.numel() == 0:
        return f"the kernel takes no empty weight; got w1 {tuple(w1.shape)}"
    return None
