"""Token and position embedding, with dropout behind their sum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.dropout import check_dropout, draw_seed, dropout_mask
from fastgpt.ops.library import define, fake, impl


def _drop(h: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of h (B, T, C), by the mask of a seed or by torch's generator."""
    if p == 0.0:
        return h
    if seed is None:
        return F.dropout(h, p)
    keep = dropout_mask(seed, (h.numel() // max(1, h.shape[-1]), h.shape[-1]), p)
    return (h * keep.view(h.shape) / (1.0 - p)).to(h.dtype)


def embedding_ref(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor | None = None,
    *,
    start: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The specification of `embedding`."""
    h = F.embedding(idx, wte)  # (B, T, C)
    if wpe is not None:
        h = h + wpe[start : start + idx.shape[1]]
    return _drop(h, dropout_p, seed)


forward_op = define(
    "embedding_fwd(Tensor idx, Tensor wte, Tensor? wpe, SymInt start, float dropout_p,"
    " Tensor? seed) -> Tensor"
)
backward_op = define(
    "embedding_bwd(Tensor dy, Tensor idx, SymInt V, SymInt P, SymInt start, float dropout_p,"
    " Tensor? seed) -> (Tensor, Tensor)"
)


@impl("embedding_fwd")
def _embedding_fwd(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, start: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """-> h: (B, T, C)."""
    if backend.runs_kernel(wte):
        from fastgpt.kernels.embedding import embedding_fwd

        return embedding_fwd(idx, wte, wpe, start, dropout_p, seed)
    return embedding_ref(idx, wte, wpe, start=start, dropout_p=dropout_p, seed=seed)


@fake("embedding_fwd")
def _(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, start: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return wte.new_empty((*idx.shape, wte.shape[1]))


@impl("embedding_bwd")
def _embedding_bwd(
    dy: Tensor, idx: Tensor, V: int, P: int, start: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> dwte: (V, C), dwpe: (P, C); V or P is 0 where that gradient is not wanted."""
    if backend.runs_kernel(dy):
        from fastgpt.kernels.embedding import embedding_bwd

        return embedding_bwd(dy, idx, V, P, start, dropout_p, seed)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dh = _drop(dy.to(wide), dropout_p, seed)
    dwte, dwpe = (dh.new_zeros(n, dy.shape[-1]) for n in (V, P))
    if V:
        dwte.index_add_(0, idx.flatten(), dh.flatten(0, 1))
    if P:
        dwpe[start : start + idx.shape[1]] = dh.sum(0)
    return dwte.to(dy.dtype), dwpe.to(dy.dtype)


@fake("embedding_bwd")
def _(
    dy: Tensor, idx: Tensor, V: int, P: int, start: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(V, dy.shape[-1]), dy.new_empty(P, dy.shape[-1])


class EmbeddingFunction(torch.autograd.Function):
    """(idx, wte, wpe, ...) -> h. Backward needs the ids and the seed, no table."""

    @staticmethod
    def forward(
        ctx: Any, idx: Tensor, wte: Tensor, wpe: Tensor | None, start: int, dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(idx, seed)
        ctx.rows = wte.shape[0], 0 if wpe is None else wpe.shape[0]
        ctx.start, ctx.dropout_p = start, dropout_p
        return forward_op(  # type: ignore[no-any-return]
            idx, wte, wpe, start, dropout_p, seed
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        idx, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        rows = [n if need else 0 for n, need in zip(ctx.rows, needs, strict=True)]
        dwte: Tensor | None
        dwpe: Tensor | None
        if backend.double_backward():
            # h is linear in the tables, so any will do for its derivative: one zero, expanded.
            zero = dy.new_zeros(())
            wte, wpe = (
                zero.expand(n, dy.shape[-1]).requires_grad_() if n else None for n in ctx.rows
            )
            kwargs = {"start": ctx.start, "dropout_p": ctx.dropout_p, "seed": seed}
            dwte, dwpe = backend.differentiable_grads(
                lambda wte, wpe: embedding_ref(idx, wte, wpe, **kwargs), (wte, wpe), needs, (dy,)
            )
        else:
            dwte, dwpe = backward_op(dy, idx, *rows, ctx.start, ctx.dropout_p, seed)
        return None, dwte if needs[0] else None, dwpe if needs[1] else None, None, None, None


def _check(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, start: int, dropout_p: float, seed: Tensor | None
) -> None:
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embedding: idx must be int64 or int32; got {idx.dtype}")
    if idx.ndim != 2:
        raise ValueError(f"embedding: idx must be (B, T); got {tuple(idx.shape)}")
    for name, table in (("wte", wte), ("wpe", wpe)):
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] == 0:
            raise ValueError(
                f"embedding: {name} must be (rows, C), C at least 1; got {tuple(table.shape)}"
            )
        if not table.dtype.is_floating_point:
            raise TypeError(f"embedding: {name} must have a floating dtype; got {table.dtype}")
        if table.device != idx.device:
            raise ValueError(
                "embedding: all tensors must be on one device;"
                f" got idx {idx.device}, {name} {table.device}"
            )
    check_dropout("embedding", dropout_p, seed)
    if wpe is None:
        if start != 0:
            raise ValueError(f"embedding: start needs wpe; got start {start} alone")
        return
    if wpe.shape[1] != wte.shape[1] or wpe.dtype != wte.dtype:
        raise ValueError(
            "embedding: wte and wpe must have one width and dtype;"
            f" got {wte.shape[1]} of {wte.dtype}, {wpe.shape[1]} of {wpe.dtype}"
        )
    if start < 0 or start + idx.shape[1] > wpe.shape[0]:
        raise ValueError(
            f"embedding: positions must lie in wpe, 0 to {wpe.shape[0] - 1};"
            f" got {start} to {start + idx.shape[1] - 1}"
        )


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor | None = None,
    *,
    start: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Token plus position embedding: h[b, t] = dropout(wte[idx[b, t]] + wpe[start + t]).

    Gradients are dense and written whole. Each of their rows is summed in float32 in one fixed
    order, however often an id occurs.

    Args:
        idx: (B, T), int64 or int32, any strides: ids in [0, V).
        wte: (V, C) in float32, float16 or bfloat16.
        wpe: (P, C) in wte's dtype, or None for tokens alone.
        start: position of the first column of idx.
        dropout_p: probability in [0, 1) of dropping an element of h.
        seed: one int64 on idx's device that fixes the dropout mask (see `dropout_mask`, of shape
            (B T, C)); drawn from torch's generator if None.

    Returns:
        h: (B, T, C) in wte's dtype.

    Raises:
        ValueError: shapes, dtypes of the tables or devices do not fit, a position lies outside
            wpe, or dropout_p outside [0, 1).
        TypeError: idx is not int64 or int32, or a table not floating.
        IndexError: an id lies outside [0, V), in plain PyTorch on the CPU. A kernel takes such an
            id's token for zero and gives it no gradient: to raise it would have to be waited for.
    """
    _check(idx, wte, wpe, start, dropout_p, seed)
    if backend.kernel_chosen("embedding", wte):
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(wte.device)
        out = EmbeddingFunction.apply(*backend.traceable(idx, wte, wpe, start, dropout_p, seed))
        return out  # type: ignore[no-any-return]
    return embedding_ref(idx, wte, wpe, start=start, dropout_p=dropout_p, seed=seed)
