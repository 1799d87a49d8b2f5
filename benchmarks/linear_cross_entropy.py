"""The loss of GPT-2's head: the op in chunks, torch's product and loss on all logits at once.

On a GPU also Liger's fused loss and Apple's Cut Cross-Entropy, where installed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import linear_cross_entropy, linear_cross_entropy_ref


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def cut(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    V, C = 50257, 768
    for M in (64, 1024) if device == "cpu" else (16384,):
        inputs = {
            "x": torch.randn(M, C, device=device, dtype=dtype),
            "weight": torch.randn(V, C, device=device, dtype=dtype) * 0.02,
        }
        target = torch.randint(V, (M,), device=device)
        providers: dict[str, Callable[..., Tensor]] = {
            "fastgpt": partial(linear_cross_entropy, target=target),
            "torch": partial(linear_cross_entropy_ref, target=target),
        }
        if device == "cuda" and find_spec("liger_kernel"):
            providers["liger"] = partial(liger, target=target)
        if device == "cuda" and find_spec("cut_cross_entropy"):
            providers["cut"] = partial(cut, target=target)
        made.append(Case(f"linear_cross_entropy ({M}, {C})", providers, inputs, 2 * M * V * C))
    return made


if __name__ == "__main__":
    main(cases)
