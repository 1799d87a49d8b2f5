"""The residual stream of a GPT from block to block, and the model from an embedding on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.layers import Branch
from fastgpt.model import GPT


class State(NamedTuple):
    """The stream between two blocks, as blocks hand it on: the sum of h and branch.

    Attributes:
        h: (B, T, C).
        branch: what is yet to be added, in the next norm; None after the embedding.
    """

    h: Tensor
    branch: Branch | None = None

    @property
    def sum(self) -> Tensor:
        """(B, T, C): the residual stream."""
        if self.branch is None:
            return self.h
        x, bias = self.branch
        return self.h + (x if bias is None else x + bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def embedded(model: GPT, idx: Tensor) -> State:
    """The stream before the first block: tokens and, where they are learned, positions."""
    model._check(idx, 0, None)
    return State(model._embed(idx, 0, 0.0, None))


def token_rows(model: GPT, idx: Tensor) -> Tensor:
    """The rows of wte, (B, T, C)."""
    return F.embedding(idx, model.wte.weight)  # type: ignore[arg-type]


def with_positions(model: GPT, rows: Tensor) -> State:
    """The stream before the first block of what stands where tokens' rows stand, (B, T, C)."""
    return State(rows if model.wpe is None else rows + model.wpe.weight[: rows.shape[1]])


def after(model: GPT, state: State, layer: int) -> State:
    """The stream after a block, given that before it."""
    turn = model._turn(0, state.h.shape[1])
    branch, h = model.h[layer](state.branch, state.h, None, layer, turn)
    return State(h, Branch.of(branch))


def final(model: GPT, state: State) -> Tensor:
    """ln_f of a stream, (B, T, C)."""
    if state.branch is None:
        y: Tensor = model.ln_f(state.h)
        return y
    y, _ = model.ln_f(state.branch.x, state.h, 0.0, state.branch.bias)
    return y


def states(model: GPT, idx: Tensor) -> Iterator[State]:
    """n_layer + 1 of them: before the first block, and after each."""
    state = embedded(model, idx)
    yield state
    for layer in range(model.config.n_layer):
        state = after(model, state, layer)
        yield state


def log_probability(logits: Tensor, target: int) -> Tensor:
    """log softmax(logits)[target] in float32 or wider, (..., V) -> (...)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1)[..., target]
