"""The attention of transformers' models on `fastgpt.ops.attention`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from fastgpt.ops import backend
from fastgpt.ops.attention import attention as op
from fastgpt.ops.attention import bounds_of
from fastgpt.ops.attention_checks import MAX_HEAD_DIM
from fastgpt.ops.attention_reference import Extras, attention_weights, plain, weigh


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sparse_indices: Tensor | None = None,
    cache: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scaling q k^T + mask) v for a transformers model; what AttentionInterface calls.

    Args:
        module: the model's attention; its is_causal counts where no mask and no is_causal is given.
        query: (B, H, Tq, D).
        key, value: (B, Hkv, Tk, D), H a multiple of Hkv; value may have another D. A D that is no
            multiple of 8 is filled up with zeros; beyond 256 plain PyTorch runs.
        attention_mask: as `fastgpt.huggingface.mask` makes them; or of the user's own making, bool
            or added to the scores, (B or 1, H or 1, Tq or 1, Tk).
        scaling: D ** -0.5 if None.
        dropout: probability of dropping a weight; 0 unless the model is training.
        softcap: as in `ops.attention`.
        is_causal: overrides the module's.
        position_bias: added to the scores, (B or 1, H or 1, Tq or 1, Tk).
        s_aux, sparse_indices, cache: attention sinks, keys chosen by an indexer, a paged cache:
            not supported.
        others: what other implementations take. The window is in the mask.

    Returns:
        o: (B, Tq, H, D) and the weights (B, H, Tq, Tk) if the model was called with
        output_attentions=True, by plain PyTorch; else None.

    Raises:
        NotImplementedError: sinks, sparse_indices or a paged cache are given.
        TypeError: a mask of another dtype.
    """
    asked = {"attention sinks": s_aux, "sparse_indices": sparse_indices, "a paged cache": cache}
    for name, given in asked.items():
        if given is not None:
            raise NotImplementedError(
                f'attn_implementation="fastgpt": {name} must be absent;'
                f" got {name} from {type(module).__name__}"
            )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, T, H, D)
    rest: dict[str, Any] = {"causal": False, "dropout_p": dropout, "softcap": softcap}
    bias = position_bias
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rest["causal"] = bool(causal)
    elif attention_mask.dtype in (torch.uint8, torch.int32):
        rest |= _causal(attention_mask)
        n = attention_mask.shape[3]
        k, v, bias = k[:, :n], v[:, :n], None if bias is None else bias[..., :n]
    elif attention_mask.dtype == torch.bool:
        if attention_mask.shape[1] == attention_mask.shape[2] == 1:
            rest["key_mask"] = attention_mask[:, 0, 0].expand(k.shape[0], -1)
        else:
            seen = q.new_zeros(()) if bias is None else bias
            bias = torch.where(attention_mask, seen, float("-inf"))
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        raise TypeError(
            'attn_implementation="fastgpt": attention_mask must be bool or floating;'
            f" got {attention_mask.dtype}"
        )
    rest |= {"bias": bias, "softmax_scale": q.shape[-1] ** -0.5 if scaling is None else scaling}
    weights = _weights_wanted() or bool(others.get("output_attentions"))
    return _attend(q, k, v, rest, weights=weights)


def _causal(mask: Tensor) -> dict[str, Any]:
    """What the library's own masks say, in the arguments of the op."""
    window = mask.shape[2]
    row = mask[:, 0, 0]
    said = {"document_ids": row} if mask.dtype == torch.int32 else {"key_mask": row.bool()}
    return {"causal": True, "window": None if window == 1 else window, **said}


def _weights_wanted() -> bool:
    """Whether the model that runs was called with output_attentions=True.

    transformers collects what attentions return, by hooks, and tells them nothing.
    """
    # A context variable's get is nothing that dynamo can trace.
    compiling = torch.compiler.is_compiling()
    wanted = _active_collector.global_var if compiling else _active_collector.get()
    return wanted is not None and any(name.endswith("attentions") for name in wanted)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rest: dict[str, Any], weights: bool
) -> tuple[Tensor, Tensor | None]:
    D, Dv = q.shape[-1], v.shape[-1]
    wide = -(-max(D, Dv) // 8) * 8
    if weights or wide > MAX_HEAD_DIM:
        why = "output_attentions asks for the weights, which the kernel never makes"
        if not weights:
            why = f"the kernel takes D up to {MAX_HEAD_DIM}; got {max(D, Dv)}"
        q, k, v = backend.autocast(q, k, v)
        return _plain(q, k, v, rest, why, weights)
    if wide != D:
        q, k = F.pad(q, (0, wide - D)), F.pad(k, (0, wide - D))
    if wide != Dv:
        v = F.pad(v, (0, wide - Dv))
    o = op(q, k, v, **rest)
    return (o if wide == Dv else o[..., :Dv]), None


def _plain(
    q: Tensor, k: Tensor, v: Tensor, rest: dict[str, Any], why: str, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch, and `explain` says why."""
    backend.kernel_chosen("attention", q, why)
    x = Extras(
        rest["softcap"] or 0.0, None, rest["bias"], rest.get("key_mask"), rest.get("document_ids")
    )
    bounds, p = bounds_of(rest["causal"], rest.get("window")), rest["dropout_p"]
    scale = rest["softmax_scale"]
    if not weights:
        return plain(q, k, v, scale, *bounds, p, None, False, x)[0], None
    w = attention_weights(q, k, scale, *bounds, p, None, x)[0].to(q.dtype)
    return weigh(w, v, x), w
