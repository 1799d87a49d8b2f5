"""embedding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.functional.choice import TORCHS, chosen
from fastgpt.ops import backend
from fastgpt.ops.embedding import EmbeddingFunction


def _rule(
    weight: Tensor, idx: Tensor, padding_idx: Any, max_norm: Any, by_freq: bool, sparse: bool
) -> str | None:
    for name, given in (
        ("padding_idx", padding_idx is not None), ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", by_freq), ("sparse", sparse),
    ):  # fmt: skip
        if given:
            return f"the kernel takes no {name}"
    if idx.dtype not in (torch.int64, torch.int32) or weight.ndim != 2 or 0 in weight.shape:
        return TORCHS
    return None


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """torch.nn.functional.embedding: the rows of weight at the ids of input.

    Args:
        input: int64 or int32 of any shape.
        weight: (V, C). The kernel takes float32, float16 and bfloat16; it sums each row of the
            gradient in float32, in one fixed order.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: torch's own function takes
            these.

    Returns:
        (*input.shape, C) of weight's dtype.
    """
    rest = (padding_idx, max_norm, scale_grad_by_freq, sparse)
    if not chosen("embedding", (weight, input), _rule, *rest):
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    idx = input.reshape(1, -1) if input.ndim != 2 else input
    h: Tensor = EmbeddingFunction.apply(*backend.traceable(idx, weight, None, 0, 0.0, None))
    return h if input.ndim == 2 else h.view(*input.shape, weight.shape[1])
