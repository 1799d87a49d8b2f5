"""Residual add and layer norm: the op, torch's two steps, torch's add and Liger's norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled, optional
from fastgpt.ops import layer_norm


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, residual=residual)[0]


def steps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, weight.shape, weight, bias)


def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(residual + x, weight, bias, 1e-5)


def sizes(device: str) -> list[dict[str, int]]:
    return [{"M": 16384 if device == "cuda" else 4096, "N": N} for N in (768, 1600, 4096)]


def case(device: str, dtype: torch.dtype, *, M: int, N: int) -> Case:
    here, absent = optional({"liger": ("liger_kernel", liger)}, device)
    providers: dict[str, Any] = {"fastgpt": fused, "torch": steps, "compiled": compiled(steps)}
    shapes = {"x": (M, N), "residual": (M, N), "weight": (N,), "bias": (N,)}
    inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
    return Case(
        "layer_norm", {"M": M, "N": N}, providers | here, inputs, "torch", tokens=M, absent=absent
    )
