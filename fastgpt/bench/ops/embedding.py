"""Token and position embedding: the op, torch's two look-ups and add."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled
from fastgpt.ops import embedding


def fused(wte: Tensor, wpe: Tensor, idx: Tensor) -> Tensor:
    return embedding(idx, wte, wpe)


def steps(wte: Tensor, wpe: Tensor, idx: Tensor) -> Tensor:
    return F.embedding(idx, wte) + wpe[: idx.shape[1]]


def sizes(device: str) -> list[dict[str, int]]:
    shapes = ((8, 1024, 768), (4, 1024, 1600))
    return [{"B": B, "T": T, "C": C, "V": 50257} for B, T, C in shapes]


def case(device: str, dtype: torch.dtype, *, B: int, T: int, C: int, V: int) -> Case:
    idx = torch.randint(V, (B, T), device=device)
    shapes = {"wte": (V, C), "wpe": (T, C)}
    inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
    providers = {
        "fastgpt": partial(fused, idx=idx),
        "torch": partial(steps, idx=idx),
        "compiled": partial(compiled(steps), idx=idx),
    }
    # Rows are gathered; the table's gradient is written whole.
    size = dtype.itemsize * C
    traffic = ((2 * B * T + T) * size, (B * T + V + T) * size)
    return Case(
        "embedding", {"B": B, "T": T, "C": C, "V": V}, providers, inputs, "torch",
        tokens=B * T, traffic=traffic,
    )  # fmt: skip
