"""Attention's specification in plain PyTorch, with a T x T matrix, and its gradient written out."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, reduce, repeat
from torch import Tensor

from fastgpt.ops.dropout import draw_seed, dropout_mask


class Extras(NamedTuple):
    """What changes scores, hides keys or cuts sequences; in the order of the registered ops."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    document_ids: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def padded(self) -> "Extras":
        """The same once sequences that lay end to end are a padded batch."""
        return self._replace(max_seqlen_q=0, max_seqlen_k=0)


def pad(t: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Sequences end to end, (1, total, ...), as a batch of the longest, zeros behind each."""
    n = torch.arange(longest, device=t.device)
    start = cu_seqlens[:-1, None].long()
    if t.shape[1] == 0:
        return t.new_zeros((start.shape[0], longest, *t.shape[2:])) + t.sum()  # 0, with a gradient
    rows = t[0][(start + n).clamp(max=t.shape[1] - 1)]
    inside = n < cu_seqlens.diff()[:, None]
    return torch.where(inside.view(*inside.shape, *[1] * (t.ndim - 2)), rows, 0.0)


def unpad(t: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The inverse of pad."""
    at = torch.arange(total, device=t.device)
    if t.numel() == 0:
        return t.new_zeros((1, total, *t.shape[2:])) + t.sum()
    b = torch.searchsorted(cu_seqlens[1:].long(), at, right=True).clamp(max=t.shape[0] - 1)
    i = (at - cu_seqlens[b]).clamp(0, t.shape[1] - 1)
    return t[b, i][None]


def visible(
    Tq: int, Tk: int, left: int, right: int, device: torch.device, extras: Extras | None = None
) -> tuple[Tensor, Tensor]:
    """Distance from query to key, and whether it sees the key, both (B or 1, Tq, Tk).

    The distance is d = j - (i + Tk - Tq); a query sees -left <= d <= right, where -1 is no bound.
    """
    x = extras or Extras()
    i, j = (torch.arange(T, device=device) for T in (Tq, Tk))
    if x.cu_seqlens_q is None or x.cu_seqlens_k is None:
        d = j - (i + Tk - Tq)[:, None]
        d = d[None]
        see = torch.ones_like(d, dtype=torch.bool)
    else:
        lengths = x.cu_seqlens_k.diff()[:, None, None]
        d = j - i[:, None] - lengths + x.cu_seqlens_q.diff()[:, None, None]
        see = (j < lengths).expand_as(d)
    if left >= 0:
        see = see & (d >= -left)
    if right >= 0:
        see = see & (d <= right)
    if x.key_mask is not None:
        see = see & x.key_mask[:, None]
    if x.document_ids is not None:
        ids = x.document_ids
        see = see & (ids[:, Tk - Tq :, None] == ids[:, None])
    return d, see


def shown(t: Tensor, key_mask: Tensor | None) -> Tensor:
    """Keys or values without what is in the hidden ones, which may be anything, NaN too."""
    return t if key_mask is None else torch.where(key_mask[..., None, None], t, 0.0)


def distance_bias(d: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """ALiBi: -slope * |d| as (B or 1, H, Tq, Tk)."""
    slopes = slopes.to(dtype)
    return -slopes.view(-1, slopes.shape[-1], 1, 1) * d.abs()[:, None]


def _logits(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, x: Extras
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, H, Tq, Tk), -inf where a key is not seen, and the derivative of softcap."""
    s = einsum(q, k, "b i h d, b j h d -> b h i j") * scale
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    d, see = visible(q.shape[1], k.shape[1], left, right, q.device, x)
    bend = None
    if x.softcap:
        th = torch.tanh(s / x.softcap)
        s, bend = x.softcap * th, 1.0 - th * th
    if x.alibi_slopes is not None:
        s = s + distance_bias(d, x.alibi_slopes, s.dtype)
    if x.bias is not None:
        s = s + x.bias
    return s.masked_fill(~see[:, None], float("-inf")), bend


def _heads(t: Tensor, heads: int, x: Extras) -> Tensor:
    """Keys or values, each head as often as queries read it, without what is hidden."""
    return repeat(shown(t, x.key_mask), "b t h d -> b t (h g) d", g=heads // t.shape[2])


def attention_weights(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, p: float, seed: Tensor | None,
    x: Extras,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the weights (B, H, Tq, Tk), dropped out; the logits; (B, H, Tq, 1) has a query any key."""
    s, _ = _logits(q, _heads(k, q.shape[2], x), scale, left, right, x)
    some = (s != float("-inf")).any(-1, keepdim=True)  # of the keys is seen
    s = s.masked_fill(~some, 0.0)
    w = s.softmax(-1) * some
    if p > 0.0:
        seed = draw_seed(q.device) if seed is None else seed
        w = w * dropout_mask(seed, tuple(w.shape), p) / (1.0 - p)
    return w, s, some


def weigh(w: Tensor, v: Tensor, x: Extras) -> Tensor:
    """The weighted sum of the values: (B, H, Tq, Tk), (B, Tk, Hkv, D) -> (B, Tq, H, D)."""
    return einsum(w, _heads(v, w.shape[1], x), "b h i j, b j h d -> b i h d")


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, p: float,
    seed: Tensor | None, x: Extras,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> o: (B, Tq, H, D), lse: (B, H, Tq); left and right as `visible` takes them."""
    if x.max_seqlen_q and x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        o, lse = reference(
            pad(q, x.cu_seqlens_q, x.max_seqlen_q), pad(k, x.cu_seqlens_k, x.max_seqlen_k),
            pad(v, x.cu_seqlens_k, x.max_seqlen_k), scale, left, right, p, seed, x.padded,
        )  # fmt: skip
        lse = unpad(lse.transpose(1, 2), x.cu_seqlens_q, q.shape[1]).transpose(1, 2)
        return unpad(o, x.cu_seqlens_q, q.shape[1]), lse
    w, s, some = attention_weights(q, k, scale, left, right, p, seed, x)
    return weigh(w.to(v.dtype), v, x), s.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))


def reference_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    scale: float, left: int, right: int, p: float, seed: Tensor | None, x: Extras,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of `reference` written out, as ops below autograd need it.

    These are the kernels' formulas; -> dq, dk, dv, dbias, which is empty without a bias.
    """
    if x.max_seqlen_q and x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        cu_q, cu_k, longest = x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q
        dq, dk, dv, none = reference_bwd(
            None if do is None else pad(do, cu_q, longest),
            None if dlse is None else pad(dlse.transpose(1, 2), cu_q, longest).transpose(1, 2),
            pad(q, cu_q, longest), pad(k, cu_k, x.max_seqlen_k), pad(v, cu_k, x.max_seqlen_k),
            pad(lse.transpose(1, 2), cu_q, longest).transpose(1, 2),
            scale, left, right, p, seed, x.padded,
        )  # fmt: skip
        dq = unpad(dq, cu_q, q.shape[1]).contiguous()
        dk, dv = (unpad(t, cu_k, k.shape[1]).contiguous() for t in (dk, dv))
        return dq, dk, dv, none
    g = q.shape[2] // k.shape[2]
    wide = lse.dtype
    qw, kw, vw = q.to(wide), *(
        repeat(shown(t, x.key_mask).to(wide), "b t h d -> b t (h g) d", g=g) for t in (k, v)
    )  # fmt: skip
    s, bend = _logits(qw, kw, scale, left, right, x)
    w = torch.where(s == float("-inf"), 0.0, torch.exp(s - lse[..., None]))
    dow = torch.zeros_like(qw) if do is None else do.to(wide)
    dw = einsum(dow, vw, "b i h d, b j h d -> b h i j")
    kept = w
    if p > 0.0 and seed is not None:
        keep = dropout_mask(seed, tuple(w.shape), p) / (1.0 - p)
        kept, dw = w * keep, dw * keep
    delta = (w * dw).sum(-1, keepdim=True)
    ds = w * (dw - delta if dlse is None else dw - delta + dlse.to(wide)[..., None])
    dbias = q.new_empty(0)
    if x.bias is not None:
        dbias = ds.sum_to_size(x.bias.shape).to(x.bias.dtype).contiguous()
    ds = ds * scale if bend is None else ds * bend * scale
    dq = einsum(ds, kw, "b h i j, b j h d -> b i h d")
    dk = reduce(einsum(ds, qw, "b h i j, b i h d -> b j h d"), "b j (h g) d -> b j h d", "sum", g=g)
    dv = reduce(
        einsum(kept, dow, "b h i j, b i h d -> b j h d"), "b j (h g) d -> b j h d", "sum", g=g
    )
    return (
        dq.to(q.dtype).contiguous(),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        dbias,
    )


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, p: float,
    seed: Tensor | None, return_lse: bool, x: Extras,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Plain PyTorch: its own fused attention where that has the same meaning."""
    Tq, Tk = q.shape[1], k.shape[1]
    bounded = left >= 0 or right >= 0
    hiding = x.key_mask is not None or x.document_ids is not None
    adding = x.alibi_slopes is not None or x.bias is not None
    # torch fills hidden scores with -inf before it scales them: NaN unless the scale is positive.
    # It takes what is added in q's dtype: distances need float32.
    unlike = scale <= 0.0 or q.numel() == 0 or k.numel() == 0 or x.softcap or x.max_seqlen_q
    unlike = bool(unlike) or (adding and q.dtype in (torch.float16, torch.bfloat16))
    # On a GPU its gradient of what is added wants lengths that are multiples of 8.
    unlike = unlike or (adding and q.is_cuda and torch.is_grad_enabled())
    if return_lse or unlike or (p > 0.0 and seed is not None):
        return reference(q, k, v, scale, left, right, p, seed, x)
    # Neither is a comparison itself, which may be a symbol while tracing.
    causal = grouped = False
    if left < 0 and right == 0 and Tq == Tk and not hiding and not adding:
        causal = True
    if q.shape[2] != k.shape[2]:
        grouped = True
    mask = some = None
    if hiding or adding or (bounded and not causal and not (Tq == 1 and left < 0)):
        d, see = visible(Tq, Tk, left, right, q.device, x)
        mask = see[:, None]
        if adding:
            added: Tensor | float = 0.0
            if x.alibi_slopes is not None:
                added = distance_bias(d, x.alibi_slopes, q.dtype)
            if x.bias is not None:
                added = added + x.bias.to(q.dtype)
            mask = torch.where(mask, added, float("-inf"))
        if hiding or x.bias is not None or Tq > Tk:  # a query may see no key: here it sees all
            some = (mask if not adding else mask != float("-inf")).any(-1, keepdim=True)
            mask = torch.where(some, mask, 0.0) if adding else mask | ~some
    k, v = shown(k, x.key_mask), shown(v, x.key_mask)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale,
        enable_gqa=grouped,
    )  # fmt: skip
    return (o if some is None else torch.where(some, o, 0.0)).transpose(1, 2), None
