"""Collectives that autograd can follow, in pairs: each one's backward is the other.

    gather    parts of a dimension -> the whole            scatter    sums -> a part of their sum
    copied    the same on all ranks, used by each in its   summed     parts of a sum -> the sum
              own way

The collectives are those of torch.distributed._functional_collectives. What a rank computes between
`gather` (or `copied`) and `scatter` (or `summed`) is its own share of a product.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.12 and older have them under other names.
_all_gather = getattr(fc, "all_gather_single", None) or fc.all_gather_tensor
_reduce_scatter = getattr(fc, "reduce_scatter_single", None) or fc.reduce_scatter_tensor


def gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of all ranks, one after the other, without autograd."""
    made: Tensor = fc.wait_tensor(_all_gather(x.contiguous(), dim, group))
    return made


def scattered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of the sum over ranks, without autograd."""
    made: Tensor = fc.wait_tensor(_reduce_scatter(x.contiguous(), "sum", dim, group))
    return made


def total(x: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """The sum (or max) over ranks, without autograd."""
    made: Tensor = fc.wait_tensor(fc.all_reduce(x.contiguous(), op, group))
    return made


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.how = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return scattered(dy, *ctx.how), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.how = dim, group
        return scattered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gathered(dy, *ctx.how), None, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return total(dy, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, scale: float) -> Tensor:
        ctx.scale = scale
        return total(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy if ctx.scale == 1.0 else dy * ctx.scale, None, None


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of all ranks, one after the other; backward sums the ranks' gradients."""
    return _Gather.apply(x, dim, group)  # type: ignore[no-any-return]


def scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of the sum over ranks."""
    return _Scatter.apply(x, dim, group)  # type: ignore[no-any-return]


def copied(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, whose gradient is the sum of the ranks'."""
    return _Copied.apply(x, group)  # type: ignore[no-any-return]


def summed(x: Tensor, group: ProcessGroup, scale: float = 1.0) -> Tensor:
    """The sum over ranks; its gradient goes back to each rank as it is, times scale."""
    return _Summed.apply(x, group, scale)  # type: ignore[no-any-return]
