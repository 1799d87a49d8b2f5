"""Causal attention: the op, torch's scaled_dot_product_attention, the specification.

`sdpa` is torch's own choice; flash, cuDNN, efficient and math are what it is asked for by name.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.bench.case import Case, compiled, optional
from fastgpt.ops import attention, attention_ref
from fastgpt.ops.attention import attention_flops

DTYPES = (torch.float16, torch.bfloat16)  # that flash and cuDNN take on a GPU


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def sizes(device: str) -> list[dict[str, int]]:
    if device != "cuda":  # GPT-2's heads
        return [{"B": 4, "T": T, "H": 12, "D": 64} for T in (128, 512, 1024)]
    return [
        {"B": B, "T": T, "H": H, "D": D}
        for H, D in ((12, 64), (8, 128))
        for B, T in ((16, 1024), (4, 4096))
    ]


def case(device: str, dtype: torch.dtype, *, B: int, T: int, H: int, D: int) -> Case:
    shape = (B, T, H, D)
    here, absent = optional({"flash-attn": ("flash_attn", flash_attn)}, device)
    providers: dict[str, Any] = {"fastgpt": attention, "sdpa": sdpa}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, backend in backends.items():
        if device != "cuda" and name in ("cuDNN", "efficient"):
            absent[name] = "it needs a GPU"
        elif device == "cuda" and name in ("flash", "cuDNN") and dtype not in DTYPES:
            absent[name] = "it takes 16-bit floats only"
        else:
            providers[name] = partial(by, backend)
    providers |= {"reference": attention_ref, "compiled": compiled(attention_ref)} | here
    qkv = {n: torch.randn(shape, device=device, dtype=dtype) for n in "qkv"}
    return Case(
        "attention", {"B": B, "T": T, "H": H, "D": D}, providers, qkv, "sdpa",
        flops=attention_flops(shape, shape, -1, 0, 2), tokens=B * T, absent=absent,
    )  # fmt: skip
