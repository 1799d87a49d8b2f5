"""The optimizer of a training run, from its configuration."""

import math
from dataclasses import dataclass

from torch import nn

from fastgpt.model import GPT
from fastgpt.optim import AdamW, MuonAdamW, decay_groups

NAMES = ("adamw", "muon")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
        name: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for all else.
        lr: the highest learning rate.
        weight_decay: of matrices and embeddings; biases and norms do not decay.
        decay_embeddings: whether the embeddings decay too.
        beta1: AdamW's.
        beta2: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        muon_lr: Muon's learning rate if it is to be another than lr.
        clip: the largest norm of all gradients together; 0 for no bound.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    muon_lr: float | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optim: name must be one of {', '.join(NAMES)}; got {self.name!r}")
        for name in ("lr", "eps", "muon_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"optim: {name} must be positive; got {value}")
        for name in ("weight_decay", "clip"):
            if not (value := getattr(self, name)) >= 0.0:
                raise ValueError(f"optim: {name} must not be negative; got {value}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"optim: {name} must lie in [0, 1); got {value}")
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"optim: muon_lr is of name muon; got name {self.name}")

    def build(
        self, model: nn.Module, *, skip_nonfinite: bool = False, clip: bool = True
    ) -> AdamW | MuonAdamW:
        """The optimizer of a model's parameters, of those that take a gradient.

        Args:
            model: a GPT, also one that is wrapped, sharded or compiled.
            skip_nonfinite: see `fastgpt.optim.AdamW`.
            clip: whether step() clips, and measures grad_norm; False where the caller does.

        Raises:
            ValueError: no parameter takes a gradient.
        """
        bound = None if not clip else self.clip if self.clip > 0.0 else math.inf
        betas = (self.beta1, self.beta2)
        blocks = [m.h for m in model.modules() if isinstance(m, GPT)]
        hidden = [
            p for h in blocks for p in h.parameters() if p.requires_grad and p.ndim == 2
        ] if self.name == "muon" else []  # fmt: skip
        matrices = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in matrices]
        others = decay_groups(model, self.weight_decay, embeddings=self.decay_embeddings, only=rest)
        if not hidden and not others:
            raise ValueError("optim: a parameter must take a gradient; got none that does")
        if self.name == "adamw":
            return AdamW(
                others, self.lr, betas, self.eps, max_grad_norm=bound,
                skip_nonfinite=skip_nonfinite,
            )  # fmt: skip
        return MuonAdamW(
            hidden, others, self.lr, self.weight_decay, muon_lr=self.muon_lr,
            momentum=self.momentum, betas=betas, eps=self.eps, max_grad_norm=bound,
            skip_nonfinite=skip_nonfinite,
        )  # fmt: skip
