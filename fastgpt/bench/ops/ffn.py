"""The GELU feed-forward: the op, torch's three steps."""

import torch

from fastgpt.bench.case import Case, compiled
from fastgpt.ops import ffn, ffn_ref


def sizes(device: str) -> list[dict[str, int]]:
    if device == "cuda":
        return [{"M": 16384, "C": C} for C in (768, 1600)]
    return [{"M": 1024, "C": C} for C in (256, 768)]


def case(device: str, dtype: torch.dtype, *, M: int, C: int) -> Case:
    shapes = {"x": (M, C), "w1": (4 * C, C), "b1": (4 * C,), "w2": (C, 4 * C), "b2": (C,)}
    inputs = {
        n: torch.randn(s, device=device, dtype=dtype) * s[-1] ** -0.5 for n, s in shapes.items()
    }
    providers = {"fastgpt": ffn, "torch": ffn_ref, "compiled": compiled(ffn_ref)}
    flops = 2 * 2 * M * 4 * C * C
    return Case("ffn", {"M": M, "C": C}, providers, inputs, "torch", flops=flops, tokens=M)
