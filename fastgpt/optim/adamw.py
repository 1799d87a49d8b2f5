"""AdamW on the fused op, with clipping, low-precision copies, stochastic rounding."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastgpt import sharded
from fastgpt.ops.adamw import AdamWGroup, adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COLUMNS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "low")
_OWN = ("max_grad_norm", "skip_nonfinite", "stochastic_rounding", "seed", "copies", "control")


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def restore_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give an optimizer that has loaded state_dict the moments' precision, which torch has rounded
    to the parameters'."""
    saved = [n for group in state_dict["param_groups"] for n in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for n, p in zip(saved, own, strict=True):
        state = optimizer.state.get(p, {})
        for name in _MOMENTS:
            if name in state and state[name].dtype != _moment_dtype(p):
                moment = torch.empty_like(p, dtype=_moment_dtype(p))
                state[name] = moment.copy_(state_dict["state"][n][name])


def _localize(group: AdamWGroup) -> None:
    """Leave of a group the parts of its tensors that lie here; some may be empty."""
    for name in _COLUMNS:
        setattr(group, name, [sharded.local(t) for t in getattr(group, name)])


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, all parameters in at most a few launches, with clipping in the same pass.

    State, state_dict, schedulers, closures and GradScaler are those of torch.optim.AdamW with
    fused=True, whose state_dict can be loaded and the other way round. Moments of 16-bit
    parameters are float32. Without a kernel (on a CPU) it is torch's own fused step. Of DTensors
    each rank steps its part, and the norm is that of all ranks.

    Args:
        params, lr, betas, eps, weight_decay: as torch.optim.AdamW takes them, all parameters on
            one device; lr may be a tensor there, for CUDA graphs.
        max_grad_norm: gradients are clipped to this global norm, as by clip_grad_norm_, which
            then need not be called.
        skip_nonfinite: a step whose gradients are not finite changes nothing; `skipped_steps`
            counts them.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, right on
            average, so that steps smaller than their last bit are not lost.
        seed: of stochastic rounding; bits depend on it, the element and the step.
        copies: each parameter's copy in another dtype, as the bfloat16 weights that a model works
            with, written in the same pass. Where a parameter has no gradient, its copy's counts.

    Attributes:
        grad_norm: 0-dim tensor, the norm before clipping in the last step; with max_grad_norm or
            skip_nonfinite.
        skipped_steps: 0-dim tensor, how many steps were skipped.

    Raises:
        ValueError: a number is out of range, or copies are not of all parameters.

    Loshchilov, Hutter, Decoupled weight decay regularization, 2019,
    https://arxiv.org/abs/1711.05101, alg. 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"AdamW: max_grad_norm must be above 0; got {max_grad_norm}")
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.copies = dict(copies or {})
        self.control: Tensor | None = None
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self.copies and (lacking := sum(p not in self.copies for p in parameters)):
            raise ValueError(
                "AdamW: copies must have one for each parameter;"
                f" got none for {lacking} of {len(parameters)}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.AdamW's.

        Raises:
            ValueError: the group has amsgrad or maximize.
        """
        for name in ("amsgrad", "maximize"):
            if param_group.get(name):
                raise ValueError(f"AdamW: a group with {name} is not supported")
        super().add_param_group(param_group)

    @property
    def grad_norm(self) -> Tensor:
        return self._made_control()[2]

    @property
    def skipped_steps(self) -> Tensor:
        return self._made_control()[3]

    def _made_control(self) -> Tensor:
        if self.control is None:
            device = self.param_groups[0]["params"][0].device
            self.control = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
        return self.control

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the parameters and of their copies."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            if copy.grad is not None and not set_to_none:
                copy.grad.zero_()
            elif set_to_none:
                copy.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; closure, if given, runs the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        control = self._made_control()
        seed = None
        if self.stochastic_rounding:
            seed = torch.full((1,), self.seed, dtype=torch.int64, device=control.device)
        groups = [self._with_grads(group) for group in self.param_groups]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        max_grad_norm, skip_nonfinite, norm = self.max_grad_norm, self.skip_nonfinite, None
        if any(sharded.is_sharded(p) for group in groups for p in group.params):
            if max_grad_norm is not None or skip_nonfinite:
                norm, grad_scale, found_inf = self._over_all_ranks(groups, grad_scale, found_inf)
                max_grad_norm, skip_nonfinite = None, False
            for group in groups:
                _localize(group)
        adamw(
            groups, control, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite,
            grad_scale=grad_scale, found_inf=found_inf, seed=seed,
        )  # fmt: skip
        if norm is not None:
            control[2] = norm
        return loss

    @torch.no_grad()
    def _over_all_ranks(
        self, groups: list[AdamWGroup], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The norm of all ranks' gradients, and what clipping and skipping by it come to, as a
        scale that gradients are divided by and a mark that skips the step."""
        norm = sharded.norm([g for group in groups for g in group.grads])
        if grad_scale is not None:
            norm = norm / grad_scale.reshape(())
        if self.max_grad_norm is not None:
            unclip = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
            grad_scale = unclip if grad_scale is None else grad_scale.reshape(()) * unclip
        if self.skip_nonfinite:
            bad = (~norm.isfinite()).float()
            found_inf = bad if found_inf is None else torch.maximum(found_inf.reshape(()), bad)
        return norm, grad_scale, found_inf

    @torch.no_grad()
    def _with_grads(self, group: dict[str, Any]) -> AdamWGroup:
        """The parameters of a group that have a gradient; their state is made where it is not."""
        made = AdamWGroup(
            [], [], [], [], [], lr=group["lr"], betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
        for p in group["params"]:
            copy = self.copies.get(p) if self.copies else None
            grad = p.grad if p.grad is not None or copy is None else copy.grad
            if grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(p, dtype=_moment_dtype(p))
            made.params.append(p)
            made.grads.append(grad)
            made.exp_avgs.append(state["exp_avg"])
            made.exp_avg_sqs.append(state["exp_avg_sq"])
            made.steps.append(state["step"])
            if copy is not None:
                made.low.append(copy)
        return made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict of this class or of torch.optim.AdamW.

        Raises:
            ValueError: it was made with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"AdamW: a state with {name} cannot be loaded")
        super().load_state_dict(state_dict)
        restore_moments(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"] = True
            for p in group["params"]:
                if own := self.state.get(p):
                    own["step"] = own["step"].to(p.device, torch.float32)
