"""Rotary embedding with and without a norm of q and k: the op, torch's steps."""

from typing import Any

import torch
from torch import Tensor

from fastgpt.bench.case import Case, compiled
from fastgpt.ops import rotary, rotary_ref, rotary_table


def joined(op: Any, cos: Tensor, sin: Tensor) -> Any:
    def both(q: Tensor, k: Tensor, **weights: Tensor) -> Tensor:
        return torch.cat(op(q, k, cos, sin, **weights), 2)

    return both


def sizes(device: str) -> list[dict[str, int]]:
    return [
        {"B": 4, "T": 1024, "H": 16, "Hkv": 4, "D": D, "norm": norm}
        for D in (64, 128)
        for norm in (0, 1)
    ]


def case(
    device: str, dtype: torch.dtype, *, B: int, T: int, H: int, Hkv: int, D: int, norm: int
) -> Case:
    """norm: 1 normalizes q and k before, 0 does not."""
    cos, sin = rotary_table(T, D, device=device)
    shapes: dict[str, tuple[int, ...]] = {"q": (B, T, H, D), "k": (B, T, Hkv, D)}
    if norm:
        shapes |= {"q_weight": (D,), "k_weight": (D,)}
    inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
    plain = joined(rotary_ref, cos, sin)
    providers = {"fastgpt": joined(rotary, cos, sin), "torch": plain, "compiled": compiled(plain)}
    said = {"B": B, "T": T, "H": H, "Hkv": Hkv, "D": D, "norm": norm}
    return Case("rotary", said, providers, inputs, "torch", tokens=B * T)
