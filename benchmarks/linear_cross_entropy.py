"""The loss of GPT-2's head: the op in chunks, torch's product and loss on all logits at once."""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.harness import Case, main
from fastgpt.ops import linear_cross_entropy, linear_cross_entropy_ref


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    V, C = 50257, 768
    for M in (64, 1024) if device == "cpu" else (8192, 32768):
        inputs = {
            "x": torch.randn(M, C, device=device, dtype=dtype),
            "weight": torch.randn(V, C, device=device, dtype=dtype) * 0.02,
        }
        target = torch.randint(V, (M,), device=device)
        providers = {
            "fastgpt": partial(linear_cross_entropy, target=target),
            "torch": partial(linear_cross_entropy_ref, target=target),
        }
        made.append(Case(f"linear_cross_entropy ({M}, {C})", providers, inputs, 2 * M * V * C))
    return made


if __name__ == "__main__":
    main(cases)
