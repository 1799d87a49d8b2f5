"""One step of AdamW over lists of parameters, with clipping by the gradients' global norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.dropout import philox
from fastgpt.ops.library import define, fake, impl


@dataclass
class AdamWGroup:
    """Parameters with the same hyperparameters, and what belongs to each: lists of one length.

    Attributes:
        params: written in place.
        grads: of the parameters' shapes.
        exp_avgs, exp_avg_sqs: moments, of the parameters' shapes, float32 or the parameters' own
            dtype; written in place.
        steps: one float32 number each, how many steps were made; counted up in place.
        low: copies of the parameters in another dtype, written; or empty.
        lr: learning rate; a number, or a tensor of one element on the device.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step shrinks a parameter by lr * weight_decay.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    low: list[Tensor] = field(default_factory=list)
    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


def adamw_ref(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor,
    lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification of one parameter's step: -> param, exp_avg, exp_avg_sq after step number
    `step`; param in float32 or wider, not rounded to its own dtype."""
    beta1, beta2 = betas
    wide = torch.promote_types(param.dtype, torch.float32)
    p, g, t = param.to(wide), grad.to(wide), step.double()
    m = exp_avg.to(wide).lerp(g, 1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + g * g * (1 - beta2)
    rate = lr / (1 - beta1**t).to(wide)
    denominator = v.sqrt() / (1 - beta2**t).sqrt().to(wide) + eps
    return p * (1 - lr * weight_decay) - rate * m / denominator, m, v


def stochastic_bfloat16(x: Tensor, seed: Tensor, tensor: int, step: Tensor) -> Tensor:
    """float32 as bfloat16, rounded up or down with the probability that makes it right on average.

    Sixteen random bits are added below the last that is kept. They belong to an element: Philox
    with key seed and counter (element, tensor, step); see `dropout_mask` for the generator.
    """
    element = torch.arange(x.numel(), device=x.device).view(x.shape)
    high = (element >> 32) ^ (tensor << 8)
    bits = philox(seed.reshape(()), element & 0xFFFFFFFF, high, step.long().reshape(()))
    down = ((x.view(torch.int32).long() + (bits & 0xFFFF)) & ~0xFFFF) & 0xFFFFFFFF
    signed = torch.where(down >= 2**31, down - 2**32, down).int()
    return torch.where(x.isfinite(), signed.view(torch.float32), x).bfloat16()


step_op = define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor(e!)[] low, Tensor[] lrs, float[] hyper, int[] rules,"
    " Tensor(f!) control, Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm,"
    " bool skip_nonfinite, Tensor? seed) -> ()"
)


@impl("adamw_")
def _adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], low: list[Tensor], lrs: list[Tensor], hyper: list[float],
    rules: list[int], control: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    max_grad_norm: float | None, skip_nonfinite: bool, seed: Tensor | None,
) -> None:  # fmt: skip
    if backend.runs_kernel(params[0]):
        from fastgpt.kernels.adamw import adamw as launch

        launch(
            params, grads, exp_avgs, exp_avg_sqs, steps, low, lrs, hyper, rules, control,
            grad_scale, found_inf, max_grad_norm, skip_nonfinite, seed,
        )  # fmt: skip
        return
    factor, skip = _prepared(grads, control, grad_scale, found_inf, max_grad_norm, skip_nonfinite)
    for n, rule in enumerate(rules):
        lr, beta1, beta2, eps, decay = hyper[5 * rule : 5 * rule + 5]
        _one(
            params[n], grads[n], exp_avgs[n], exp_avg_sqs[n], steps[n], low[n] if low else None,
            lrs[rule] if lrs else lr, (beta1, beta2), eps, decay, factor, skip, seed, n,
        )  # fmt: skip


@fake("adamw_")
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], low: list[Tensor], lrs: list[Tensor], hyper: list[float],
    rules: list[int], control: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    max_grad_norm: float | None, skip_nonfinite: bool, seed: Tensor | None,
) -> None:  # fmt: skip
    return None


def _prepared(
    grads: Sequence[Tensor], control: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    max_grad_norm: float | None, skip_nonfinite: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """-> factor of the gradients, whether to skip the step (0 or 1), None for none; into control
    too. Nothing is read back by the host."""
    factor = None if grad_scale is None else grad_scale.reciprocal().reshape(())
    skip = None if found_inf is None else (found_inf.reshape(()) != 0).float()
    if max_grad_norm is not None or skip_nonfinite:
        norms = torch._foreach_norm([g if g.dtype.itemsize > 2 else g.float() for g in grads])
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
        norm = norm if factor is None else norm * factor
        control[2] = norm
        if max_grad_norm is not None:
            clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if skip_nonfinite:
            bad = (~norm.isfinite()).float()
            skip = bad if skip is None else torch.maximum(skip, bad)
    if factor is not None:
        control[0] = factor
    if skip is not None:
        control[1] = skip
        control[3] += skip
    return factor, skip


def _one(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor,
    low: Tensor | None, lr: float | Tensor, betas: tuple[float, float], eps: float,
    weight_decay: float, factor: Tensor | None, skip: Tensor | None, seed: Tensor | None,
    tensor: int,
) -> None:  # fmt: skip
    """A parameter's step by `adamw_ref`, in place."""
    step += 1 if skip is None else 1 - skip
    g = grad.to(torch.promote_types(grad.dtype, torch.float32))
    g = g if factor is None else g * factor
    p, m, v = adamw_ref(param, g, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay)
    p_low = p
    if seed is not None and param.dtype == torch.bfloat16:
        p = stochastic_bfloat16(p, seed, tensor, step)
    new = [(param, p), (exp_avg, m), (exp_avg_sq, v)] + ([] if low is None else [(low, p_low)])
    for old, made in new:
        made = made.to(old.dtype)
        old.copy_(made if skip is None else torch.where(skip != 0, old, made))


# torch.compile breaks the graph here, as it does for torch's own optimizer.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _fused(group: AdamWGroup, factor: Tensor | None, skip: Tensor | None) -> None:
    torch._foreach_add_(group.steps, 1)
    torch._fused_adamw_(  # type: ignore[call-overload]
        group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, [], group.steps, lr=group.lr,
        beta1=group.betas[0], beta2=group.betas[1], weight_decay=group.weight_decay, eps=group.eps,
        amsgrad=False, maximize=False, grad_scale=None if factor is None else factor.reciprocal(),
        found_inf=skip,
    )  # fmt: skip
    if skip is not None:
        torch._foreach_sub_(group.steps, [skip] * len(group.steps))


def _by_copies(group: AdamWGroup, factor: Tensor | None, skip: Tensor | None) -> None:
    """The same of 16-bit parameters with float32 moments, one after the other in float32."""
    tensors = (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, group.steps)
    for n, (p, g, m, v, step) in enumerate(zip(*tensors, strict=True)):
        one = replace(
            group, params=[p.to(torch.float32, copy=True)], grads=[g.float()], exp_avgs=[m],
            exp_avg_sqs=[v], steps=[step], low=[],
        )  # fmt: skip
        _fused(one, factor, skip)
        p.copy_(one.params[0])
        if group.low:
            group.low[n].copy_(one.params[0])


def _plain(
    groups: Sequence[AdamWGroup], control: Tensor, grad_scale: Tensor | None,
    found_inf: Tensor | None, max_grad_norm: float | None, skip_nonfinite: bool,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """PyTorch's own fused step where it takes the dtypes, else `adamw_ref`."""
    grads = [g for group in groups for g in group.grads]
    factor, skip = _prepared(grads, control, grad_scale, found_inf, max_grad_norm, skip_nonfinite)
    seen = 0
    for group in groups:
        tensors = (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs)
        dtypes = [{t.dtype for t in column} for column in tensors]
        rounds = seed is not None and torch.bfloat16 in dtypes[0]
        narrow = dtypes[0] | dtypes[1] <= {torch.bfloat16, torch.float16, torch.float32}
        if len(set().union(*dtypes)) == 1 and not rounds:
            _fused(group, factor, skip)
            if group.low:
                torch._foreach_copy_(group.low, group.params)
        elif narrow and dtypes[2] | dtypes[3] == {torch.float32} and not rounds:
            _by_copies(group, factor, skip)
        else:
            for n, (p, g, m, v, step) in enumerate(zip(*tensors, group.steps, strict=True)):
                low = group.low[n] if group.low else None
                _one(
                    p, g, m, v, step, low, group.lr, group.betas, group.eps, group.weight_decay,
                    factor, skip, seed, seen + n,
                )  # fmt: skip
        seen += len(group.params)


def _fits(group: AdamWGroup, x: Tensor) -> bool:
    """Whether a group's tensors are what they must be, asked in few words a tensor."""
    params, low, steps = group.params, group.low, group.steps
    columns = (group.grads, group.exp_avgs, group.exp_avg_sqs, *([low] if low else []))
    shapes = [p.shape for p in params]
    if any([t.shape for t in column] != shapes for column in columns):
        return False
    kinds = {(t.device, t.dtype, t.layout) for c in (params, steps, *columns) for t in c}
    return (
        len(steps) == len(params)
        and all(step.numel() == 1 for step in steps)
        and all(d == x.device and l == torch.strided for d, _, l in kinds)
        and all(dtype.is_floating_point for _, dtype, _ in kinds)
    )


def _say_what_does_not_fit(group: AdamWGroup, x: Tensor) -> None:
    many = len(group.params)
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps", "low"):
        column = getattr(group, name)
        if len(column) != many and not (name == "low" and not column):
            raise ValueError(
                f"adamw: there must be one of {name} for each of params;"
                f" got {len(column)} for {many}"
            )
        for p, t in zip(group.params, column, strict=False):
            if t.numel() != 1 if name == "steps" else t.shape != p.shape:
                want = "(), one number" if name == "steps" else f"{tuple(p.shape)}, as params"
                raise ValueError(f"adamw: {name} must be {want}; got {tuple(t.shape)}")
            if t.device != x.device or p.device != x.device:
                raise ValueError(
                    "adamw: all tensors must be on one device;"
                    f" got params {p.device}, {name} {t.device}, the first {x.device}"
                )
            if t.layout != torch.strided:
                raise ValueError(f"adamw: {name} must be dense tensors; got {t.layout}")
            if not t.dtype.is_floating_point or not p.dtype.is_floating_point:
                raise TypeError(
                    "adamw: all tensors must have a floating dtype;"
                    f" got params {p.dtype}, {name} {t.dtype}"
                )


def _check(
    groups: Sequence[AdamWGroup], control: Tensor, seed: Tensor | None, max_grad_norm: float | None
) -> None:
    x = groups[0].params[0]
    if len({bool(group.low) for group in groups}) > 1:
        raise ValueError("adamw: low must be given for all groups or for none; got some")
    for group in groups:
        if not _fits(group, x):
            _say_what_does_not_fit(group, x)
        if bad := [beta for beta in group.betas if not 0.0 <= beta < 1.0]:
            raise ValueError(f"adamw: betas must lie in [0, 1); got {bad[0]}")
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(group, name)
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"adamw: {name} must be one number; got shape {tuple(value.shape)}"
                    )
            elif not value >= 0.0:
                raise ValueError(f"adamw: {name} must be at least 0; got {value}")
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"adamw: max_grad_norm must be above 0; got {max_grad_norm}")
    if control.shape != (4,) or control.dtype != torch.float32:
        raise ValueError(
            f"adamw: control must be 4 of float32; got {tuple(control.shape)} of {control.dtype}"
        )
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"adamw: seed must be one int64; got {seed.dtype} of shape {tuple(seed.shape)}"
        )


def _dense(t: Tensor) -> bool:
    """Whether t's elements fill its part of memory, in whatever order."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def _obstacle(groups: Sequence[AdamWGroup]) -> str | None:
    for group in groups:
        for p, m, v, step in zip(
            group.params, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True
        ):
            if p.dtype not in backend.KERNEL_DTYPES:
                return f"the kernel takes no {p.dtype}"
            if m.dtype != torch.float32 or v.dtype != torch.float32 or step.dtype != torch.float32:
                return "the kernel's moments and steps are float32"
            if not _dense(p) or not m.stride() == v.stride() == p.stride():
                return "a parameter is not dense, or its moments are laid out in another way"
        for p, low in zip(group.params, group.low, strict=False):
            if low.stride() != p.stride():
                return "a low-precision copy is laid out in another way than its parameter"
    return None


def _like(g: Tensor, p: Tensor) -> Tensor:
    """g in p's layout, and of a dtype that the kernel takes."""
    if g.stride() == p.stride() and g.dtype in backend.KERNEL_DTYPES:
        return g
    return torch.empty_like(p, dtype=min(g.dtype, torch.float32, key=lambda d: d.itemsize)).copy_(g)


@torch.no_grad()
def adamw(
    groups: Sequence[AdamWGroup],
    control: Tensor,
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """One step of AdamW in place: p = p (1 - lr wd) - lr mhat / (sqrt(vhat) + eps).

    mhat = m / (1 - beta1^t) and vhat = v / (1 - beta2^t), with m += (1 - beta1) (g - m),
    v += (1 - beta2) (g^2 - v) and g the gradient, unscaled and clipped. The global norm, the
    clipping factor, the count of steps and whether one is skipped stay on the device.

    Args:
        groups: parameters and what belongs to them; see `AdamWGroup`. The kernel leaves grads as
            they are; PyTorch's path leaves the clipped ones there, as its own fused step does.
        control: (4,) float32 on the device, (1, 0, 0, 0) before the first step. After a step: the
            factor that gradients were multiplied with, whether the step was skipped, the norm of
            all gradients before clipping (with max_grad_norm or skip_nonfinite), and how many
            steps were skipped so far.
        max_grad_norm: gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)).
        skip_nonfinite: a step whose gradient norm is not finite in float32 changes nothing.
        grad_scale: one float32; gradients are divided by it first (GradScaler's).
        found_inf: one float32; the step is skipped if it is not 0 (GradScaler's).
        seed: one int64 on the device: bfloat16 parameters are rounded stochastically, with bits
            that depend on it, the element, the tensor's number and the step. None rounds to
            nearest.

    Raises:
        ValueError: numbers of tensors, shapes or devices differ, or a number is out of range.
        TypeError: a tensor is not floating.

    Loshchilov, Hutter, Decoupled weight decay regularization, 2019,
    https://arxiv.org/abs/1711.05101, alg. 2.
    """
    groups = [group for group in groups if group.params]
    if not groups:
        return
    _check(groups, control, seed, max_grad_norm)
    if not backend.kernel_chosen("adamw", groups[0].params[0], _obstacle(groups)):
        _plain(groups, control, grad_scale, found_inf, max_grad_norm, skip_nonfinite, seed)
        return
    numbers: list[float] = []
    lrs: list[Tensor] = []
    tensors = any(isinstance(group.lr, Tensor) for group in groups)
    device = groups[0].params[0].device
    for group in groups:
        if tensors:
            lrs.append(
                group.lr.to(device, torch.float32)
                if isinstance(group.lr, Tensor)
                else torch.full((), group.lr, dtype=torch.float32, device=device)
            )
        lr = 0.0 if isinstance(group.lr, Tensor) else group.lr
        numbers += [lr, *group.betas, group.eps, group.weight_decay]
    step_op(
        [p for group in groups for p in group.params],
        [_like(g, p) for group in groups for p, g in zip(group.params, group.grads, strict=True)],
        [m for group in groups for m in group.exp_avgs],
        [v for group in groups for v in group.exp_avg_sqs],
        [step for group in groups for step in group.steps],
        [low for group in groups for low in group.low],
        lrs, numbers, [n for n, group in enumerate(groups) for _ in group.params], control,
        grad_scale, found_inf, max_grad_norm, skip_nonfinite, seed,
    )  # fmt: skip
