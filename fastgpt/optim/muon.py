"""Muon for matrices and AdamW for everything else, as one optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from fastgpt import sharded
from fastgpt.optim.adamw import AdamW, restore_moments

_OWN = ("max_grad_norm", "skip_nonfinite", "grad_norm", "skipped_steps", "_inner")


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for a model's hidden matrices, AdamW for the rest, one state_dict.

    Muon steps by the nearest matrix with all singular values near one to the momentum,

        m = momentum m + (1 - momentum) g;   p = p (1 - lr wd) - 0.2 sqrt(max(rows, columns)) lr O,
        O = newton_schulz((1 - momentum) g + momentum m),

    with the factor of Liu et al., which gives a step the root mean square of one of AdamW's: both
    take the same learning rate and weight decay. Embeddings, output layers, biases and norms
    belong to AdamW. The two halves are groups of one optimizer, whose key "algorithm" says which
    is whose; schedulers, state_dict and GradScaler take it for one. A matrix that stacks several,
    as c_attn does q's, k's and v's, is taken for one. The learning rate of Muon is read by the
    host: no CUDA graph.

    Args:
        matrices: Muon's parameters or groups of them, two-dimensional.
        others: AdamW's.
        lr, weight_decay: of both, where a group does not say its own.
        muon_lr: of matrices, lr if None.
        momentum: of matrices.
        betas, eps: of others.
        max_grad_norm: gradients are clipped to this global norm of all of them.
        skip_nonfinite: a step whose gradients are not finite changes nothing; `skipped_steps`
            counts them. The host waits for the norm.

    Attributes:
        grad_norm: 0-dim tensor, the norm before clipping in the last step; with max_grad_norm or
            skip_nonfinite.
        skipped_steps: 0-dim tensor, how many steps were skipped.

    Raises:
        ValueError: a number is out of range, a parameter of matrices is no matrix, or there is no
            parameter at all.
        ImportError: torch is older than 2.9, which has no Muon.

    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is scalable for LLM training, 2025,
    https://arxiv.org/abs/2502.16982, eq. 4.
    """

    def __init__(
        self,
        matrices: ParamsT,
        others: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        muon_lr: float | None = None,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"MuonAdamW: needs torch 2.9 or newer; got {torch.__version__}")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"MuonAdamW: max_grad_norm must be above 0; got {max_grad_norm}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"MuonAdamW: momentum must lie in [0, 1); got {momentum}")
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self._inner: dict[str, torch.optim.Optimizer] = {}
        if first := _as_list(matrices):
            self._inner["muon"] = torch.optim.Muon(
                first, lr if muon_lr is None else muon_lr, weight_decay, momentum,
                adjust_lr_fn="match_rms_adamw",
            )  # fmt: skip
        if second := _as_list(others):
            self._inner["adamw"] = AdamW(second, lr, betas, eps, weight_decay)
        if not self._inner:
            raise ValueError("MuonAdamW: there must be a parameter; got none")
        for name, inner in self._inner.items():
            for group in inner.param_groups:
                group["algorithm"] = name
        super().__init__([g for inner in self._inner.values() for g in inner.param_groups], {})
        device = self.param_groups[0]["params"][0].device
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; closure, if given, runs the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._clip():
            for name, inner in self._inner.items():
                # A loaded state_dict has brought other groups and another state.
                inner.param_groups = [g for g in self.param_groups if g["algorithm"] == name]
                inner.state = self.state
                inner.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN}

    @torch.no_grad()
    def _clip(self) -> bool:
        """Scale the gradients down to max_grad_norm; whether the step is to be made."""
        if self.max_grad_norm is None and not self.skip_nonfinite:
            return True
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.grad_norm = norm = sharded.norm(grads)  # of all ranks
        if self.skip_nonfinite and not math.isfinite(float(norm)):
            self.skipped_steps += 1
            return False
        if self.max_grad_norm is not None and math.isfinite(self.max_grad_norm):
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                sharded.local(grad).mul_(factor.to(grad.device))
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict of this class.

        Raises:
            ValueError: another optimizer made it, or one with other groups.
        """
        want = [group["algorithm"] for group in self.param_groups]
        got = [group.get("algorithm") for group in state_dict["param_groups"]]
        if want != got:
            raise ValueError(
                f"MuonAdamW: the state's groups must belong to {', '.join(want)}; got"
                f" {', '.join(map(str, got))}"
            )
        super().load_state_dict(state_dict)
        restore_moments(self, state_dict)


def _as_list(params: ParamsT) -> list[Any]:
    return list(params)
