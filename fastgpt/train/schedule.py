"""The learning rate over a run: a warm-up, then cosine, warm-up-stable-decay, or constant."""

import math
from dataclasses import dataclass

import torch

KINDS = ("cosine", "wsd", "constant")
DECAYS = ("linear", "sqrt", "cosine")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate rises and falls, as a share of the optimizer's.

    A run that has a longest time falls with its steps or with its time, whichever is further on.

    Attributes:
        kind: "cosine" falls from the start to the end of the run by half a cosine; "wsd" (warm-up,
            stable, decay) keeps the rate up to the last decay_share of the run; "constant" keeps
            it.
        warmup: steps over which the rate rises from 0, in a straight line.
        floor: the rate at the end, as a share of the highest; not of "constant".
        decay_share: of "wsd", the share of the run in which the rate falls.
        decay: of "wsd", how it falls there: "linear", "sqrt" (one less the square root) or
            "cosine".
    """

    kind: str = "cosine"
    warmup: int = 100
    floor: float = 0.1
    decay_share: float = 0.2
    decay: str = "sqrt"

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("decay", DECAYS)):
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"schedule: {name} must be one of {', '.join(known)}; got {got!r}")
        if self.warmup < 0:
            raise ValueError(f"schedule: warmup must not be negative; got {self.warmup}")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"schedule: floor is a share of lr, in [0, 1]; got {self.floor}")
        if not 0.0 < self.decay_share <= 1.0:
            raise ValueError(f"schedule: decay_share must lie in (0, 1]; got {self.decay_share}")

    def factor(self, step: int, progress: float) -> float:
        """What the learning rate of a step is multiplied with.

        min(rise, floor + (1 - floor) fall), rise = (step + 1) / warmup, and fall from 1 to 0: for
        "cosine" (1 + cos(pi progress)) / 2; for "wsd" 1 - x, 1 - sqrt(x) or (1 + cos(pi x)) / 2
        with x the share of the decay that is behind.

        Args:
            step: steps made before it.
            progress: the share of the run that is behind, in [0, 1].

        Loshchilov, Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983, eq. 5; Hägele et al.,
        Scaling laws and compute-optimal training beyond fixed training durations, 2024,
        https://arxiv.org/abs/2405.18392, section 3 (wsd, with 1 - sqrt the best decay).
        """
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        if self.kind == "constant":
            return min(rise, 1.0)
        if self.kind == "cosine":
            fall = _half_cosine(progress)
        else:
            x = min(1.0, max(0.0, (progress - (1.0 - self.decay_share)) / self.decay_share))
            fall = {"linear": 1.0 - x, "sqrt": 1.0 - math.sqrt(x), "cosine": _half_cosine(x)}[
                self.decay
            ]
        return min(rise, self.floor + (1.0 - self.floor) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to factor times that which it started with, "initial_lr".

    Args:
        optimizer: a rate that is a tensor is filled in place, as CUDA graphs need it.
        factor: see `ScheduleConfig.factor`.

    Returns:
        The last group's, for the log.
    """
    lr = 0.0
    for group in optimizer.param_groups:
        lr = float(group.setdefault("initial_lr", float(group["lr"]))) * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def _half_cosine(x: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * x))
