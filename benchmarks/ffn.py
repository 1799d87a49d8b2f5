"""The GELU feed-forward: the op, torch's three steps."""

from collections.abc import Sequence

import torch

from benchmarks.harness import Case, main
from fastgpt.ops import ffn, ffn_ref


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    M = 16384 if device == "cuda" else 1024
    for C in (768, 1600) if device == "cuda" else (256, 768):
        shapes = {"x": (M, C), "w1": (4 * C, C), "b1": (4 * C,), "w2": (C, 4 * C), "b2": (C,)}
        inputs = {
            n: torch.randn(s, device=device, dtype=dtype) * s[-1] ** -0.5 for n, s in shapes.items()
        }
        providers = {"fastgpt": ffn, "torch": ffn_ref}
        made.append(Case(f"ffn ({M}, {C})", providers, inputs, 2 * 2 * M * 4 * C * C))
    return made


if __name__ == "__main__":
    main(cases)
