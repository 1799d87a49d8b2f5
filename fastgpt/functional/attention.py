"""scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.functional.choice import TORCHS, chosen
from fastgpt.ops import backend
from fastgpt.ops.attention import AttentionFunction
from fastgpt.ops.attention_checks import MAX_HEAD_DIM, attention_obstacle
from fastgpt.ops.attention_reference import Extras
from fastgpt.ops.dropout import draw_seed


def _four(t: Tensor) -> Tensor:
    """(..., H, T, D) as (B, H, T, D)."""
    while t.ndim < 4:
        t = t[None]
    return t.flatten(0, -4)


def _rule(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, gqa: bool,
) -> str | None:  # fmt: skip
    if min(q.ndim, k.ndim, v.ndim) < 2 or (mask is not None and is_causal):
        return TORCHS
    if 0 in q.shape or 0 in k.shape:
        return "the kernel takes nothing empty"
    if k.shape != v.shape:
        return "the kernel takes k and v of one shape"
    if q.shape[:-3] != k.shape[:-3] or q.ndim != k.ndim or q.shape[-1] != k.shape[-1]:
        return "the kernel takes q, k and v of one batch and width"
    heads, kv = (t.shape[-3] if t.ndim > 2 else 1 for t in (q, k))
    if heads != kv and (not gqa or heads % kv):
        return "the kernel takes as many heads of k and v as of q, or fewer with enable_gqa"
    if not 8 <= (D := q.shape[-1]) <= MAX_HEAD_DIM or D % 8:
        return f"the kernel takes a width that is a multiple of 8, at most {MAX_HEAD_DIM}; got {D}"
    if not 0.0 <= dropout_p < 1.0:
        return "the kernel takes a dropout_p in [0, 1)"
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return TORCHS
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            return TORCHS
        full = (*q.shape[:-1], k.shape[-2])
        if mask.ndim > max(4, q.ndim) or (q.ndim > 4 and mask.ndim > 3):
            return "the kernel takes a mask of at most four dimensions"
        for got, most in zip(reversed(mask.shape), reversed((1, 1, *full)), strict=False):
            if got not in (1, most):
                return TORCHS
    scale = D**-0.5 if scale is None else scale
    q, k, v = (_four(t).transpose(1, 2) for t in (q, k, v))
    return attention_obstacle(q, k, v, scale, Extras())


def _hidden(mask: Tensor | None, q: Tensor, k: Tensor) -> Extras:
    """A mask as the kernel takes it, of keys alone where it is the same for all heads and queries;
    q and k are (B, T, H, D)."""
    if mask is None:
        return Extras()
    mask = _four(mask)
    mask = mask.expand(*mask.shape[:3], k.shape[1])
    if mask.dtype != torch.bool:
        return Extras(bias=mask)
    if mask.shape[1:3] == (1, 1):
        return Extras(key_mask=mask[:, 0, 0].expand(q.shape[0], -1))
    return Extras(bias=torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf")))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax(scale q k^T + mask) v.

    Args:
        query: (..., H, Tq, D). The kernel takes float32, float16 and bfloat16, and D a multiple of
            8 up to 256; any strides, a (B, T, H, D) tensor transposed costs no copy.
        key, value: (..., H, Tk, D). The kernel takes one shape of both, and query's leading
            dimensions.
        attn_mask: what broadcasts to (..., H, Tq, Tk): bool, True where a key is seen, or floating
            and added. A bool mask of (B, 1, 1, Tk), which pads, is read as it is; other bool masks
            are made floating ones. To the kernel a query sees nothing, and gives 0, where all its
            scores lie below -1e30, as with a mask of torch.finfo(torch.float32).min.
        dropout_p: probability of dropping a weight, applied always, as torch's is.
        is_causal: query i sees the keys j <= i, counted from the first of each (`ops.attention`
            counts from the last of each).
        scale: D ** -0.5 if None; the kernel takes a positive one.
        enable_gqa: whether k and v may have fewer heads, of which H is a multiple.

    Returns:
        (..., H, Tq, D) in query's dtype, in memory (B, Tq, H, D) if the kernel ran.
    """
    tensors = (query, key, value, attn_mask)
    rest = (dropout_p, is_causal, scale, enable_gqa)
    if not chosen("attention", tensors, _rule, *rest):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (_four(t).transpose(1, 2) for t in backend.autocast(query, key, value))
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    x = _hidden(attn_mask, q, k)
    extras = x if attn_mask is not None else ()
    right = -1
    if is_causal:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # no query sees what comes after
        right = q.shape[1] - k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, _ = AttentionFunction.apply(
        *backend.traceable(q, k, v, scale, -1, right, dropout_p, seed, *extras)
    )
    o = o.transpose(1, 2)
    return o if query.ndim == 4 else o.reshape(query.shape)  # type: ignore[no-any-return]
