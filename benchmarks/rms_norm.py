"""Residual add and RMS norm: the op, torch's two steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import rms_norm


def fused(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, residual=residual)[0]


def steps(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(residual + x, weight.shape, weight, 1e-6)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    M = 16384 if device == "cuda" else 4096
    for N in (576, 2048, 4096):
        shapes = {"x": (M, N), "residual": (M, N), "weight": (N,)}
        inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
        made.append(Case(f"rms_norm ({M}, {N})", {"fastgpt": fused, "torch": steps}, inputs, 0))
    return made


if __name__ == "__main__":
    main(cases)
