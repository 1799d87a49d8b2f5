"""Drop-ins for torch's nn.MultiheadAttention, nn.TransformerEncoderLayer and
nn.TransformerDecoderLayer, on the fused ops.

They are torch's classes with another forward: constructor, initial values and state_dict are
torch's, and so is the answer to input that a forward here does not take.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import functional, ops
from fastgpt.functional.choice import TORCHS
from fastgpt.norms import LayerNorm, RMSNorm
from fastgpt.ops import backend
from fastgpt.ops.attention_checks import MAX_HEAD_DIM

Activation = str | Callable[[Tensor], Tensor]


class MultiheadAttention(nn.MultiheadAttention):
    """concat_h(softmax(q_h k_h^T / sqrt(D) + mask) v_h) W^T + b, of projections q, k and v.

    Constructor, initial values and state_dict are nn.MultiheadAttention's.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results are nn.MultiheadAttention's.

        Args:
            query: (Tq, B, C), with batch_first (B, Tq, C), or (Tq, C).
            key: (Tk, B, kdim), (B, Tk, kdim) or (Tk, kdim).
            value: the same with vdim.
            key_padding_mask: (B, Tk) or (Tk), bool, True where a key is hidden, or floating and
                added to the scores.
            need_weights: whether to return the weights too. They are a Tq x Tk matrix that a kernel
                never makes: torch's own forward runs then. Give False wherever they are not needed.
            attn_mask: (Tq, Tk) or (B H, Tq, Tk), bool, True where a key is hidden, or floating.
            average_attn_weights: whether those returned are the mean over the heads.
            is_causal: the hint that attn_mask, which must be given too, is the causal one.

        Returns:
            The output, of query's shape, and the weights or None.
        """
        why = self._obstacle(query, key, value, key_padding_mask, need_weights, attn_mask)
        if why is not None or (is_causal and attn_mask is None):
            backend.kernel_chosen("attention", query, why or "torch wants a mask beside the hint")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        if is_causal and key_padding_mask is None:
            attn_mask = None
        batched = query.ndim == 3
        if batched and not self.batch_first:
            query, key, value = _same(query, key, value, lambda t: t.transpose(0, 1))
        elif not batched:
            query, key, value = _same(query, key, value, lambda t: t[None])
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if self._packs(query, key, value, key_padding_mask, attn_mask, is_causal):
            o = self._packed(query, key_padding_mask, is_causal)
        else:
            o = self._attended(query, key, value, key_padding_mask, attn_mask, is_causal)
        o = o.flatten(2)  # (B, Tq, C), a view where the kernel ran
        out = self.out_proj(o.transpose(0, 1) if batched and not self.batch_first else o)
        return (out if batched else out[0]), None

    def _packs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
        attn_mask: Tensor | None, is_causal: bool,
    ) -> bool:  # fmt: skip
        """Whether one product makes q, k and v, and no Tq x Tk mask is needed."""
        return (
            self._qkv_same_embed_dim
            and query is key is value
            and self.bias_k is None
            and not self.add_zero_attn
            and (attn_mask is None or is_causal)
            and (key_padding_mask is None or key_padding_mask.dtype == torch.bool)
            and self.head_dim % 8 == 0
            and self.head_dim <= MAX_HEAD_DIM
            and self.dropout < 1.0
        )

    def _packed(self, x: Tensor, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attention of x (B, T, C) to itself -> (B, T, H, D)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return ops.attention_packed(
            qkv.unflatten(2, (3 * self.num_heads, self.head_dim)), self.num_heads,
            causal=is_causal, dropout_p=self.dropout if self.training else 0.0,
            key_mask=None if key_padding_mask is None else ~key_padding_mask,
        )  # fmt: skip

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
        attn_mask: Tensor | None, is_causal: bool,
    ) -> Tensor:  # fmt: skip
        """Attention of (B, T, C) each -> (B, Tq, H, D)."""
        q, k, v = self._projected(query, key, value)
        k, v, extra = self._extended(k, v)
        H = self.num_heads
        q, k, v = (t.unflatten(2, (H, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = _merged(attn_mask, key_padding_mask, q.shape[0], H, extra, q.dtype)
        o = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal and mask is None
        )
        return o.transpose(1, 2)

    def _obstacle(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
        need_weights: bool, attn_mask: Tensor | None,
    ) -> str | None:  # fmt: skip
        """Why torch's own forward is to run: to make more than this one can, or to refuse."""
        if query.is_nested or key.is_nested or value.is_nested:
            return "the kernel takes no nested tensors"
        if need_weights:
            return "need_weights asks for the matrix of weights"
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            return TORCHS
        time = 1 if query.ndim == 3 and self.batch_first else 0
        Tq, Tk = query.shape[time], key.shape[time]
        B = query.shape[1 - time] if query.ndim == 3 else 1
        shapes = key.shape[:-1] == value.shape[:-1] and (
            query.ndim == 2 or key.shape[1 - time] == B
        )
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if not shapes or widths != (self.embed_dim, self.kdim, self.vdim):
            return TORCHS
        padding = (B, Tk) if query.ndim == 3 else (Tk,)
        for mask, fits in (
            (key_padding_mask, (padding,)),
            (attn_mask, ((Tq, Tk), (B * self.num_heads, Tq, Tk))),
        ):
            if mask is not None and (
                tuple(mask.shape) not in fits
                or not (mask.dtype == torch.bool or mask.is_floating_point())
            ):
                return TORCHS
        return None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, in one product where they are of one tensor."""
        C, bias = self.embed_dim, self.in_proj_bias
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        elif key is value:
            (wq, wkv), (bq, bkv) = (
                (None, None) if t is None else t.split([C, 2 * C])
                for t in (self.in_proj_weight, bias)
            )
            return F.linear(query, wq, bq), *F.linear(key, wkv, bkv).chunk(2, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v, (B, T, C), with bias_k and bias_v and with zeros behind them; and how many."""
        before = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, b.to(t.dtype).expand(len(t), 1, -1)), 1)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return k, v, k.shape[1] - before


def _same(
    query: Tensor, key: Tensor, value: Tensor, f: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """f of all three; what is one tensor stays one."""
    q = f(query)
    k = q if key is query else f(key)
    return q, k, (k if value is key else f(value))


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int, H: int, extra: int,
    dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """Both masks as one for scaled_dot_product_attention, which is True where a key is seen; extra
    keys at the end are seen by all."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (B, H)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if extra:
        masks = [F.pad(m, (0, extra)) for m in masks]  # False, or 0
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, float("-inf"))
        if m.dtype == torch.bool else m.to(dtype) for m in masks
    ]  # fmt: skip
    return added[0] if len(added) == 1 else added[0] + added[1]


def _adopt(layer: nn.Module) -> None:
    """Give the parts that torch made the forward of their drop-ins, which have the same state."""
    for part in layer.children():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = MultiheadAttention
        elif type(part) is nn.LayerNorm:
            part.__class__ = LayerNorm


def _bare(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part is still what torch made it, and nobody listens to its forward."""
    return type(part) is kind and not part._forward_hooks and not part._forward_pre_hooks


def _added(
    norm: nn.Module, branch: Tensor, residual: Tensor, drop: nn.Dropout
) -> tuple[Tensor, Tensor]:
    """norm(h) and h = residual + drop(branch), in one pass if the parts are as they were made."""
    p = drop.p if drop.training else 0.0
    if isinstance(norm, (LayerNorm, RMSNorm)) and _bare(drop, nn.Dropout) and p < 1.0:
        y, h = norm(branch.to(residual.dtype), residual, p)  # autocast's branch is narrower
        return y, h
    h = residual + drop(branch)
    return norm(h), h


def _activation(f: Callable[[Tensor], Tensor]) -> str | None:
    """The name that ops.ffn has for an activation, or None."""
    if f is F.relu or f is torch.relu or type(f) is nn.ReLU:
        return "relu"
    if f is F.gelu or f is functional.gelu:
        return "gelu"
    if type(f) is nn.GELU:
        return "gelu" if f.approximate == "none" else "gelu_tanh"
    return "silu" if f is F.silu or type(f) is nn.SiLU else None


def _feed_forward(layer: "TransformerEncoderLayer | TransformerDecoderLayer", x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), fused if nothing is dropped inside."""
    up, down, drop = layer.linear1, layer.linear2, layer.dropout
    name = _activation(layer.activation)
    dropping = drop.p > 0.0 and drop.training
    if name is None or dropping or not (_bare(up, nn.Linear) and _bare(down, nn.Linear)):
        y: Tensor = down(drop(layer.activation(up(x))))
        return y
    return ops.ffn(x, up.weight, up.bias, down.weight, down.bias, activation=name)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Attention and a feed-forward, each with its residual add and a norm behind or before it.

    Constructor, initial values and state_dict are nn.TransformerEncoderLayer's. The adds happen in
    the norms, with the dropout of the branch. The feed-forward is one op where it drops nothing
    inside, in eval mode or with dropout=0, and its activation is relu, gelu or silu.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Arguments and result are nn.TransformerEncoderLayer's.

        Args:
            src: (T, B, C), with batch_first (B, T, C), or (T, C).
            src_mask, src_key_padding_mask, is_causal: attn_mask, key_padding_mask and is_causal of
                MultiheadAttention.
        """
        if src.is_nested:  # nn.TransformerEncoder makes one of a padded batch, in eval mode
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = self.norm1(src) if self.norm_first else src
        branch, _ = self.self_attn(
            x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask,
            is_causal=is_causal,
        )  # fmt: skip
        if self.norm_first:
            y, h = _added(self.norm2, branch, src, self.dropout1)
            out: Tensor = h + self.dropout2(_feed_forward(self, y))
            return out
        y, _ = _added(self.norm1, branch, src, self.dropout1)
        return _added(self.norm2, _feed_forward(self, y), y, self.dropout2)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Attention, attention to a memory and a feed-forward, each with its residual add and a norm.

    Constructor, initial values and state_dict are nn.TransformerDecoderLayer's; otherwise as
    TransformerEncoderLayer.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Arguments and result are nn.TransformerDecoderLayer's.

        Args:
            tgt: (T, B, C), with batch_first (B, T, C), or (T, C).
            memory: the same with its own T.
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: of the attention of tgt to itself.
            memory_mask, memory_key_padding_mask, memory_is_causal: of that to memory.
        """
        x = self.norm1(tgt) if self.norm_first else tgt
        branch, _ = self.self_attn(
            x, x, x, tgt_key_padding_mask, need_weights=False, attn_mask=tgt_mask,
            is_causal=tgt_is_causal,
        )  # fmt: skip
        first = self.norm2 if self.norm_first else self.norm1
        y, h = _added(first, branch, tgt, self.dropout1)
        branch, _ = self.multihead_attn(
            y, memory, memory, memory_key_padding_mask, need_weights=False, attn_mask=memory_mask,
            is_causal=memory_is_causal,
        )  # fmt: skip
        second = self.norm3 if self.norm_first else self.norm2
        y, h = _added(second, branch, h if self.norm_first else y, self.dropout2)
        branch = _feed_forward(self, y)
        if self.norm_first:
            out: Tensor = h + self.dropout3(branch)
            return out
        return _added(self.norm3, branch, y, self.dropout3)[0]
