"""gelu, linear and dropout: torch's own, which no kernel by itself would be worth."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend


def _said(op: str, input: Tensor, why: str) -> None:
    """Let explain() know; what is no tensor is torch's to refuse."""
    if isinstance(input, Tensor):
        backend.kernel_chosen(op, input, why)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu: x Phi(x), or by tanh with approximate="tanh".

    It is torch's: alone it has no kernel here. `fastgpt.ops.ffn` has it in its first product.
    """
    _said("gelu", input, "no kernel of its own; ops.ffn has it in its product")
    return F.gelu(input, approximate=approximate)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x weight^T + bias.

    It is the vendor's product: alone it has no kernel here. `fastgpt.ops.ffn` and
    `linear_cross_entropy` have in theirs what comes next.
    """
    _said("linear", input, "a product by itself is the vendor's; ops.ffn has what comes next in it")
    return F.linear(input, weight, bias)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch.nn.functional.dropout: in training, elements are set to zero with probability p and
    the others divided by 1 - p.

    It is torch's: alone it has no kernel here. `fastgpt.ops.layer_norm`, `attention` and
    `embedding` have it in theirs.
    """
    why = "no kernel of its own; ops.layer_norm, attention and embedding have it in theirs"
    _said("dropout", input, why)
    return F.dropout(input, p, training, inplace)
