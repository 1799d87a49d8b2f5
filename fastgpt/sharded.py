"""Tensors of which a rank holds a part: the part, and norms over all ranks.

torch.distributed.tensor is imported only where it has been already: a tensor of it can be met
nowhere else.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Any) -> "TypeGuard[DTensor]":
    """Whether t is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of t that lies here, not a copy; t itself if it is no DTensor. No autograd."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        part: Tensor = t.to_local()
    return part


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of all tensors, the same on every rank: a float32 scalar.

    Each element counts once, however many ranks hold it. Ranks that hold parts of one tensor must
    all call this.
    """
    by_ranks: dict[Any, tuple[list[Any], list[Tensor]]] = {}
    for t in tensors:
        groups = _sharing(t) if is_sharded(t) else []
        names = tuple(group.group_name for group in groups)
        by_ranks.setdefault(names, (groups, []))[1].append(local(t))
    squares = []
    for groups, parts in by_ranks.values():
        square = _norm(parts).square()
        for group in groups:
            torch.distributed.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _norm(parts: Iterable[Tensor]) -> Tensor:
    norms = torch._foreach_norm([g if g.dtype.itemsize > 2 else g.float() for g in parts])
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
    return total


def _sharing(t: "DTensor") -> list[Any]:
    """The process groups over which t's elements are spread."""
    from torch.distributed.tensor import Replicate

    if any(placement.is_partial() for placement in t.placements):
        raise ValueError(f"norm: a tensor must not be a sum yet to be made; got {t.placements}")
    return [
        t.device_mesh.get_group(dim)
        for dim, placement in enumerate(t.placements)
        if not isinstance(placement, Replicate) and t.device_mesh.size(dim) > 1
    ]
