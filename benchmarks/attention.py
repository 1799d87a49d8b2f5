"""Causal attention: the op, torch's scaled_dot_product_attention, the specification."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, main
from fastgpt.ops import attention, attention_ref
from fastgpt.ops.attention import attention_flops


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    for T in (128, 512, 1024):
        shape = (4, T, 12, 64)  # GPT-2's heads
        qkv = {n: torch.randn(shape, device=device, dtype=dtype) for n in "qkv"}
        providers = {"fastgpt": attention, "sdpa": sdpa, "reference": attention_ref}
        flops = attention_flops(shape, shape, -1, 0, 2)
        made.append(Case(f"attention {shape}", providers, qkv, flops))
    return made


if __name__ == "__main__":
    main(cases)
