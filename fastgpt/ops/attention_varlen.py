"""Attention of sequences of any lengths that lie end to end: specification and public function."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.attention import bounds_of, run
from fastgpt.ops.attention_checks import check, check_devices, checked_softcap, said
from fastgpt.ops.attention_reference import Extras, reference
from fastgpt.ops.dropout import check_dropout


def attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention_varlen`: attention of the padded batch."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    extras = Extras(
        softcap or 0.0, alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max(1, max_seqlen_q), max_seqlen_k=max(1, max_seqlen_k),
    )  # fmt: skip
    o, lse = reference(
        q[None], k[None], v[None], scale, *bounds_of(causal, window), dropout_p, seed, extras
    )
    return (o[0], lse[0]) if return_lse else o[0]


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[False] = False,
    seed: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[True], seed: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of B sequences of any lengths that lie end to end, each by itself.

    Sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 and the keys
    cu_seqlens_k[b] .. cu_seqlens_k[b + 1] - 1; either may be none. Lengths are read on the device
    alone, so the rules about what is in cu_seqlens are the caller's to keep.

    Args:
        q: (total_q, H, D) in float32, float16 or bfloat16, as in `attention`.
        k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, from 0 to total_q and to total_k, not
            decreasing.
        max_seqlen_q, max_seqlen_k: the most queries and keys of a sequence, or more. Rows of a
            sequence beyond them are not computed and hold anything.
        causal, softmax_scale, window, dropout_p, softcap, alibi_slopes, seed: as in `attention`,
            with a sequence's own number of queries and of keys for Tq and Tk.
        return_lse: also return the log-sum-exp.

    Returns:
        o: (total_q, H, D) of q's dtype. With return_lse also lse: (H, total_q) float32.

    Raises:
        ValueError: shapes, D, device, window, softcap, max_seqlen or dropout_p outside these rules.
        TypeError: a dtype outside these rules.

    Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691.
    """
    op = "attention_varlen"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(f"{op}: q, k and v must be (total, H, D); {said(q, k, v)}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q, k and v must agree in D; {said(q, k, v)}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64; got {cu.dtype}")
        if cu.ndim != 1 or cu.shape[0] < 1 or cu.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{op}: cu_seqlens_q and cu_seqlens_k must both be (B + 1,);"
                f" got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{op}: {name} must not be negative; got {longest}")
    q, k, v = backend.autocast(q, k, v)
    check(op, q, k, v, window, alibi_slopes, cu_seqlens_q.shape[0] - 1)
    check_devices(
        op, q, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    check_dropout(op, dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    extras = Extras(
        checked_softcap(op, softcap), alibi_slopes,
        cu_seqlens_q=cu_seqlens_q.contiguous(), cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=max(1, max_seqlen_q), max_seqlen_k=max(1, max_seqlen_k),
    )  # fmt: skip
    bounds = bounds_of(causal, window)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    o, lse = run(op, q, k, v, scale, bounds, dropout_p, seed, return_lse, extras)
    o = o.squeeze(0)
    return (o, lse.squeeze(0)) if return_lse and lse is not None else o
