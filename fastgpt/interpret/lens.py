"""The logit lens: what a model would say if it stopped after each block."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastgpt.interpret.capture import Chosen, chosen, gpt_of
from fastgpt.interpret.stream import evaluating, final, states


def logit_lens(model: nn.Module, idx: Tensor, rows: Chosen = -1) -> Tensor:
    """logits_l = ln_f(h_l) W^T of the residual stream h_l before the first block and after each.

    The last are the model's own logits.

    Args:
        model: a GPT, or a module that holds one.
        idx: (B, T) ids.
        rows: positions, negative ones from the end; all if None.

    Returns:
        (n_layer + 1, B, R, V) of the model's dtype.

    Raises:
        ValueError: a row is not there, or what GPT refuses.

    nostalgebraist, interpreting GPT: the logit lens, 2020,
    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
    """
    return torch.stack(list(lens_by_layer(model, idx, rows)))


@torch.no_grad()
def lens_by_layer(model: nn.Module, idx: Tensor, rows: Chosen = -1) -> Iterator[Tensor]:
    """The same layer by layer, (B, R, V) each."""
    gpt = gpt_of(model)
    at = list(chosen("rows", rows, idx.shape[-1]))
    with evaluating(gpt):
        for state in states(gpt, idx):
            yield gpt.logits(final(gpt, state)[:, at])
