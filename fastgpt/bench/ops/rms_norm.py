"""Residual add and RMS norm: the op, torch's two steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled
from fastgpt.ops import rms_norm


def fused(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, residual=residual)[0]


def steps(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(residual + x, weight.shape, weight, 1e-6)


def sizes(device: str) -> list[dict[str, int]]:
    return [{"M": 16384 if device == "cuda" else 4096, "N": N} for N in (576, 2048, 4096)]


def case(device: str, dtype: torch.dtype, *, M: int, N: int) -> Case:
    providers = {"fastgpt": fused, "torch": steps, "compiled": compiled(steps)}
    shapes = {"x": (M, N), "residual": (M, N), "weight": (N,)}
    inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
    return Case("rms_norm", {"M": M, "N": N}, providers, inputs, "torch", tokens=M)
