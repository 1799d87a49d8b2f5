"""Token and position embedding: the op, torch's two look-ups and add."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import embedding


def fused(wte: Tensor, wpe: Tensor, idx: Tensor) -> Tensor:
    return embedding(idx, wte, wpe)


def steps(wte: Tensor, wpe: Tensor, idx: Tensor) -> Tensor:
    return F.embedding(idx, wte) + wpe[: idx.shape[1]]


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    for B, T, C in ((8, 1024, 768), (4, 1024, 1600)):
        idx = torch.randint(50257, (B, T), device=device)
        shapes = {"wte": (50257, C), "wpe": (T, C)}
        inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
        providers = {"fastgpt": partial(fused, idx=idx), "torch": partial(steps, idx=idx)}
        made.append(Case(f"embedding ({B}, {T}, {C})", providers, inputs, 0))
    return made


if __name__ == "__main__":
    main(cases)
