"""Cross-entropy of logits of GPT-2's vocabulary: the op, torch's."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled
from fastgpt.ops import cross_entropy


def torchs(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def sizes(device: str) -> list[dict[str, int]]:
    shapes = ((16384, 50257),) if device == "cuda" else ((64, 50257), (256, 50304))
    return [{"M": M, "V": V} for M, V in shapes]


def case(device: str, dtype: torch.dtype, *, M: int, V: int) -> Case:
    logits = torch.randn(M, V, device=device, dtype=dtype)
    target = torch.randint(V, (M,), device=device)
    providers = {
        "fastgpt": partial(cross_entropy, target=target),
        "torch": partial(torchs, target=target),
        "compiled": partial(compiled(torchs), target=target),
    }
    return Case("cross_entropy", {"M": M, "V": V}, providers, {"logits": logits}, "torch", tokens=M)
