"""A rank's part of a GPT, for measuring: real blocks and ops at the shapes that a rank sees.

Collectives are stand-ins with the shapes of the real ones: they write down what they would send.
Under fake tensors that is all there is to know.

    tp      c_attn, the feed-forward's first products and wte have 1 / tp of their rows, what ends
            a branch 1 / tp of its columns. With sequence=True a rank holds 1 / tp of the tokens
            between branches: gathered before one, summed and scattered after it (Korthikanti et
            al., 2022, https://arxiv.org/abs/2205.05198); without it all tokens, summed after it.
    cp      a rank holds two chunks of the sequence, one from each end, so that causal work is the
            same for all (zigzag), and gathers k and v.
    block   each block is run again in backward, by torch.utils.checkpoint.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.layers import (
    Again,
    Block,
    Branch,
    CausalSelfAttention,
    Documents,
    KVCache,
    Turn,
    made_again,
)
from fastgpt.model import GPT, IGNORE
from fastgpt.plan.layout import Layout

Note = Callable[[str, str, int], None]  # kind, axis, bytes of the whole tensor


class _Collective(torch.autograd.Function):
    """Tokens (B, T, ...) change places over an axis of n ranks; backward is the transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, axis: str, n: int, note: Note) -> Tensor:
        ctx.said = kind, axis, n, note
        return _moved(x, kind, axis, n, note)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kind, axis, n, note = ctx.said
        back = {
            "all-gather": "reduce-scatter", "reduce-scatter": "all-gather",
            "all-reduce": "nothing", "nothing": "all-reduce",
        }[kind]  # fmt: skip
        return _moved(dy, back, axis, n, note), None, None, None, None


def _moved(x: Tensor, kind: str, axis: str, n: int, note: Note) -> Tensor:
    B, T, *rest = x.shape
    size = x.numel() * x.element_size()
    if kind == "nothing":
        return x.view_as(x)
    if kind == "all-gather":
        size, T = size * n, T * n
    elif kind == "reduce-scatter":
        T //= n
    note(kind, axis, size)
    return x.new_empty(B, T, *rest)


class _Attention(CausalSelfAttention):
    """A rank's heads."""

    def __init__(self, whole: CausalSelfAttention, C: int, layout: Layout, note: Note) -> None:
        nn.Module.__init__(self)
        self.dropout, self.layout, self.note = whole.dropout, layout, note
        self.D = C // whole.n_head
        self.n_head, self.n_kv_head = whole.n_head // layout.tp, whole.n_kv_head // layout.tp
        self.c_attn, self.c_proj = rows(whole.c_attn, layout.tp), columns(whole.c_proj, layout.tp)
        self.q_norm, self.k_norm = whole.q_norm, whole.k_norm

    def forward(
        self, x: Tensor, cache: KVCache | None = None, layer: int = 0, turn: Turn | None = None,
        again: Again | None = None, apart: bool = False, documents: Documents | None = None,
    ) -> Tensor | Branch:  # fmt: skip
        H, kv = self.n_head, self.n_kv_head
        again = _again(x, again, self.layout, self.note)
        x = enter(x, self.layout, self.note)
        B, T, _ = x.shape
        with made_again(x, again):
            qkv = self.c_attn(x).view(B, T, H + 2 * kv, self.D)
        if turn is None and self.layout.cp == 1:
            o = ops.attention_packed(qkv, H, dropout_p=self.dropout)
        else:
            q, k, v = qkv.split([H, kv, kv], 2)
            o = self._attend(q, k, v, self.dropout, cache, layer, turn, documents)
        return leave(self.c_proj(o.reshape(B, T, H * self.D)), self.layout, self.note)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, p: float, cache: KVCache | None, layer: int,
        turn: Turn | None, documents: Documents | None,
    ) -> Tensor:  # fmt: skip
        n = self.layout.cp
        if n == 1:
            return super()._attend(q, k, v, p, cache, layer, turn, documents)
        q, k = self.turned(q, k, turn)
        k, v = (_Collective.apply(t, "all-gather", "cp", n, self.note) for t in (k, v))
        chunk = q.shape[1] // 2
        first = ops.attention(q[:, :chunk], k[:, :chunk], v[:, :chunk], causal=True)
        return torch.cat((first, ops.attention(q[:, chunk:], k, v, causal=True)), 1)


class _FeedForward(nn.Module):
    """A rank's columns of the inner width."""

    def __init__(self, whole: nn.Module, layout: Layout, note: Note) -> None:
        super().__init__()
        self.inner, self.layout, self.note = whole, layout, note
        for name, part in whole.named_children():
            cut = columns if name.endswith(("c_proj", "down_proj")) else rows
            setattr(whole, name, cut(part, layout.tp))

    def forward(self, x: Tensor, apart: bool = False) -> Tensor:
        again = _again(x, None, self.layout, self.note)
        x = enter(x, self.layout, self.note)
        with made_again(x, again):
            return leave(self.inner(x), self.layout, self.note)


class _Gather(nn.Module):
    """A rank's tokens -> those of all of its tp group, in backward."""

    def __init__(self, layout: Layout, note: Note) -> None:
        super().__init__()
        self.layout, self.note = layout, note

    def forward(self, x: Tensor) -> Tensor:
        return _moved(x, "all-gather", "tp", self.layout.tp, self.note)


def _again(x: Tensor, again: Again | None, layout: Layout, note: Note) -> Again | None:
    """What makes enter(x) in backward, if that is asked for; again is what makes x."""
    if layout.tp == 1:
        return again
    if not (layout.regather and layout.sequence):
        return None  # what is made again would not be what was kept
    gather = _Gather(layout, note)
    return (gather, x) if again is None else (nn.Sequential(again[0], gather), again[1])


class _Checkpointed(nn.Module):
    """A block of which only what it is given is kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False)


def enter(x: Tensor, layout: Layout, note: Note) -> Tensor:
    """A rank's tokens -> those of all of its tp group, before products with sharded rows."""
    if layout.tp == 1:
        return x
    kind = "all-gather" if layout.sequence else "nothing"
    return _Collective.apply(x, kind, "tp", layout.tp, note)  # type: ignore[no-any-return]


def leave(x: Tensor, layout: Layout, note: Note) -> Tensor:
    """Partial sums of all tokens -> the sums of a rank's own."""
    if layout.tp == 1:
        return x
    kind = "reduce-scatter" if layout.sequence else "all-reduce"
    return _Collective.apply(x, kind, "tp", layout.tp, note)  # type: ignore[no-any-return]


def rows(linear: nn.Module, n: int) -> nn.Linear:
    """A linear layer with 1 / n of the outputs."""
    assert isinstance(linear, nn.Linear)
    bias = linear.bias is not None
    return nn.Linear(linear.in_features, linear.out_features // n, bias)


def columns(linear: nn.Module, n: int) -> nn.Linear:
    """A linear layer with 1 / n of the inputs."""
    assert isinstance(linear, nn.Linear)
    bias = linear.bias is not None
    return nn.Linear(linear.in_features // n, linear.out_features, bias)


class LocalGPT(GPT):
    """What one rank of a layout holds of a GPT, and computes.

    Args:
        config: of the whole model.
        layout: tp, cp, sequence and recompute matter here.
        note: is told of each collective: kind, axis, bytes of the whole tensor.
    """

    def __init__(self, config: GPTConfig, layout: Layout, note: Note) -> None:
        super().__init__(config)
        self.layout, self.note = layout, note
        if layout.tp > 1 or layout.cp > 1:
            for block in self.h:
                assert isinstance(block, Block)
                block.attn = _Attention(block.attn, config.n_embd, layout, note)
                if layout.tp > 1:
                    block.mlp = _FeedForward(block.mlp, layout, note)  # type: ignore[assignment]
        V = -(-config.vocab_size // layout.tp)
        self.wte = nn.Embedding(V, config.n_embd)
        if self.lm_head is not None:
            self.lm_head = nn.Linear(config.n_embd, V, bias=False)
        if layout.recompute == "block":
            self.h = nn.ModuleList(_Checkpointed(block) for block in self.h)

    def _embed(self, idx: Tensor, start: int, p: float, places: Tensor | None) -> Tensor:
        return leave(super()._embed(idx, start, p, places), self.layout, self.note)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of a rank's tokens, (B, T / cp)."""
        assert targets is not None
        hidden = enter(self.hidden(idx), self.layout, self.note)
        return ops.linear_cross_entropy(hidden, self.output_weight, targets, ignore_index=IGNORE)
