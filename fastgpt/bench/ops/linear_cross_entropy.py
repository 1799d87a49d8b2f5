"""The loss of GPT-2's head: the op in chunks, torch's product and loss on all logits at once.

Also torch's own F.linear_cross_entropy, where it has one, and on a GPU Liger's fused loss and
Apple's Cut Cross-Entropy, where installed.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled, optional
from fastgpt.ops import linear_cross_entropy, linear_cross_entropy_ref


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def cut(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)


def sizes(device: str) -> list[dict[str, int]]:
    rows = (16384,) if device == "cuda" else (64, 1024)
    return [{"M": M, "C": 768, "V": 50257} for M in rows]


def case(device: str, dtype: torch.dtype, *, M: int, C: int, V: int) -> Case:
    here, absent = optional(
        {"liger": ("liger_kernel", liger), "cut": ("cut_cross_entropy", cut)}, device
    )
    inputs = {
        "x": torch.randn(M, C, device=device, dtype=dtype),
        "weight": torch.randn(V, C, device=device, dtype=dtype) * 0.02,
    }
    target = torch.randint(V, (M,), device=device)
    providers: dict[str, Any] = {"fastgpt": linear_cross_entropy, "torch": linear_cross_entropy_ref}
    if hasattr(F, "linear_cross_entropy"):
        providers["F.linear_cross_entropy"] = _torchs
    else:
        absent["F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    providers |= {"compiled": compiled(linear_cross_entropy_ref)} | here
    providers = {name: partial(f, target=target) for name, f in providers.items()}
    return Case(
        "linear_cross_entropy", {"M": M, "C": C, "V": V}, providers, inputs, "torch",
        flops=2 * M * V * C, tokens=M, absent=absent,
    )  # fmt: skip


def _torchs(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target)  # type: ignore[attr-defined,no-any-return]
