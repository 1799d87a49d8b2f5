"""Attention of one new token of each row to a cache, into which it is written.

`sdpa` is torch's with a mask, which like the op takes lengths from the device and so reads all the
room there is; `sdpa, lengths on the host` is given how many positions are held, and makes views of
as many: no CUDA graph can be replayed for another length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.bench.case import Case, compiled, optional
from fastgpt.ops import attention_decode, attention_decode_ref


def sizes(device: str) -> list[dict[str, int]]:
    """S: the room of a row; L: the positions it holds."""
    if device != "cuda":  # GPT-2's heads
        return [
            {"B": B, "S": 1024, "L": L, "H": 12, "Hkv": 12, "D": 64}
            for B, L in ((1, 1000), (1, 64), (8, 1000))
        ]
    return [
        {"B": B, "S": S, "L": L, "H": H, "Hkv": Hkv, "D": D}
        for H, Hkv, D in ((12, 12, 64), (32, 8, 128))
        for B, S, L in ((1, 1024, 1000), (1, 32768, 1000), (1, 32768, 32000), (64, 4096, 4000))
    ]


class _Decode:
    """A cache of each dtype and what is done with it."""

    def __init__(self, cache: Tensor, L: int) -> None:
        self.keys, self.values = cache, torch.randn_like(cache)
        B, S = cache.shape[:2]
        self.held = L
        self.lengths = torch.full((B,), L, dtype=torch.int32, device=cache.device)
        self.rows = torch.arange(B, device=cache.device)
        self.positions = torch.arange(S, device=cache.device)

    def fastgpt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_decode(q, self.keys, self.values, self.lengths, k, v)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = attention_decode_ref(q, self.keys, self.values, self.lengths, k, v)
        assert isinstance(o, Tensor)
        return o

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[self.rows, self.lengths] = k[:, 0]
        self.values[self.rows, self.lengths] = v[:, 0]
        mask = self.positions <= self.lengths[:, None]
        return _sdpa(q, self.keys, self.values, mask[:, None, None])

    def views(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.held + 1
        self.keys[:, n - 1 : n] = k
        self.values[:, n - 1 : n] = v
        return _sdpa(q, self.keys[:, :n], self.values[:, :n], None)

    def flash_attn(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache(
            q, self.keys, self.values, k, v, cache_seqlens=self.lengths, causal=True
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).transpose(1, 2)


def case(
    device: str, dtype: torch.dtype, *, B: int, S: int, L: int, H: int, Hkv: int, D: int
) -> Case:
    L = min(L, S - 1)
    work = _Decode(torch.randn(B, S, Hkv, D, device=device, dtype=dtype), L)
    here, absent = optional({"flash-attn": ("flash_attn", work.flash_attn)}, device)
    providers: dict[str, Any] = {
        "fastgpt": work.fastgpt,
        "sdpa": work.masked,
        "sdpa, lengths on the host": work.views,
        "reference": work.reference,
        "compiled": compiled(work.masked),
    } | here
    shapes = {"q": (B, 1, H, D), "k": (B, 1, Hkv, D), "v": (B, 1, Hkv, D)}
    inputs = {n: torch.randn(s, device=device, dtype=dtype) for n, s in shapes.items()}
    moved = 2 * B * ((L + 2) * Hkv + H) * D * dtype.itemsize
    return Case(
        "attention_decode", {"B": B, "S": S, "L": L, "H": H, "Hkv": Hkv, "D": D}, providers, inputs,
        "sdpa", flops=4 * B * H * D * (L + 1), tokens=B, traffic=(moved, 0), absent=absent,
        has_backward=False,
    )  # fmt: skip
