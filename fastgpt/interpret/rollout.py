"""Attention rollout: how much of each token arrives at each position, through all layers."""

import torch
from torch import Tensor

from fastgpt.interpret.capture import Captured


def attention_rollout(captured: Captured, residual: float = 0.5) -> Tensor:
    """R = A_L ... A_2 A_1 with A_l = (1 - residual) mean_h W_lh + residual I.

    W_lh are a head's weights and I the residual connection, which carries each position on as it
    is. Rows of R sum to one. It says where what arrives may have come from, not what was done with
    it: values and feed-forwards have no part in it.

    Args:
        captured: of a call with rows=None and all layers, once; heads are averaged over.
        residual: share of the residual connection, 0.5 in the paper.

    Returns:
        (B, T, T): row i holds the shares of the tokens in position i of the last layer.

    Raises:
        ValueError: layers or rows are missing, or there were several calls.

    Abnar and Zuidema, Quantifying attention flow in transformers, 2020,
    https://arxiv.org/abs/2005.00928, section 3 and appendix A.1.
    """
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"attention_rollout: residual must lie in [0, 1]; got {residual}")
    if captured.layers != tuple(range(captured.n_layer)):
        raise ValueError("attention_rollout: all layers must be captured, in order")
    rolled: Tensor | None = None
    for layer in captured.layers:
        call = captured[layer]
        T = call.weights.shape[-1]
        if call.rows != tuple(range(T)):
            raise ValueError(
                f"attention_rollout: all {T} rows must be captured, rows=None, and without a cache;"
                f" got {len(call.rows)}"
            )
        eye = torch.eye(T, device=call.weights.device, dtype=call.weights.dtype)
        mixed = (1.0 - residual) * call.weights.mean(1) + residual * eye
        rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None  # a GPT has a layer
    return rolled
