"""How the next token is chosen: from logits to a distribution, and from that to an id.

The order is that of Hugging Face's transformers: repetition penalty, temperature, top-k, top-p,
min-p; with the same options the distribution is theirs.

A token is drawn by inverse transform: u uniform in [0, 1) picks the first id whose cumulative
probability exceeds u. Row b spends one number a token from a generator of its own seed, so that a
row's text does not depend on the rows beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: if given, choose among the k likeliest tokens only (and those as likely as the last).
        top_p: if given, among the fewest likeliest tokens whose probabilities reach top_p (Holtzman
            et al., 2019, https://arxiv.org/abs/1904.09751).
        min_p: if given, among those at least min_p times as likely as the likeliest (Nguyen et
            al., 2024, https://arxiv.org/abs/2407.01082).
        repetition_penalty: logits of ids that were seen before, in the prompt or since, are divided
            by it where positive and multiplied where negative (Keskar et al., 2019,
            https://arxiv.org/abs/1909.05858).

    Raises:
        ValueError: a number outside its range, or an option that temperature 0 leaves nothing to.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        t, penalty = self.temperature, self.repetition_penalty
        if not 0.0 <= t < math.inf:
            raise ValueError(f"generate: temperature must be 0 or more, and finite; got {t}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1; got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"generate: top_p must lie in (0, 1]; got {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"generate: min_p must lie in [0, 1]; got {self.min_p}")
        if not 0.0 < penalty < math.inf:
            raise ValueError(
                f"generate: repetition_penalty must be positive, and finite; got {penalty}"
            )
        if t == 0.0:
            for name in ("top_k", "top_p", "min_p"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        "generate: temperature 0 takes the likeliest token and goes with no top_k,"
                        f" top_p or min_p; got {name} {value}"
                    )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0.0

    @property
    def looks_back(self) -> bool:
        """Whether what came before has a say."""
        return self.repetition_penalty != 1.0

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution that the next token is drawn from.

        Args:
            logits: (B, V), of any float dtype.
            seen: (B, V) bool, the ids that came before; needed where there is a repetition penalty.

        Returns:
            (B, V) float32; one 1 a row where temperature is 0.
        """
        logits = self.penalized(logits, seen)
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # From the largest logit down, so that a small temperature cannot overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1.0:
            # From the least likely up, as in transformers: sums are rounded as there.
            rising, order = logits.sort(dim=-1, stable=True)
            out = rising.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            out[:, -1] = False
            logits = logits.masked_fill(torch.zeros_like(out).scatter_(-1, order, out), -math.inf)
        p = logits.softmax(-1)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits: Tensor, u: Tensor, seen: Tensor | None = None) -> Tensor:
        """The next id of each row, by one number a row.

        Args:
            logits, seen: see `probabilities`.
            u: (B,) float64, uniform in [0, 1).

        Returns:
            (B,) int64.
        """
        if self.greedy:
            return self.penalized(logits, seen).argmax(-1)
        return draw(self.probabilities(logits, seen), u)

    def penalized(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, V), or log-probabilities, in float32, those of seen ids lowered."""
        # argmax of 16 bits is slower on a CPU, too.
        logits = logits.float()
        if not self.looks_back:
            return logits
        if seen is None:
            raise ValueError("generate: a repetition penalty needs the ids that were seen")
        penalty = self.repetition_penalty
        lower = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(seen, lower, logits)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Draw one id a row: the first whose cumulative probability exceeds u.

    Args:
        p: (B, V), not negative; a row need not sum to one.
        u: (B,) float64, uniform in [0, 1).

    Returns:
        (B,) int64, none of probability 0.
    """
    total = p.double().cumsum(-1)
    at = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)
    return at.squeeze(-1).clamp_(max=p.shape[-1] - 1)


def uniform(seed: int | Sequence[int] | None, B: int, n: int) -> Tensor:
    """Numbers to draw n tokens of B rows by.

    Args:
        seed: one for each row; or one number s, and row b's is s + b; drawn from torch's generator
            if None.

    Returns:
        (n, B) float64 in [0, 1), column b from row b's own seed.
    """
    columns = [np.random.default_rng(s).random(n) for s in row_seeds(seed, B)]
    return torch.from_numpy(np.stack(columns, axis=1))


def row_seeds(seed: int | Sequence[int] | None, B: int) -> list[int]:
    """The seeds of B rows; see `uniform`.

    Raises:
        ValueError: they are not one a row, or one is negative.
    """
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    seeds = [seed + b for b in range(B)] if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise ValueError(f"generate: there must be one seed a row, {B}; got {len(seeds)}")
    if min(seeds, default=0) < 0:
        raise ValueError(f"generate: a seed must not be negative; got {min(seeds)}")
    return seeds
