"""Cross-entropy of logits of GPT-2's vocabulary: the op, torch's."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import cross_entropy


def torchs(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    for M, V in ((16384, 50257),) if device == "cuda" else ((64, 50257), (256, 50304)):
        logits = torch.randn(M, V, device=device, dtype=dtype)
        target = torch.randint(V, (M,), device=device)
        providers = {
            "fastgpt": partial(cross_entropy, target=target),
            "torch": partial(torchs, target=target),
        }
        made.append(Case(f"cross_entropy ({M}, {V})", providers, {"logits": logits}, 0))
    return made


if __name__ == "__main__":
    main(cases)
