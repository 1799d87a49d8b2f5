"""torch's own nn.MultiheadAttention and nn.TransformerEncoderLayer."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.patching.feed_forward import FeedForwardHow, activation_of, feed_forward, linear
from fastgpt.patching.norms import NormHow, norm_of
from fastgpt.patching.residual import Norms, probability
from fastgpt.patching.swap import Patched, Swap, fusable, kind, obstacle, own_forward


class PatchedMultiheadAttention(Patched):
    """nn.MultiheadAttention without weights returned: need_weights=True is torch's own."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        m: Any = self
        if (
            need_weights
            or any(t.ndim != 3 or t.is_nested for t in (query, key, value))
            or (is_causal and (attn_mask is None or query.shape != key.shape))
            or (m.dropout >= 1.0 and self.training)
        ):
            made: tuple[Tensor, Tensor | None] = self.original(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            return made
        bias = None if key_padding_mask is None else _added(key_padding_mask, query)[:, None, None]
        if attn_mask is not None and not is_causal:
            mask = _added(attn_mask, query)
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, m.num_heads))
            bias = mask if bias is None else bias + mask
        p = m.dropout if self.training else 0.0
        if query is key and key is value:
            qkv = self._heads(query, m.in_proj_weight, m.in_proj_bias)
            o = ops.attention_packed(qkv, m.num_heads, causal=is_causal, bias=bias, dropout_p=p)
        else:
            ws, bs = m.in_proj_weight.chunk(3), (None,) * 3
            if m.in_proj_bias is not None:
                bs = m.in_proj_bias.chunk(3)
            q, k, v = map(self._heads, (query, key, value), ws, bs)
            o = ops.attention(q, k, v, causal=is_causal, bias=bias, dropout_p=p)
        o = F.linear(o.flatten(2), m.out_proj.weight, m.out_proj.bias)
        return o if m.batch_first else o.transpose(0, 1), None

    def _heads(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The heads of a product of x, (B, T, heads, D)."""
        m: Any = self
        y: Tensor = F.linear(x, weight, bias).unflatten(-1, (-1, m.head_dim))
        return y if m.batch_first else y.transpose(0, 1)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """What is added to the scores; a bool mask is True where a key is hidden."""
    if mask.is_floating_point():
        return mask
    return x.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def recognise_multihead(module: nn.Module) -> Swap | str | None:
    """A swap if module is nn.MultiheadAttention and the op can take its heads."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if own_forward(module) is not nn.MultiheadAttention.forward:
        return "its forward is not nn.MultiheadAttention's"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "it has kdim, vdim, add_bias_kv or add_zero_attn"
    if module.head_dim % 8 or module.head_dim > 256:
        return f"heads must be of 8, 16, ... or 256 columns; its are of {module.head_dim}"
    why = obstacle(*module.parameters())
    return why or Swap(
        PatchedMultiheadAttention, None, "attention where need_weights=False", ("out_proj",)
    )


@dataclass(frozen=True)
class EncoderHow:
    """The norms, the feed-forward, and the types of all that is fused."""

    norm1: NormHow
    norm2: NormHow
    ffn: FeedForwardHow
    types: tuple[type[nn.Module], ...]


class PatchedEncoderLayer(Patched):
    """nn.TransformerEncoderLayer. Its feed-forward has dropout inside, which ops.ffn has not: where
    that is at work, the layers run one by one."""

    def run(
        self, src: Tensor, src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Any:  # fmt: skip
        m: Any = self
        how: EncoderHow = self._fastgpt_how
        layers = (m.norm1, m.norm2, m.linear1, m.linear2, m.dropout, m.dropout1, m.dropout2)
        p1, p2 = probability(self, "dropout1"), probability(self, "dropout2")
        if src.is_nested or src.ndim != 3 or not fusable(layers, how.types) or max(p1, p2) >= 1.0:
            return self.original(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            a: Tensor = m.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                need_weights=False, is_causal=is_causal,
            )[0]  # fmt: skip
            return a

        def inner(x: Tensor) -> Tensor:
            if probability(self, "dropout") > 0.0:
                y: Tensor = m.linear2(m.dropout(m.activation(m.linear1(x))))
                return y
            return feed_forward(how.ffn, (m.linear1, m.linear2), x)

        if m.norm_first:
            a = attend(norm_of(m.norm1, how.norm1, src))
            y, h = norm_of(m.norm2, how.norm2, a, src, p1)
            return h + m.dropout2(inner(y))
        x = norm_of(m.norm1, how.norm1, attend(src), src, p1)[0]
        return norm_of(m.norm2, how.norm2, inner(x), x, p2)[0]


def recognise_encoder(module: nn.Module, norms: Norms) -> Swap | str | None:
    """A swap if module is nn.TransformerEncoderLayer."""
    if not isinstance(module, nn.TransformerEncoderLayer):
        return None
    for name in ("forward", "_sa_block", "_ff_block"):
        if getattr(kind(module), name) is not getattr(nn.TransformerEncoderLayer, name):
            return f"its {name} is not nn.TransformerEncoderLayer's"
    if module.norm1 not in norms or module.norm2 not in norms:
        return "its norms are not replaced"
    activation = activation_of(module.activation)
    if activation is None or not (linear(module.linear1) and linear(module.linear2)):
        return "its feed-forward is not one that ops.ffn computes"
    why = obstacle(*module.linear1.parameters(), *module.linear2.parameters())
    if why is not None:
        return why
    parts = ("norm1", "norm2", "linear1", "linear2", "dropout", "dropout1", "dropout2")
    types = tuple(kind(getattr(module, name)) for name in parts)
    ffn = FeedForwardHow("linear1", "linear2", "", "", "", activation, types[2:4])
    how = EncoderHow(norms[module.norm1], norms[module.norm2], ffn, types)
    words = f"layer_norm with the residual add, ffn ({activation})"
    return Swap(PatchedEncoderLayer, how, words, parts)
