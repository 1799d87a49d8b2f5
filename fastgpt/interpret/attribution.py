"""How much of a prediction each token of the text accounts for, by captum."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.interpret.capture import gpt_of
from fastgpt.interpret.heads import _check
from fastgpt.interpret.stream import (
    State,
    after,
    evaluating,
    final,
    log_probability,
    token_rows,
    with_positions,
)
from fastgpt.model import GPT

METHODS = ("integrated_gradients", "gradient_x_input")
CLOSE = 0.01  # of the whole: how far integrated gradients may be from complete
MOST_STEPS = 512
ROOM = 2**13  # tokens that go through the model at a time


@dataclass(frozen=True)
class Attribution:
    """Scores of the tokens, in nats of log p(target).

    Attributes:
        scores: (T,) float32; positive where a token makes the target likelier.
        value: log p(target) after the text.
        baseline: the same after a text that says nothing; of integrated gradients.
        steps: points of the integral.
    """

    scores: Tensor
    value: float
    baseline: float | None = None
    steps: int | None = None

    @property
    def error(self) -> float | None:
        """Sum of the scores less what they are to sum to, value - baseline."""
        if self.baseline is None:
            return None
        return float(self.scores.double().sum()) - (self.value - self.baseline)


def token_attribution(
    model: nn.Module, idx: Tensor, target: int, method: str = "integrated_gradients"
) -> Attribution:
    """Attribute F = log p(target | text) to the tokens of the text.

    Integrated gradients go the straight way from a baseline e' to the tokens' embeddings e:

        score_t = sum_c (e_tc - e'_c) int_0^1 dF/de_tc(e' + a (e - e')) da

    and sum to F(e) - F(e'). The baseline of every token is the mean row of wte, positions are as
    they are. Points are doubled until the sum is right to 1 % (at most 512). gradient_x_input is
    sum_c e_tc dF/de_tc: one backward, and no such sum.

    Args:
        model: a GPT with float weights, or a module that holds one.
        idx: (1, T) ids.
        target: the id that is to follow.
        method: "integrated_gradients" or "gradient_x_input".

    Raises:
        ValueError: idx is not one row, the target is not in the vocabulary, the model is
            quantised, or there is no such method.
        ImportError: the package captum is not installed.

    Sundararajan, Taly and Yan, Axiomatic attribution for deep networks, 2017,
    https://arxiv.org/abs/1703.01365.
    """
    gpt = gpt_of(model)
    _check(gpt, "token_attribution", idx, target)
    if method not in METHODS:
        raise ValueError(
            f"token_attribution: method must be {' or '.join(METHODS)}; got {method!r}"
        )
    if gpt.config.quantized is not None:
        raise ValueError(
            "token_attribution: the model must have float weights, through which gradients go;"
            f" it has {gpt.config.quantized}"
        )
    attr = _captum()

    def value(rows: Tensor) -> Tensor:
        return log_probability(_logits(gpt, with_positions(gpt, rows)), target)  # (n,)

    with evaluating(gpt), torch.enable_grad():
        rows = token_rows(gpt, idx).detach()
        now = float(value(rows).detach())
        if method == "gradient_x_input":
            scores = attr.InputXGradient(value).attribute(rows.clone().requires_grad_())
            return Attribution(scores.sum(-1)[0].detach().float().cpu(), now)
        empty = gpt.wte.weight.detach().mean(0).expand_as(rows)  # type: ignore[operator,union-attr]
        at_empty = float(value(empty).detach())
        integral, steps = attr.IntegratedGradients(value), 32
        few = max(1, ROOM // idx.shape[1])
        while True:
            scores = integral.attribute(
                rows, empty, n_steps=steps, method="gausslegendre", internal_batch_size=few
            )
            made = Attribution(scores.sum(-1)[0].float().cpu(), now, at_empty, steps)
            assert made.error is not None
            if abs(made.error) <= CLOSE * abs(now - at_empty) or steps >= MOST_STEPS:
                return made
            steps *= 2


def _logits(gpt: GPT, state: State) -> Tensor:
    """After the last position, (n, V)."""
    for layer in range(gpt.config.n_layer):
        state = after(gpt, state, layer)
    return gpt.logits(final(gpt, state)[:, -1])


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError:
        raise ImportError(
            "token_attribution: needs the package captum; pip install 'fastgpt-triton[explain]'"
        ) from None
    return attr
