"""Rotary position embedding of queries and keys, with an RMS norm of each head before it."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.library import define, fake, impl


def rotary_table(
    T: int, D: int, theta: float = 1e4, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles t * theta ** (-2 i / D), of positions t and pairs i.

    The angles are made in float64, on the CPU: in float32 an angle of 10^6 is off by 0.06.

    Args:
        T: positions 0 .. T - 1.
        D: elements of a head that are turned, even.
        theta: the base of the frequencies.
        device: where the table is put.

    Returns:
        cos, sin: (T, D / 2) float32.

    Raises:
        ValueError: T is negative, D not even and positive, or theta not positive.

    Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864, section 3.2.2.
    """
    if T < 0:
        raise ValueError(f"rotary_table: T must not be negative; got {T}")
    if D < 2 or D % 2:
        raise ValueError(f"rotary_table: D must be even and at least 2; got {D}")
    if not theta > 0.0:
        raise ValueError(f"rotary_table: theta must be positive; got {theta}")
    pairs = torch.arange(0, D, 2, dtype=torch.float64, device="cpu")
    positions = torch.arange(T, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, theta ** (-pairs / D))  # (T, D / 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, T, H, D), its first 2 R elements turned by the angles of cos, sin (..., T, R)."""
    pairs = "b t h (r two) -> two b t h r" if interleaved else "b t h (two r) -> two b t h r"
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    a, b = rearrange(wide[..., : 2 * cos.shape[-1]], pairs, two=2)
    y = torch.stack((a * c - b * s, b * c + a * s))
    turned = rearrange(y, " -> ".join(reversed(pairs.split(" -> "))))
    return torch.cat((turned, wide[..., 2 * cos.shape[-1] :]), -1).to(x.dtype)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def rotary_ref(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The specification of `rotary`, in steps that each round to their own dtype."""
    if q_weight is not None and k_weight is not None:
        q, k = _normalised(q, q_weight, eps), _normalised(k, k_weight, eps)
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


forward_op = define(
    "rotary_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    " float eps, bool interleaved, bool inverse) -> (Tensor, Tensor)"
)
backward_op = define(
    "rotary_norm_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor cos, Tensor sin,"
    " Tensor q_weight, Tensor k_weight, float eps, bool interleaved)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@impl("rotary_fwd")
def _rotary_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float, interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> q and k turned, or without weights turned back, contiguous."""
    if backend.runs_kernel(q):
        from fastgpt.kernels.rotary import rotary_fwd

        return rotary_fwd(q, k, cos, sin, q_weight, k_weight, eps, interleaved, inverse)
    sin = -sin if inverse else sin
    yq, yk = rotary_ref(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=interleaved
    )
    return yq.contiguous(), yk.contiguous()


@fake("rotary_fwd")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float, interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape)


@impl("rotary_norm_bwd")
def _rotary_norm_bwd(
    dyq: Tensor, dyk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor,
    k_weight: Tensor, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, contiguous, and the gradients of the weights."""
    if backend.runs_kernel(q):
        from fastgpt.kernels.rotary import rotary_norm_bwd

        return rotary_norm_bwd(dyq, dyk, q, k, cos, sin, q_weight, k_weight, eps, interleaved)
    got: list[Tensor] = []
    for x, dy, w in ((q, dyq, q_weight), (k, dyk, k_weight)):
        dtype = torch.promote_types(x.dtype, torch.float32)
        g, wide = _turn(dy.to(dtype), cos, -sin, interleaved), x.to(dtype)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        xhat = wide * rstd
        wg = g * w
        dx = rstd * (wg - xhat * (wg * xhat).mean(-1, keepdim=True))
        got += [dx.to(x.dtype).contiguous(), (g * xhat).sum((0, 1, 2)).to(w.dtype)]
    dq, dqw, dk, dkw = got
    return dq, dk, dqw, dkw


@fake("rotary_norm_bwd")
def _(
    dyq: Tensor, dyk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor,
    k_weight: Tensor, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), *weights


class RotaryFunction(torch.autograd.Function):
    """(q, k, cos, sin, q_weight, k_weight, ...) -> q and k turned. Without weights it is linear,
    and keeps nothing but the table."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
        k_weight: Tensor | None, eps: float, interleaved: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        yq, yk = forward_op(q, k, cos, sin, q_weight, k_weight, eps, interleaved, False)
        kept = () if q_weight is None else (q, k, q_weight, k_weight)
        ctx.save_for_backward(cos, sin, *kept)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.interleaved, ctx.shapes = eps, interleaved, (q.shape, k.shape)
        return yq, yk

    @staticmethod
    def backward(ctx: Any, dyq: Tensor | None, dyk: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin, *kept = ctx.saved_tensors
        one = dyk if dyq is None else dyq
        if one is None:
            return (None,) * 8
        dyq, dyk = (
            one.new_zeros((1,) * 3 + shape[3:]).expand(shape) if dy is None else dy
            for dy, shape in zip((dyq, dyk), ctx.shapes, strict=True)
        )
        dqw: Tensor | None = None
        dkw: Tensor | None = None
        if kept and backend.double_backward():
            dq, dk, dqw, dkw = backend.differentiable_grads(
                lambda q, k, q_weight, k_weight: rotary_ref(
                    q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=ctx.eps,
                    interleaved=ctx.interleaved,
                ),
                tuple(kept), (True,) * 4, (dyq, dyk),
            )  # fmt: skip
        elif kept:
            q, k, *weights = kept
            dq, dk, dqw, dkw = backward_op(
                dyq, dyk, q, k, cos, sin, *weights, ctx.eps, ctx.interleaved
            )
        elif backend.double_backward():
            dq, dk = rotary_ref(dyq, dyk, cos, -sin, interleaved=ctx.interleaved)
        else:
            dq, dk = forward_op(dyq, dyk, cos, sin, None, None, ctx.eps, ctx.interleaved, True)
        return dq, dk, None, None, dqw, dkw, None, None


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:  # fmt: skip
    got = f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
    if not q.ndim == k.ndim == 4:
        raise ValueError(f"rotary: q and k must be (B, T, H, D); {got}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rotary: q and k must agree in B, T and D; {got}")
    B, T, _, D = q.shape
    if D < 2 or D % 2:
        raise ValueError(f"rotary: D must be even and at least 2; {got}")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"rotary: q and k must have one floating dtype; got {q.dtype}, {k.dtype}")
    table = f"got cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, q {tuple(q.shape)}"
    if cos.shape != sin.shape or cos.shape[:-1] not in ((T,), (B, T)):
        raise ValueError(f"rotary: cos and sin must be (T, R / 2) or (B, T, R / 2); {table}")
    if not 1 <= cos.shape[-1] <= D // 2:
        raise ValueError(f"rotary: cos and sin must have 1 to D / 2 columns; {table}")
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotary: cos and sin must be float32; got {cos.dtype}, {sin.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: cos and sin take no gradient; got one that requires it")
    if (q_weight is None) != (k_weight is None):
        which = "q_weight" if k_weight is None else "k_weight"
        raise ValueError(f"rotary: q_weight and k_weight go together; got {which} alone")
    named = (("k", k), ("cos", cos), ("sin", sin), ("q_weight", q_weight), ("k_weight", k_weight))
    for name, t in named:
        if t is not None and t.device != q.device:
            raise ValueError(
                f"rotary: all tensors must be on one device; got q {q.device}, {name} {t.device}"
            )
    if q_weight is None or k_weight is None:
        return
    for name, t in (("q_weight", q_weight), ("k_weight", k_weight)):
        if t.shape != (D,):
            raise ValueError(f"rotary: {name} must be ({D},), D of q; got {tuple(t.shape)}")
    if q_weight.dtype != k_weight.dtype or not q_weight.dtype.is_floating_point:
        raise TypeError(
            "rotary: q_weight and k_weight must have one floating dtype;"
            f" got {q_weight.dtype}, {k_weight.dtype}"
        )


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: each pair (a, b) of a head becomes (a c - b s, b c + a s).

    c and s are cosine and sine of an angle that grows with the position, so that q_i . k_j depends
    on i - j alone. With weights each head is first divided by its root mean square and multiplied
    by them: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        q: (B, T, H, D) in float32, float16 or bfloat16, D even. Any strides: the views of a packed
            qkv are read in place.
        k: (B, T, Hkv, D) of q's dtype.
        cos, sin: (T, R / 2), or (B, T, R / 2) for positions of each row's own, float32; see
            `rotary_table`. The first R <= D elements of a head are turned. They take no gradient.
        q_weight, k_weight: (D,), both or none, of one floating dtype, which may be wider than q's.
        eps: added to the mean square.
        interleaved: pairs are neighbours (2 i, 2 i + 1), as in GPT-J; if not, (i, i + R / 2), as
            in Llama.

    Returns:
        q and k turned, of their shapes and dtypes, contiguous where a kernel made them.

    Raises:
        ValueError: shapes or devices differ, D is odd, one weight without the other, or a table
            that requires gradient.
        TypeError: a dtype outside these rules.

    Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864, eq. 34; the norm is that of
    Dehghani et al., 2023, https://arxiv.org/abs/2302.05442, section 2.1, by root mean square.
    """
    _check(q, k, cos, sin, q_weight, k_weight)
    if backend.kernel_chosen("rotary", q, _obstacle(cos, q_weight)):
        args = backend.traceable(q, k, cos, sin, q_weight, k_weight, eps, interleaved)
        return RotaryFunction.apply(*args)  # type: ignore[no-any-return]
    return rotary_ref(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=interleaved
    )


def _obstacle(cos: Tensor, weight: Tensor | None) -> str | None:
    for name, t in (("cos", cos), ("q_weight", weight)):
        if t is not None and t.dtype == torch.float64:
            return f"the kernel takes no float64; {name} is"
    return None
