"""Causal attention: the op, torch's scaled_dot_product_attention, the specification.

On a GPU torch's is asked for FlashAttention 2 and for cuDNN's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, main
from fastgpt.ops import attention, attention_ref
from fastgpt.ops.attention import attention_flops


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def cases(device: str, dtype: torch.dtype) -> Sequence[Case]:
    made = []
    shapes = [(4, T, 12, 64) for T in (128, 512, 1024)]  # GPT-2's heads
    providers: dict[str, Callable[..., Any]] = {"fastgpt": attention}
    if device == "cuda":
        shapes = [(16, 1024, 12, 64), (4, 4096, 12, 64), (16, 1024, 8, 128), (4, 4096, 8, 128)]
        if dtype != torch.float32:
            providers["flash"] = partial(by, SDPBackend.FLASH_ATTENTION)
            providers["cuDNN"] = partial(by, SDPBackend.CUDNN_ATTENTION)
    else:
        providers |= {"sdpa": sdpa, "reference": attention_ref}
    for shape in shapes:
        qkv = {n: torch.randn(shape, device=device, dtype=dtype) for n in "qkv"}
        flops = attention_flops(shape, shape, -1, 0, 2)
        made.append(Case(f"attention {shape}", providers, qkv, flops))
    return made


if __name__ == "__main__":
    main(cases)
