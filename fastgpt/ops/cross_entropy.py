"""Cross-entropy with label smoothing, z-loss and softcap."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.library import define, fake, impl

REDUCTIONS = ("mean", "sum", "none")
How = tuple[int, float, float, float]  # ignore_index, label_smoothing, z_loss, softcap (0: none)


def cap(u: Tensor, softcap: float) -> Tensor:
    """softcap tanh(u / softcap), at least in float32; with softcap 0, u."""
    z = u.to(torch.promote_types(u.dtype, torch.float32))
    return z if softcap == 0.0 else softcap * torch.tanh(z / softcap)


def reduce(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses, their sum, or their mean over the targets that count, with no host sync."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The specification of `cross_entropy`: torch's, in float32, on capped logits, and z-loss."""
    z = cap(logits, softcap or 0.0).reshape(-1, logits.shape[-1])
    flat = target.reshape(-1).long()
    if z_loss == 0.0 and reduction != "none":
        return F.cross_entropy(
            z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
    losses = F.cross_entropy(
        z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if z_loss != 0.0:
        square = torch.logsumexp(z, -1).square()
        losses = losses + z_loss * torch.where(flat == ignore_index, 0.0, square)
    return reduce(losses.view(target.shape), target, ignore_index, reduction)


def rows_fwd(logits: Tensor, target: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: logits (M, V) -> losses (M,), k and s (2, M); lse = (k + log2 s) / log2 e."""
    ignore_index, smoothing, z_loss, softcap = how
    z = cap(logits, softcap)
    top = z.amax(-1)
    log_s = (z - top[:, None]).exp_().sum(-1).log()
    at = torch.where(target == ignore_index, 0, target).long()
    gap = top - z.gather(1, at[:, None])[:, 0]
    losses = log_s + gap
    if smoothing != 0.0:
        losses = log_s + (1.0 - smoothing) * gap + smoothing * (top - z.mean(-1))
    if z_loss != 0.0:
        losses = losses + z_loss * (top + log_s).square()
    losses = torch.where(target == ignore_index, 0.0, losses)
    return losses, torch.stack((top * 1.4426950408889634, log_s.exp()))


def rows_bwd(dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, how: How) -> Tensor:
    """Plain PyTorch: dloss (M,), logits (M, V) -> dlogits (M, V), at least in float32."""
    ignore_index, smoothing, z_loss, softcap = how
    z = cap(logits, softcap)
    top, s = stats[0] * 0.6931471805599453, stats[1]
    keep = target != ignore_index
    w = torch.where(keep, dloss, 0.0)
    scale = w / s
    if z_loss != 0.0:
        scale = scale * (1.0 + 2.0 * z_loss * (top + s.log()))
    d = (z - top[:, None]).exp_().mul_(scale[:, None])
    if smoothing != 0.0:
        d.sub_((w * (smoothing / z.shape[1]))[:, None])
    here = keep & (target >= 0) & (target < z.shape[1])  # or the target is no column of these
    at = torch.where(here, target, 0).long()
    d.scatter_add_(1, at[:, None], torch.where(here, w * (smoothing - 1.0), 0.0)[:, None])
    if softcap != 0.0:
        d.mul_(1.0 - (z / softcap).square())
    return d.masked_fill_(~keep[:, None], 0.0)


def row_stride(logits: Tensor) -> int:
    """Of the gradient's rows: that of the logits, if they are only padded, else none."""
    (_, V), stride = logits.shape, logits.stride(0)
    return stride if logits.stride(1) == 1 and V <= stride < V + 64 else V


forward_op = define(
    "cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap) -> (Tensor, Tensor)"
)
backward_op = define(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor stats, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> Tensor"
)


@impl("cross_entropy_fwd")
def _cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits (M, V) -> losses (M,), stats (2, M)."""
    how = (ignore_index, label_smoothing, z_loss, softcap)
    if backend.runs_kernel(logits):
        from fastgpt.kernels.cross_entropy import cross_entropy_fwd

        return cross_entropy_fwd(logits, target, how)
    return rows_fwd(logits, target, how)


@fake("cross_entropy_fwd")
def _(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    M, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(M, dtype=dtype), logits.new_empty((2, M), dtype=dtype)


@impl("cross_entropy_bwd")
def _cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    how = (ignore_index, label_smoothing, z_loss, softcap)
    dlogits = logits.new_empty_strided(logits.shape, (row_stride(logits), 1))
    if backend.runs_kernel(logits):
        from fastgpt.kernels.cross_entropy import cross_entropy_bwd

        cross_entropy_bwd(dloss, logits, target, stats, how, dlogits)
        return dlogits
    return dlogits.copy_(rows_bwd(dloss, logits, target, stats, how))


@fake("cross_entropy_bwd")
def _(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    return logits.new_empty_strided(logits.shape, (row_stride(logits), 1))


class CrossEntropyFunction(torch.autograd.Function):
    """(logits (M, V), target (M,), ...) -> losses (M,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *how: Any) -> Tensor:
        losses, stats = forward_op(logits, target, *how)
        ctx.save_for_backward(logits, target, stats)
        ctx.how = how
        return losses  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, stats = ctx.saved_tensors
        ignore_index, label_smoothing, z_loss, softcap = ctx.how
        if backend.double_backward():
            (dlogits,) = backend.differentiable_grads(
                lambda z: cross_entropy_ref(
                    z, target, ignore_index=ignore_index, label_smoothing=label_smoothing,
                    z_loss=z_loss, softcap=softcap, reduction="none",
                ), (logits,), (True,), (dloss,),
            )  # fmt: skip
        else:
            dlogits = backward_op(dloss, logits, target, stats, *ctx.how)
        return dlogits, None, None, None, None, None


def check_how(
    op: str, target: Tensor, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str,
) -> None:  # fmt: skip
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: target must be int64 or int32; got {target.dtype}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1]; got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be at least 0 and finite; got {z_loss}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be None, or above 0 and finite; got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)};"
                         f" got {reduction!r}")  # fmt: skip


def check_range(op: str, target: Tensor, V: int, ignore_index: int) -> None:
    """Targets are known here only on a CPU: to ask a GPU would wait for it."""
    if (
        torch.compiler.is_compiling()
        or target.device.type != "cpu"
        or type(target) is not Tensor
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= V))
    if bad.any():
        raise ValueError(
            f"{op}: targets must be {ignore_index} or in [0, {V}); got {int(target[bad][0])}"
        )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of a softmax over the last dimension: with z = softcap tanh(logits / softcap),
    or the logits, and lse = log sum exp(z), a row's loss is
    lse - (1 - label_smoothing) z[target] - label_smoothing mean(z) + z_loss lse^2.

    Args:
        logits: (..., V) in float32, float16 or bfloat16, any strides, any V. They are kept for
            backward, with 8 bytes a row, and never overwritten.
        target: (...) int64 or int32, each in [0, V) or ignore_index. On a GPU nothing is read
            out of bounds for a target that is neither; its row's loss and gradient are NaN.
        ignore_index: a row of this target has loss 0 and gradient 0.
        label_smoothing: in [0, 1], how much of the target is spread evenly over all V.
        z_loss: weight of lse^2, which keeps lse near 0.
        softcap: bound of the logits, or None.
        reduction: "mean" over the rows not ignored (nan if there are none), "sum" or "none".

    Returns:
        The loss, a scalar or (...), in float32 (float64 of float64).

    Raises:
        ValueError: shapes or devices do not fit, an option is out of range, or, on a CPU, a target.
        TypeError: logits are not floating or targets no int64 or int32.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> fastgpt.ops.cross_entropy(logits, torch.tensor([1, -100]))  # the second takes no part
        tensor(0.6931)

    Szegedy et al., 2015, https://arxiv.org/abs/1512.00567, section 7 (label smoothing); Chowdhery
    et al., PaLM, 2022, https://arxiv.org/abs/2204.02311, section 5 (z-loss); Gemma Team, Gemma 2,
    2024, https://arxiv.org/abs/2408.00118 (softcap).
    """
    op = "cross_entropy"
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits must have a floating dtype; got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: logits must be (..., V), V at least 1, and target (...);"
            f" got logits {tuple(logits.shape)}, target {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"{op}: all tensors must be on one device;"
            f" got logits {logits.device}, target {target.device}"
        )
    check_how(op, target, label_smoothing, z_loss, softcap, reduction)
    check_range(op, target, logits.shape[-1], ignore_index)
    if not backend.kernel_chosen(op, logits):
        return cross_entropy_ref(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, reduction=reduction,
        )  # fmt: skip
    losses = CrossEntropyFunction.apply(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index, label_smoothing,
        z_loss, softcap or 0.0,
    ).view(target.shape)  # fmt: skip
    return reduce(losses, target, ignore_index, reduction)
