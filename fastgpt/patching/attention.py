"""Self-attention as nanoGPT and minGPT write it: one linear layer for q, k and v of all heads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.patching.feed_forward import linear, weights
from fastgpt.patching.swap import (
    Patched,
    Swap,
    fusable,
    kind,
    obstacle,
    own_forward,
    random,
    stand_in,
)  # fmt: skip

PARTS = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}


@dataclass(frozen=True)
class AttentionHow:
    """Whether it is causal, and the types of c_attn and attn_dropout."""

    causal: bool
    types: tuple[type[nn.Module], ...]


def attend(module: nn.Module, qkv: Tensor, causal: bool, dropout_p: float) -> Tensor:
    """qkv (B, T, 3 C) -> (B, T, C), the heads side by side."""
    B, T, wide = qkv.shape
    n_head: int = module.n_head  # type: ignore[assignment]
    heads = qkv.view(B, T, 3 * n_head, wide // 3 // n_head)
    o = ops.attention_packed(heads, n_head, causal=causal, dropout_p=dropout_p)
    return o.reshape(B, T, wide // 3)


class PatchedAttention(Patched):
    """resid_dropout(c_proj(attention of c_attn(x)))."""

    def run(self, x: Tensor) -> Any:
        how: AttentionHow = self._fastgpt_how
        dropout: Any = self.attn_dropout
        p = dropout.p if self.training else 0.0
        if not fusable((dropout,), how.types) or p >= 1.0 or x.ndim != 3:
            return self.original(x)
        y = attend(self, self.c_attn(x), how.causal, p)  # type: ignore[operator]
        return self.resid_dropout(self.c_proj(y))  # type: ignore[operator]


def recognise_attention(module: nn.Module, asked: bool = False) -> Swap | str | None:
    """A swap if module has nanoGPT's attention's parts and computes what that does, causal or not;
    why not if it only looks like it; else None."""
    n_head = getattr(module, "n_head", None)
    if set(module._modules) != PARTS or not isinstance(n_head, int):
        return f"it has not {', '.join(sorted(PARTS))} and n_head alone" if asked else None
    up, down = module.c_attn, module.c_proj
    if not linear(up) or not linear(down):  # type: ignore[arg-type]
        return "c_attn and c_proj are not linear layers"
    dropout = module.attn_dropout
    if not isinstance(dropout, nn.Dropout) or not isinstance(module.resid_dropout, nn.Dropout):
        return "attn_dropout and resid_dropout are not nn.Dropout"
    if isinstance(p := getattr(module, "dropout", None), float) and p != dropout.p:
        return "dropout and attn_dropout.p differ"
    w, _ = weights(up)  # type: ignore[arg-type]
    why = obstacle(*up.parameters(), *down.parameters())  # type: ignore[union-attr]
    if why is not None:
        return why
    C = w.shape[1]
    if len(w) != 3 * C or C % n_head or C // n_head % 8 or C // n_head > 256:
        return f"{n_head} heads of {C} columns are not of 8, 16, ... or 256 each, or not q, k and v"
    twin: Any = stand_in(
        module, lambda _, t: t.to("cpu", torch.float64) if t.is_floating_point() else t.cpu()
    )
    x = random(2, 5, C)
    try:
        with torch.no_grad():
            theirs = own_forward(module)(twin, x)
    except Exception as error:  # anybody's code
        return f"its forward does not take (B, T, {C}) ({type(error).__name__})"
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
        return "its forward does not give a tensor of its input's shape"
    for causal in (True, False):
        with torch.no_grad():
            ours = twin.c_proj(attend(twin, twin.c_attn(x), causal, 0.0))
        if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max())):
            how = AttentionHow(causal, (kind(dropout),))
            words = "attention (causal)" if causal else "attention"
            return Swap(PatchedAttention, how, words, ("attn_dropout",))
    return "it computes another attention"
