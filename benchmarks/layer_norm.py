"""Residual add and layer norm: the op, torch's two steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import layer_norm


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, residual=residual)[0]


def steps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, weight.shape, weight, bias)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    for N in (768, 1600, 4096):
        shapes = {"x": (4096, N), "residual": (4096, N), "weight": (N,), "bias": (N,)}
        inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
        made.append(Case(f"layer_norm (4096, {N})", {"fastgpt": fused, "torch": steps}, inputs, 0))
    return made


if __name__ == "__main__":
    main(cases)
