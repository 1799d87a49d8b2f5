"""Rotary embedding with and without a norm of q and k: the op, torch's steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import rotary, rotary_ref, rotary_table


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    for D, norm in ((64, False), (64, True), (128, False), (128, True)):
        B, T, H, Hkv = 4, 1024, 16, 4
        cos, sin = rotary_table(T, D, device=device)
        shapes: dict[str, tuple[int, ...]] = {"q": (B, T, H, D), "k": (B, T, Hkv, D)}
        if norm:
            shapes |= {"q_weight": (D,), "k_weight": (D,)}
        inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}

        def joined(op: Any, cos: Tensor = cos, sin: Tensor = sin) -> Any:
            return lambda q, k, **w: torch.cat(op(q, k, cos, sin, **w), 2)

        name = f"rotary (4, 1024, 16 + 4, {D}){' with norm' if norm else ''}"
        providers = {"fastgpt": joined(rotary), "torch": joined(rotary_ref)}
        made.append(Case(name, providers, inputs, 0))
    return made


if __name__ == "__main__":
    main(cases)
