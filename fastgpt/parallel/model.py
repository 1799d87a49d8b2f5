"""GPT whose ranks share heads and vocabulary (tp) or positions (cp), made of a GPT in place."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from fastgpt import ops
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
from fastgpt.ops import backend
from fastgpt.parallel import order, traffic, vocabulary
from fastgpt.parallel.context import Context
from fastgpt.parallel.tensor import (
    Tensors,
    become,
    ended,
    held,
    share,
    share_norm,
)  # fmt: skip


class SharedAttention(CausalSelfAttention):
    """The heads of this rank of tp, the positions of this rank of cp."""

    tensors: Tensors | None
    context: Context | None

    def forward(
        self, x: Tensor, cache: KVCache | None = None, layer: int = 0, turn: Turn | None = None,
        again: Again | None = None, apart: bool = False, documents: Documents | None = None,
    ) -> Tensor | Branch:  # fmt: skip
        """x: (B, T', C), the stream's -> the same; arguments as CausalSelfAttention's."""
        tp, cp = self.tensors, self.context
        if tp is None and (cp is None or not cp.split):
            return super().forward(x, cache, layer, turn, again, apart, documents)
        H, kv = self.n_head, self.n_kv_head
        p = self.dropout if self.training else 0.0
        whole = x if tp is None else tp.enter(x)  # (B, T, C)
        if tp is not None:
            again = tp.again(x, again)
        with held(self, tp, (self.q_norm, self.k_norm)):
            with made_again(whole, again):
                qkv = self.c_attn(whole).unflatten(2, (H + 2 * kv, -1))
            q, k, v = qkv.split([H, kv, kv], 2)
            if cp is not None and cp.split:
                o = cp.attention(*self.turned(q, k, turn), v, p)
            elif turn is None and cache is None and documents is None:
                o = ops.attention_packed(qkv, H, dropout_p=p, window=self.window)
            else:
                o = self._attend(q, k, v, p, cache, layer, turn, documents)
            o = o.reshape(*qkv.shape[:2], -1)
            if tp is None:
                return ended(self.c_proj(o), None, apart)
            y, bias = F.linear(o, self.c_proj.weight), self.c_proj.bias
        y = tp.leave(y)
        return ended(y, bias, apart or backend.kernels_run(y))  # the block takes either


class SharedGPT(GPT):
    """A GPT of several ranks: the same arguments on all, and the same results.

    Its loss is that of all positions, also where cp shares them; its gradients are those of this
    rank's, cp times, so that their mean over the ranks that share rows or positions is right.
    """

    tensors: Tensors | None
    context: Context | None

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As GPT's: the states of all positions, on all ranks."""
        h, cp = self._here(idx, cache, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), self.context
        return h if cp is None or not cp.split else cp.all(h)

    def _here(
        self, idx: Tensor, cache: KVCache | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The states of the positions that this rank of cp has, on all ranks of tp."""
        tp, cp = self.tensors, self.context
        T = idx.shape[-1]
        if cp is not None:
            cp.begin(T, cache is not None)
            cp.ids = _ids(idx, cu_seqlens) if cp.split else None
            T = T // cp.size if cp.split else T
        if tp is not None:
            tp.begin(T)
            if self.training and self.config.dropout > 0.0 and tp.sequence and not tp.split:
                # Each rank would drop out others of what all must hold alike; see Layout.seed.
                raise ValueError(
                    f"parallel: with dropout tp must divide the positions, {T}; got tp {tp.size};"
                    " sequence=False takes any"
                )
        h = super().hidden(idx, cache, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return h if tp is None else tp.enter(h)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As GPT's."""
        tp, cp = self.tensors, self.context
        cls = type(self)
        if targets is None:
            hidden = cls.hidden(self, idx, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            return cls.logits(self, hidden)
        self._check_targets(idx, targets)
        h = self._here(idx, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        here = targets if cp is None else cp.mine(targets)
        if tp is None:
            total = ops.linear_cross_entropy(
                h, self.output_weight, here, ignore_index=IGNORE, reduction="sum"
            )
        else:
            total = vocabulary.linear_cross_entropy(
                h, tp.local(self.output_weight), here, self._first, tp.group, IGNORE
            )
        if cp is not None and cp.split:
            total = traffic.summed(total, cp.group, cp.size)
        return total / (targets != IGNORE).sum()

    def logits(self, hidden: Tensor) -> Tensor:
        """As GPT's: those of the whole vocabulary, on all ranks."""
        tp = self.tensors
        if tp is None:
            return super().logits(hidden)
        table = tp.local(self.output_weight)
        return vocabulary.logits(hidden, table, self.config.vocab_size, tp.group)

    def _embed(self, idx: Tensor, start: int, p: float, places: Tensor | None) -> Tensor:
        tp, cp = self.tensors, self.context
        if tp is None and (cp is None or not cp.split):
            return super()._embed(idx, start, p, places)
        V = self.config.vocab_size
        known = type(idx) is Tensor and idx.device.type == "cpu"  # a fake tensor has no values
        if known and not bool(((idx >= 0) & (idx < V)).all()):
            return super()._embed(idx, start, p, places)
        if places is None:
            places = torch.arange(start, start + idx.shape[1], device=idx.device)[None]
        if cp is not None:
            idx, places = cp.mine(idx), cp.mine(places)
        if tp is None:
            h = ops.embedding(idx, self.wte.weight)
        else:
            h = tp.leave(vocabulary.embedding(idx, tp.local(self.wte.weight), self._first))
            places = places[:, tp.mine(places.shape[1])]
        if self.wpe is not None:
            wpe = self.wpe.weight if tp is None else tp.local(self.wpe.weight)
            h = h + ops.embedding(places, wpe)
        return F.dropout(h, p) if p > 0.0 else h

    def _turn(self, start: int, T: int, places: Tensor | None = None) -> Turn | None:
        turn, cp = super()._turn(start, T, places), self.context
        if turn is None or cp is None:
            return turn
        cos, sin = (cp.mine(t, t.ndim - 2) for t in turn)
        return cos, sin

    @property
    def _cached_heads(self) -> int:
        heads = super()._cached_heads
        return heads if self.tensors is None else heads // self.tensors.size

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As GPT's, of DTensors, with GPT's order of rows; all ranks must call this together."""
        made = super().state_dict(*args, **kwargs)
        made.update(order.saved(made, self.config))
        return made

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As GPT's: of whole tensors, the same on all ranks, or of DTensors as state_dict gives."""
        own = super().state_dict()
        placed = {
            name: order.placed(t, own[name], name, self.config) if name in own else t
            for name, t in state_dict.items()
        }
        return super().load_state_dict(placed, strict, assign)

    @property
    def _first(self) -> int:
        """Where this rank's rows of the vocabulary begin."""
        assert self.tensors is not None
        return vocabulary.first_row(self.config.vocab_size, self.tensors.group)


def _ids(idx: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """(B, T) the number of each token's document.

    Raises:
        ValueError: one begins in another row than it ends in; on a CPU, elsewhere it is cut there.
    """
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        firsts = torch.arange(0, idx.numel(), idx.shape[1], dtype=cu_seqlens.dtype)
        if not bool(torch.isin(firsts, cu_seqlens).all()):
            raise ValueError("parallel: with cp, a document must lie in one row; got one in two")
    at = torch.arange(idx.numel(), device=idx.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, at, right=True).view(idx.shape)


def shared(model: GPT, tp: DeviceMesh | None, cp: DeviceMesh | None, sequence: bool) -> None:
    """Make a GPT a SharedGPT, in place; each rank keeps its part of the parameters.

    Raises:
        ValueError: the ranks of tp do not divide its heads or columns, or it is no plain GPT.
    """
    if tp is not None:
        check(model, tp.size())
    if cp is not None and model.config.window is not None:
        raise ValueError(
            "parallel: with cp, attention sees all positions before its own;"
            f" got a window of {model.config.window}"
        )
    tensors = None if tp is None else Tensors(tp, sequence)
    context = None if cp is None else Context(cp)
    for block in model.h:
        assert isinstance(block, Block)
        if tensors is not None:
            share(block, tensors)
        attn = become(block.attn, SharedAttention)
        attn.tensors, attn.context = tensors, context
    if tensors is not None:
        for table in (model.wte, model.lm_head):
            if table is not None:
                tensors.place(table, Shard(0), Replicate())
        for module in (model.wpe, model.ln_f):
            if module is not None:
                tensors.place(module, Replicate(), Replicate())
        share_norm(model.ln_f, tensors)
    made = become(model, SharedGPT)
    made.tensors, made.context = tensors, context


def check(model: GPT, size: int) -> None:
    """Whether so many ranks can share a model's products."""
    c = model.config
    named = {"n_head": c.n_head, "n_kv_head": c.kv_heads, "n_inner": c.inner}
    for name, n in named.items():
        if n % size:
            raise ValueError(f"parallel: tp must divide {name}, {n}; got tp {size}")
    if c.vocab_size < size:
        raise ValueError(f"parallel: tp must be at most vocab_size, {c.vocab_size}; got tp {size}")
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "gate_proj", "up_proj", "down_proj")):
            if type(module) is not nn.Linear:
                kind = type(module).__name__
                raise ValueError(f"parallel: with tp, {name} must be nn.Linear; got {kind}")
