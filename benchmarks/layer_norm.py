"""Residual add and layer norm: the op, torch's two steps, torch's add and Liger's norm."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import layer_norm


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, residual=residual)[0]


def steps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, weight.shape, weight, bias)


def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(residual + x, weight, bias, 1e-5)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    providers: dict[str, Callable[..., Tensor]] = {"fastgpt": fused, "torch": steps}
    if device == "cuda" and find_spec("liger_kernel"):
        providers["liger"] = liger
    M = 16384 if device == "cuda" else 4096
    for N in (768, 1600, 4096):
        shapes = {"x": (M, N), "residual": (M, N), "weight": (N,), "bias": (N,)}
        inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
        made.append(Case(f"layer_norm ({M}, {N})", providers, inputs, 0))
    return made


if __name__ == "__main__":
    main(cases)
