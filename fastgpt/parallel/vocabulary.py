"""A table of the vocabulary whose rows the ranks share: embedding, logits, cross-entropy.

    loss_i = lse_i - z_i[t_i],   z = x w^T,   lse_i = log sum over all ranks' columns exp(z_i)
    dz = softmax(z) - [t],       dx = sum over ranks dz w,   dw = dz^T x

A rank makes the logits of its own columns alone, a chunk of rows at a time. Of a row three numbers
travel: the maximum, the sum of exponentials and the target's logit (Shoeybi et al., Megatron-LM,
2019, https://arxiv.org/abs/1909.08053, section 3).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank, get_world_size

from fastgpt import ops
from fastgpt.ops import backend
from fastgpt.ops.cross_entropy import backward_op, forward_op
from fastgpt.ops.linear_cross_entropy import GPU_BUDGET, chunk_rows
from fastgpt.parallel.traffic import gathered, total

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
CPU_BUDGET = 2**26  # bytes of logits at a time; near the caches


def first_row(rows: int, group: ProcessGroup) -> int:
    """Where this rank's part of so many rows begins: that of DTensor's Shard(0)."""
    return min(rows, -(-rows // get_world_size(group)) * get_rank(group))


def embedding(idx: Tensor, table: Tensor, first: int) -> Tensor:
    """The rows that are here, zeros for the others: (B, T), (V', C) -> (B, T, C)."""
    inside = (idx >= first) & (idx < first + len(table))
    h = ops.embedding(torch.where(inside, idx - first, 0), table)
    return h * inside[..., None]


class _Logits(torch.autograd.Function):
    """Columns of all ranks, side by side; the gradient of a rank is that of its own columns."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, columns: int, group: ProcessGroup) -> Tensor:
        ctx.mine = slice(first := first_row(columns, group), first + z.shape[-1])
        most = -(-columns // get_world_size(group))
        padded = F.pad(z, (0, most - z.shape[-1])).movedim(-1, 0).contiguous()
        whole = gathered(padded, 0, group)
        return whole[:columns].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy[..., ctx.mine].contiguous(), None, None


def logits(x: Tensor, table: Tensor, columns: int, group: ProcessGroup) -> Tensor:
    """x table^T with all columns, on every rank: (..., C), (V', C) -> (..., V)."""
    return _Logits.apply(F.linear(x, table), columns, group)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    """(x (M, C), weight (V', C), target (M,), ...) -> the sum of losses.

    Gradients are made with the loss, as in ops.linear_cross_entropy; dx is this rank's share.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, first: int, group: ProcessGroup,
        ignore_index: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = x.dtype, weight.dtype
        with backend.without_autocast(x):
            made = _loss(
                x.to(dtype), weight.to(dtype), target, first, group, ignore_index,
                (ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
            )  # fmt: skip
        ctx.save_for_backward(*made[1:])
        return made[0]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [
            (g * dloss).to(dtype) if need else None
            for g, dtype, need in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return *grads, *[None] * 5


def _loss(
    x: Tensor, weight: Tensor, target: Tensor, first: int, group: ProcessGroup, ignore_index: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the sum of losses, dx, dw, the last two at least in float32."""
    (M, _), V = x.shape, len(weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    how = (ignore_index, 0.0, 0.0, 0.0)
    gpu = backend.runs_kernel(x)
    # A product with an odd number of columns is several times as slow on a GPU.
    padded = F.pad(weight, (0, 0, 0, -V % 64)) if V % 8 and gpu else weight
    dx = x.new_empty(x.shape if needs[0] else 0, dtype=wide)
    dw = x.new_zeros(padded.shape if needs[1] else 0, dtype=wide)
    losses = x.new_zeros((), dtype=wide)
    counts = target != ignore_index
    here = counts & (target >= first) & (target < first + V)
    # An op that is given no column to take a loss from would refuse or say NaN: its loss by column
    # 0 is left aside, and the target's logit is read here.
    column = torch.where(here, target - first, 0)
    own = torch.where(here, column, torch.where(counts, V, ignore_index))
    one = x.new_ones(M, dtype=wide)
    chunk = chunk_rows(M, V, x.element_size(), GPU_BUDGET if gpu else CPU_BUDGET)
    for start in range(0, M, chunk):
        rows = slice(start, min(start + chunk, M))
        z = F.linear(x[rows], padded)
        mine = z[:, :V]
        k, s = forward_op(mine, column[rows], *how)[1].unbind()
        at = mine.gather(1, column[rows, None])[:, 0].to(wide) * here[rows]
        top = total(k, group, "max")
        s, at = total(torch.stack([s * torch.exp2(k - top), at]), group).unbind()
        loss = (torch.log2(s) - (at * LOG2E - top)) * LN2
        losses += torch.where(counts[rows], loss, 0.0).sum()
        if not any(needs):
            continue
        stats = torch.stack([top, s])
        dz = backward_op(one[rows], mine, own[rows], stats, *how)
        if padded is not weight:
            dz = F.pad(dz, (0, len(padded) - V))
        if needs[0]:
            dx[rows] = dz @ padded
        if needs[1] and dz.dtype == wide:
            dw.addmm_(dz.T, x[rows])
        elif needs[1]:
            dw += dz.T @ x[rows]
    return losses, dx, dw[:V]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, first: int, group: ProcessGroup,
    ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """The sum of the losses of `ops.linear_cross_entropy`, with the rows of weight on many ranks.

    Args:
        x: (..., C), the same on all ranks of the group; its gradient is this rank's share.
        weight: (V', C), rows first .. first + V' - 1 of all V.
        target: (...) int64, in [0, V) or ignore_index.
        group: the ranks that have the other rows.

    Returns:
        A float32 (float64) scalar, the same on all ranks.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype in backend.KERNEL_DTYPES:
        dtype = torch.get_autocast_dtype(x.device.type)
    loss: Tensor = _Loss.apply(
        x.reshape(-1, x.shape[-1]), weight, target.reshape(-1), first, group, ignore_index, dtype
    )
    return loss
