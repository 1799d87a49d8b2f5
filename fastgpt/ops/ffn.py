"""The feed-forward, plain or gated: specification, ops, gradient, function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.cpu_linear import linear
from fastgpt.ops.library import define, fake, flops, impl

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")


def activate(pre: Tensor, activation: str) -> Tensor:
    """relu: max(0, u). silu: u sigmoid(u). gelu: u Phi(u), Phi the normal distribution function by
    erf. gelu_tanh: u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))), GPT-2's (Hendrycks, Gimpel, 2016,
    https://arxiv.org/abs/1606.08415)."""
    if activation == "relu":
        return F.relu(pre)
    if activation == "silu":
        return F.silu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def ffn_ref(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    recompute: int | bool = True,
) -> Tensor:
    """The specification of `ffn`; what is kept for backward is PyTorch's affair here."""
    up = linear(x, w1, b1)
    if w_gate is None:
        h = activate(up, activation)
    else:
        h = activate(linear(x, w_gate, b_gate), activation) * up
    return linear(h, w2, b2)


forward_op = define(
    "ffn_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor?"
    " b_gate, str activation, bool save_pre, bool save_h) -> (Tensor, Tensor, Tensor)"
)
backward_op = define(
    "ffn_bwd(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? w_gate, Tensor? b_gate,"
    " Tensor pre, Tensor h, str activation, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _up(
    x: Tensor, w1: Tensor, b1: Tensor | None, w_gate: Tensor | None, b_gate: Tensor | None
) -> Tensor:
    """-> (1, M, F), the pre-activation; or (2, M, F), that of the gate and what it multiplies."""
    up = F.linear(x, w1, b1)
    return up[None] if w_gate is None else torch.stack((F.linear(x, w_gate, b_gate), up))


@impl("ffn_fwd")
def _ffn_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, activation: str, save_pre: bool, save_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (M, C) -> y (M, C2), pre (1 or 2, M, F), h (M, F); pre and h empty where not saved."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.ffn import ffn_fwd

        return ffn_fwd(x, w1, b1, w2, b2, w_gate, b_gate, activation, save_pre, save_h)
    pre = _up(x, w1, b1, w_gate, b_gate)
    h = activate(pre[0], activation)
    if w_gate is not None:
        h = h * pre[1]
    none = x.new_empty(0)
    return F.linear(h, w2, b2), pre if save_pre else none, h if save_h else none.clone()


@fake("ffn_fwd")
def _(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, activation: str, save_pre: bool, save_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = (x.shape[0], w1.shape[0])
    pre = x.new_empty((1 if w_gate is None else 2, *wide) if save_pre else 0)
    h = x.new_empty(wide if save_h else 0)
    return x.new_empty((x.shape[0], w2.shape[0])), pre, h


@impl("ffn_bwd")
def _ffn_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, w_gate: Tensor | None,
    b_gate: Tensor | None, pre: Tensor, h: Tensor, activation: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dx, dw1, db1, dw2, db2, dw_gate, db_gate, each empty where needs says so; h, or pre and
    h, may be empty, and are then made again."""
    if backend.runs_kernel(x):
        from fastgpt.kernels.ffn import ffn_bwd

        return ffn_bwd(dy, x, w1, b1, w2, w_gate, b_gate, pre, h, activation, needs)
    if pre.numel() == 0:
        pre = _up(x, w1, b1, w_gate, b_gate)
    act = activate(pre[0], activation)
    dh = dy @ w2
    dpre = [_through(dh if w_gate is None else dh * pre[1], pre[0], activation)]
    if w_gate is not None:
        dpre.append(dh * act)
        act = act * pre[1]
    ws = (w1,) if w_gate is None else (w_gate, w1)
    none = x.new_empty(0)
    return (
        sum((d @ w for d, w in zip(dpre, ws, strict=True)), x.new_zeros(x.shape))
        if needs[0]
        else none,
        _grad(w1, dpre[-1], x) if needs[1] else none.clone(),
        dpre[-1].sum(0) if needs[2] else none.clone(),
        _grad(w2, dy, act) if needs[3] else none.clone(),
        dy.sum(0) if needs[4] else none.clone(),
        _grad(ws[0], dpre[0], x) if needs[5] else none.clone(),
        dpre[0].sum(0) if needs[6] else none.clone(),
    )


def _grad(w: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """d^T x, in memory as w is."""
    return (x.T @ d).T if _transposed(w) else d.T @ x


def _transposed(w: Tensor) -> bool:
    """Whether it lies in memory as its transpose."""
    return w.stride(0) == 1 and w.stride(1) != 1


def _through(dact: Tensor, pre: Tensor, activation: str) -> Tensor:
    """The gradient by pre of activate(pre), given that by its value."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dact, pre, 0)  # type: ignore[no-any-return]
    if activation == "silu":
        return torch.ops.aten.silu_backward(dact, pre)  # type: ignore[no-any-return]
    how = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dact, pre, approximate=how)  # type: ignore[no-any-return]


@fake("ffn_bwd")
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, w_gate: Tensor | None,
    b_gate: Tensor | None, pre: Tensor, h: Tensor, activation: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    up, down = w1.shape, w2.shape
    shapes = (x.shape, up, up[:1], down, down[:1], up, up[:1])
    laid = (None, w1, None, w2, None, w_gate, None)  # whose layout a gradient has
    return tuple(
        x.new_empty(0) if not need
        else x.new_empty(shape) if w is None or not _transposed(w)
        else x.new_empty((shape[1], shape[0])).T
        for shape, w, need in zip(shapes, laid, needs, strict=True)
    )  # fmt: skip


@flops("ffn_fwd")
def _(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, w_gate: Any, *_: Any, **__: Any) -> int:
    ups = 1 if w_gate is None else 2
    return int(2 * x[0] * (ups * w1[0] * w1[1] + w2[0] * w2[1]))


@flops("ffn_bwd")
def _(
    dy: Any, x: Any, w1: Any, b1: Any, w2: Any, w_gate: Any, b_gate: Any, pre: Any, h: Any,
    activation: str, needs: list[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    up, down = 2 * x[0] * w1[0] * w1[1], 2 * x[0] * w2[0] * w2[1]
    ups = 1 if w_gate is None else 2
    again = ups if len(pre) == 1 else 0  # an empty pre, (0,), is made again
    inner = any(needs[:3]) or any(needs[5:])
    return int(up * (again + ups * needs[0] + needs[1] + needs[5]) + down * (inner + needs[3]))


class FFNFunction(torch.autograd.Function):
    """(x, w1, b1, w2, b2, w_gate, b_gate, ...) -> y, x and y as rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
        w_gate: Tensor | None, b_gate: Tensor | None, activation: str, recompute: int | bool,
    ) -> Tensor:  # fmt: skip
        y, pre, h = forward_op(
            x, w1, b1, w2, b2, w_gate, b_gate, activation, recompute < 2, recompute < 1
        )
        ctx.save_for_backward(x, w1, b1, w2, b2, w_gate, b_gate, pre, h)
        ctx.activation = activation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, b1, w2, b2, w_gate, b_gate, pre, h = ctx.saved_tensors
        needs = ctx.needs_input_grad[:7]
        if backend.double_backward():
            grads = backend.differentiable_grads(
                lambda *args: ffn_ref(*args, activation=ctx.activation),
                (x, w1, b1, w2, b2, w_gate, b_gate), needs, (dy,),
            )  # fmt: skip
        else:
            grads = backward_op(
                dy, x, w1, b1, w2, w_gate, b_gate, pre, h, ctx.activation, list(needs)
            )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, activation: str, recompute: int | bool,
) -> None:  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"ffn: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    if recompute not in (0, 1, 2):
        raise ValueError(f"ffn: recompute must be 0, 1 or 2; got {recompute!r}")
    got = f"got x {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
    if x.ndim < 1 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(f"ffn: x must be (..., C), w1 (F, C), w2 (C, F); {got}")
    if x.shape[-1] != w1.shape[1]:
        raise ValueError(f"ffn: the columns of w1 must be the last dimension of x; {got}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"ffn: the columns of w2 must be the rows of w1; {got}")
    if w_gate is not None and w_gate.shape != w1.shape:
        raise ValueError(
            f"ffn: w_gate must have the shape of w1, {tuple(w1.shape)}; got {tuple(w_gate.shape)}"
        )
    if w_gate is None and b_gate is not None:
        raise ValueError("ffn: b_gate is the bias of w_gate; got b_gate alone")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2), ("b_gate", b_gate, w1)):
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"ffn: {name} must be ({w.shape[0]},); got {tuple(b.shape)}")
    named = (
        ("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2), ("w_gate", w_gate),
        ("b_gate", b_gate),
    )  # fmt: skip
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
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    recompute: int | bool = True,
) -> Tensor:
    """The feed-forward of a transformer block: y = act(x w1^T + b1) w2^T + b2, or gated
    y = (act(x w_gate^T + b_gate) * (x w1^T + b1)) w2^T + b2.

    With a gate, "silu" makes it SwiGLU, "gelu" or "gelu_tanh" GEGLU, "relu" ReGLU. What is kept
    for backward beside x, of M rows, in elements, and what backward multiplies for it once more:

        recompute    plain       gated       again
        0, False     2 M F       3 M F       nothing: pre-activations and activation are kept
        1, True      M F         2 M F       no product: the activation is made from what is kept
        2            0           0           2 M C F FLOPs, gated 4 M C F: the first products

    Level 2 adds a sixth to the products of a training step of the plain feed-forward, two ninths
    to the gated one's. The gradients have the same bits at each level. Plain PyTorch keeps 2 M F,
    gated 4 M F.

    Args:
        x: (..., C) in float32, float16 or bfloat16.
        w1: (F, C), b1: (F,) or None: as nn.Linear keeps them.
        w2: (C, F), b2: (C,) or None.
        activation: "gelu_tanh" (GPT-2's), "gelu" (by erf), "relu" or "silu".
        w_gate: (F, C), b_gate: (F,), or None.
        recompute: 0, 1 or 2, as above.

    Returns:
        y: (..., C) of x's dtype (of autocast's dtype under autocast).

    Raises:
        ValueError: shapes or devices do not fit, or the activation or the level is unknown.
        TypeError: dtypes differ (outside autocast) or are not floating.

    Examples:
        >>> w = torch.eye(2)
        >>> fastgpt.ops.ffn(torch.tensor([[-1.0, 2.0]]), w, None, w, None, activation="relu")
        tensor([[0., 2.]])

    Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2); Vaswani et
    al., 2017, https://arxiv.org/abs/1706.03762, eq. 2; Shazeer, GLU variants improve transformer,
    2020, https://arxiv.org/abs/2002.05202.
    """
    _check(x, w1, b1, w2, b2, w_gate, b_gate, activation, recompute)
    if not backend.kernel_chosen("ffn", x, _obstacle(x, w1)):
        return ffn_ref(x, w1, b1, w2, b2, w_gate, b_gate, activation=activation)
    x, w1, w2 = backend.autocast(x, w1, w2)
    b1, b2, w_gate, b_gate = backend.autocast(b1, b2, w_gate, b_gate)
    args = x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, w_gate, b_gate
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        y = FFNFunction.apply(*backend.traceable(*args), activation, recompute)
    else:
        y, _, _ = forward_op(*args, activation, False, False)
    return y.view(*x.shape[:-1], w2.shape[0])  # type: ignore[no-any-return]


def _obstacle(x: Tensor, w1: Tensor) -> str | None:
    if w1.numel() == 0:
        return f"the kernel takes no empty weight; got w1 {tuple(w1.shape)}"
    return None
