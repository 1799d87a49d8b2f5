"""The layers of a GPT, on the fused ops. Parameters keep the names GPT-2's checkpoints give them,
the gated feed-forward's those of Llama's.

The residual stream is never added to on its own: a block hands on its last branch beside the
stream, and the next norm adds the one to the other on its way. Where kernels run, the bias of the
product that ends the branch is handed on too: its gradient falls out of the norm's. Beside them are
the drop-ins for torch's own modules: LayerNorm, RMSNorm, MultiheadAttention,
TransformerEncoderLayer and TransformerDecoderLayer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.cache import KVCache
from fastgpt.norms import LayerNorm, RMSNorm, new_norm
from fastgpt.ops import backend
from fastgpt.ops.cpu_linear import linear
from fastgpt.ops.ffn import activate
from fastgpt.quantized import Int4Linear, Int8Linear
from fastgpt.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

__all__ = [
    "MLP",
    "Block",
    "Branch",
    "CausalSelfAttention",
    "Documents",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "lends",
    "new_norm",
]

Turn = tuple[Tensor, Tensor]  # cosines and sines of the positions, (T, D / 2) or (B, T, D / 2) each
Again = tuple[nn.Module, Tensor]  # a norm and what it was given, (B, T, C)
Documents = tuple[Tensor, int]
"""Where each ends, (n + 1,) from 0 to B T, and the longest's length."""


class Branch(NamedTuple):
    """What is to be added to the residual stream, x + bias, without the sum having been made.

    Attributes:
        x: (B, T, C).
        bias: (C,) or None.
    """

    x: Tensor
    bias: Tensor | None = None

    @staticmethod
    def of(branch: "Tensor | Branch") -> "Branch":
        return branch if isinstance(branch, Branch) else Branch(branch)


def lends(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's bias may be used, and its output be seen without it, outside.

    Not if it was wrapped or replaced, by FSDP for one, which takes the parameters away as soon as
    the module is done, or by checkpointing, which sees no tensor inside of another thing; nor if a
    hook waits for what goes in or comes out.
    """
    hooked = (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    return type(module) is kind and "forward" not in vars(module) and not hooked


def _through(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of an nn.Linear on a CPU by the product that is the fastest there."""
    if x.device.type == "cpu" and isinstance(layer, nn.Linear) and lends(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def _activated(layer: nn.Module, x: Tensor, activation: str) -> Tensor:
    """The activation of layer(x), which a quantised layer gives at once if no hook waits for it."""
    if isinstance(layer, (Int8Linear, Int4Linear)) and lends(layer, type(layer)):
        y: Tensor = layer(x, activation)
        return y
    return activate(layer(x), activation)


def _whole(y: Tensor, apart: bool) -> Tensor | Branch:
    return Branch(y) if apart else y


def unchanged(kept: list[tuple[Tensor, int]]) -> None:
    """Raise unless tensors are still of the versions beside them."""
    for t, version in kept:
        if t._version != version:
            raise RuntimeError(
                "recompute: what backward needs was changed in place after forward;"
                f" got a tensor of shape {tuple(t.shape)} at version {t._version}, not {version}"
            )


@contextmanager
def made_again(x: Tensor, again: Again | None) -> Iterator[None]:
    """Inside, autograd keeps nothing of x = norm(h) for backward, which makes it again.

    Like autograd's own, backward raises if what it needs was changed in place since. Nothing
    happens if again is None, in a graph that is compiled, whose compiler decides what is kept, and
    under the transforms of torch.func, which know no such hooks.
    """
    if (
        again is None
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        yield
        return
    home, dtype = x.untyped_storage()._cdata, x.dtype
    norm, h = again[0], again[1].detach()
    sources = [(t, t._version) for t in (h, *norm.parameters())]

    def pack(t: Tensor) -> Any:
        if t.untyped_storage()._cdata != home or t.dtype != dtype:
            return t, t._version
        return t.shape, t.stride(), t.storage_offset()

    def unpack(kept: Any) -> Tensor:
        unchanged(sources if len(kept) == 3 else [kept])
        if len(kept) == 2:
            t: Tensor = kept[0]
            return t
        with torch.no_grad():
            made: Tensor = norm(h.to(torch.promote_types(h.dtype, dtype))).to(dtype)
        return made.as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class CausalSelfAttention(nn.Module):
    """Causal self-attention: c_proj(concat_h softmax(q_h k_g^T / sqrt(D)) v_g), g = h // (H / Hkv).

    Position i weighs the positions j <= i, with a window only j > i - window; its weights are
    non-negative and sum to one. c_attn makes q, k and v of all heads at once, (H + 2 Hkv) D rows in
    that order.

    Args:
        n_embd: width C.
        n_head: heads H.
        bias: whether the two linear layers have a bias.
        dropout: probability of dropping an attention weight, in training mode.
        n_kv_head: heads Hkv of k and v, of which n_head is a multiple; n_head if None.
        qk_norm: whether each head's q and k are divided by their root mean square and multiplied
            by q_norm.weight and k_norm.weight, (D,), before they are turned; needs a turn.
        norm_eps: of those norms.
        window: how many positions a query sees, its own included; all if None.
        head_dim: elements D of a head; C / H if None.
    """

    def __init__(
        self, n_embd: int, n_head: int, bias: bool = True, dropout: float = 0.0, *,
        n_kv_head: int | None = None, qk_norm: bool = False, norm_eps: float = 1e-6,
        window: int | None = None, head_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        kv = n_head if n_kv_head is None else n_kv_head
        if head_dim is None and n_embd % n_head:
            raise ValueError(
                f"CausalSelfAttention: n_embd must be a multiple of n_head; got {n_embd}, {n_head}"
            )
        if kv < 1 or n_head % kv:
            raise ValueError(
                f"CausalSelfAttention: n_head must be a multiple of n_kv_head; got {n_head}, {kv}"
            )
        self.n_head, self.n_kv_head, self.dropout = n_head, kv, dropout
        self.window = window
        D = n_embd // n_head if head_dim is None else head_dim
        self.c_attn = nn.Linear(n_embd, (n_head + 2 * kv) * D, bias)
        self.c_proj = nn.Linear(n_head * D, n_embd, bias)
        self.q_norm = RMSNorm(D, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(D, norm_eps) if qk_norm else None

    def forward(
        self, x: Tensor, cache: KVCache | None = None, layer: int = 0, turn: Turn | None = None,
        again: Again | None = None, apart: bool = False, documents: Documents | None = None,
    ) -> Tensor | Branch:  # fmt: skip
        """x: (B, T, C) -> (B, T, C).

        Args:
            x: (B, T, C).
            cache: if given, x are the positions after those it holds, and join them.
            layer: which one of the cache.
            turn: cosines and sines of x's positions, for rotary embedding of q and k.
            again: what makes x, so that it need not be kept for backward.
            apart: whether to leave the sum with c_proj's bias to the caller, as a Branch.
            documents: if given, the rows end to end hold these, and each attends to itself alone.
        """
        H, kv = self.n_head, self.n_kv_head
        with made_again(x, again):
            qkv = _through(self.c_attn, x).unflatten(2, (H + 2 * kv, -1))  # (B, T, heads, D)
        p = self.dropout if self.training else 0.0
        if turn is None and cache is None and documents is None:
            o = ops.attention_packed(qkv, H, dropout_p=p, window=self.window)
        else:
            q, k, v = qkv.split([H, kv, kv], 2)  # (B, T, H, D), (B, T, Hkv, D) twice, views
            o = self._attend(q, k, v, p, cache, layer, turn, documents)
        o, end = o.reshape(*x.shape[:2], -1), self.c_proj
        if apart and lends(end, nn.Linear):
            return Branch(F.linear(o, end.weight), end.bias)
        return _whole(_through(end, o), apart)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, p: float, cache: KVCache | None, layer: int,
        turn: Turn | None, documents: Documents | None,
    ) -> Tensor:  # fmt: skip
        """q (B, T, H, D) and k, v (B, T, Hkv, D) turned, k and v with those of the cache."""
        q, k = self.turned(q, k, turn)
        if cache is not None:
            return cache.attend(layer, q, k, v, p)
        if documents is not None:
            cu, longest = documents
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B T, H, D), views
            return ops.attention_varlen(
                q, k, v, cu, cu, longest, longest, dropout_p=p, window=self.window
            )
        return ops.attention(q, k, v, dropout_p=p, window=self.window)

    def turned(self, q: Tensor, k: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, Hkv, D), normed and turned to their positions."""
        if turn is None:
            return q, k
        if self.q_norm is None or self.k_norm is None:
            return ops.rotary(q, k, *turn)
        q_weight, k_weight, eps = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return ops.rotary(q, k, *turn, q_weight=q_weight, k_weight=k_weight, eps=eps or 0.0)


class MLP(nn.Module):
    """The feed-forward: c_proj(act(c_fc(x))), one op, or layer by layer where a layer is not
    nn.Linear itself or is watched by a hook.

    Args:
        n_embd: width C.
        bias: whether the two linear layers have a bias.
        activation: "gelu_tanh", "gelu", "relu" or "silu".
        n_inner: width inside; 4 n_embd if None.
        recompute: what is made again in backward, see `ops.ffn`.
    """

    def __init__(
        self, n_embd: int, bias: bool = True, activation: str = "gelu_tanh",
        n_inner: int | None = None, recompute: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.recompute = activation, recompute
        F = 4 * n_embd if n_inner is None else n_inner
        self.c_fc = nn.Linear(n_embd, F, bias)
        self.c_proj = nn.Linear(F, n_embd, bias)

    def forward(self, x: Tensor, apart: bool = False) -> Tensor | Branch:
        """x: (..., C) -> (..., C), or, if apart, a Branch of it and c_proj's bias."""
        up, down = self.c_fc, self.c_proj
        if not (lends(up, nn.Linear) and lends(down, nn.Linear)):
            return _whole(down(_activated(up, x, self.activation)), apart)
        y = ops.ffn(
            x, up.weight, up.bias, down.weight, None if apart else down.bias,
            activation=self.activation, recompute=self.recompute,
        )  # fmt: skip
        return Branch(y, down.bias) if apart else y


class GatedMLP(nn.Module):
    """The gated feed-forward: down_proj(act(gate_proj(x)) * up_proj(x)), Llama's with "silu".

    One op, or layer by layer as MLP. Parameters have the names that Llama's checkpoints give them.

    Args:
        n_embd: width C.
        n_inner: width F inside.
        bias: whether the three linear layers have a bias.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "relu" (ReGLU).
        recompute: what is made again in backward, see `ops.ffn`.
    """

    def __init__(
        self, n_embd: int, n_inner: int, bias: bool = False, activation: str = "silu",
        recompute: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.recompute = activation, recompute
        self.gate_proj = nn.Linear(n_embd, n_inner, bias)
        self.up_proj = nn.Linear(n_embd, n_inner, bias)
        self.down_proj = nn.Linear(n_inner, n_embd, bias)

    def forward(self, x: Tensor, apart: bool = False) -> Tensor | Branch:
        """x: (..., C) -> (..., C), or, if apart, a Branch of it and down_proj's bias."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not all(lends(part, nn.Linear) for part in (gate, up, down)):
            return _whole(down(_activated(gate, x, self.activation) * up(x)), apart)
        y = ops.ffn(
            x, up.weight, up.bias, down.weight, None if apart else down.bias,
            activation=self.activation, w_gate=gate.weight, b_gate=gate.bias,
            recompute=self.recompute,
        )  # fmt: skip
        return Branch(y, down.bias) if apart else y


class Block(nn.Module):
    """A pre-norm transformer block: h += attn(ln_1(h)); h += mlp(ln_2(h)).

    Both adds happen in a norm: that of the attention in ln_2, that of the feed-forward in whatever
    norm comes after the block. A block is GPT-2's, or with gated=True Llama's: RMSNorm for
    LayerNorm and GatedMLP for MLP.

    Args:
        n_embd, n_head, bias, n_kv_head, qk_norm, window, head_dim: see CausalSelfAttention.
        activation, n_inner: see MLP and GatedMLP; a gated block needs n_inner.
        dropout: of attention weights and of every branch before it is added, in training mode.
        norm_eps: of all norms.
        recompute: as in MLP; at level 2 the norms' outputs are made again too.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        bias: bool = True,
        dropout: float = 0.0,
        activation: str = "gelu_tanh",
        *,
        gated: bool = False,
        n_kv_head: int | None = None,
        n_inner: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        recompute: int = 1,
        window: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if gated and n_inner is None:
            raise ValueError("Block: a gated block needs n_inner; got None")
        self.dropout, self.recompute = dropout, recompute
        self.ln_1 = new_norm(n_embd, bias, norm_eps, gated)
        self.attn = CausalSelfAttention(
            n_embd, n_head, bias, dropout, n_kv_head=n_kv_head, qk_norm=qk_norm, norm_eps=norm_eps,
            window=window, head_dim=head_dim,
        )  # fmt: skip
        self.ln_2 = new_norm(n_embd, bias, norm_eps, gated)
        self.mlp: GatedMLP | MLP
        if gated and n_inner is not None:
            self.mlp = GatedMLP(n_embd, n_inner, bias, activation, recompute)
        else:
            self.mlp = MLP(n_embd, bias, activation, n_inner, recompute)

    def forward(
        self, branch: Tensor | Branch | None, h: Tensor, cache: KVCache | None = None,
        layer: int = 0, turn: Turn | None = None, apart: bool = False,
        documents: Documents | None = None,
    ) -> tuple[Tensor | Branch, Tensor]:  # fmt: skip
        """Take a residual stream and a branch not yet added to it; return the next such pair.

        Args:
            branch: (B, T, C), the branch to add to h first, with or without its bias, or None.
            h: (B, T, C), the residual stream.
            cache, layer, turn, documents: see CausalSelfAttention.
            apart: whether to leave the sum with the branch's bias to the caller, as a Branch.

        Returns:
            The feed-forward's branch and the stream it is to be added to, both (B, T, C).
        """
        p = self.dropout if self.training else 0.0
        if branch is None:
            x = self.ln_1(h)
        else:
            branch = Branch.of(branch)
            x, h = self.ln_1(branch.x, h, p, branch.bias)
        lent = lends(self.attn, CausalSelfAttention) and backend.kernels_run(h)
        made = self.attn(x, cache, layer, turn, self._again(self.ln_1, h), lent, documents)
        branch = Branch.of(made)
        x, h = self.ln_2(branch.x, h, p, branch.bias)
        with made_again(x, self._again(self.ln_2, h)):
            if apart and lends(self.mlp, GatedMLP if isinstance(self.mlp, GatedMLP) else MLP):
                return self.mlp(x, apart), h
            return self.mlp(x), h

    def _again(self, norm: nn.Module, h: Tensor) -> Again | None:
        """What makes norm(h) in backward, if that is asked for."""
        return (norm, h) if self.recompute == 2 else None
