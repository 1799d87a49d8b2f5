"""The rows of c_attn: in GPT's order, and in the order in which the ranks of tp own them.

GPT has the heads of q, then those of k, then those of v. A rank of tp has some of each, and no
placement of DTensor's says so where there are fewer heads of k and v. So the rows of the shared
parameter (and of its gradient and moments) lie rank by rank, each rank's q, k and v together, and a
checkpoint, which is read by any number of ranks, has them in GPT's order.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastgpt.config import GPTConfig


def rank_rows(n_head: int, n_kv_head: int, rows: int, ranks: int) -> Tensor:
    """(rows,) int64: of the row at a place in the ranks' order, its place in GPT's."""
    at = torch.arange(rows).view(n_head + 2 * n_kv_head, -1)  # (heads, D)
    q, k, v = at.split([n_head, n_kv_head, n_kv_head])
    parts = [t.chunk(ranks) for t in (q, k, v)]
    return torch.cat([torch.cat([t[rank] for t in parts]) for rank in range(ranks)]).flatten()


def _tp(t: Tensor, name: str) -> int:
    """How many ranks of tp share the rows of the tensor, if it is one that they have reordered."""
    if not isinstance(t, DTensor) or "attn.c_attn." not in name:
        return 1
    names = t.device_mesh.mesh_dim_names or ()
    return t.device_mesh.size(names.index("tp")) if "tp" in names else 1


def saved(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Tensors as a checkpoint has them: those of c_attn with GPT's order of rows.

    Args:
        tensors: DTensors and plain ones, under names that hold the parameter's, as an optimizer's
            moments under "exp_avg.h.0.attn.c_attn.weight".
        config: the model's.

    Returns:
        The same tensors; of c_attn, where tp shares it, new ones, in blocks of rows. All ranks must
        call this together.
    """
    made = {}
    for name, t in tensors.items():
        if (ranks := _tp(t, name)) > 1:
            assert isinstance(t, DTensor)
            back = rank_rows(config.n_head, config.kv_heads, t.shape[0], ranks).argsort()
            rows = gathered(t)
            t = _spread(rows[back.to(rows.device)], t.device_mesh, _blocks(t.device_mesh))
        made[name] = t
    return made


def placed(source: Tensor, like: Tensor, name: str, config: GPTConfig) -> Tensor:
    """What a checkpoint has of a tensor, laid out as another is: the way back from `saved`.

    Args:
        source: whole on all ranks, or a DTensor as `saved` made it.
        like: a tensor of the name.
        name, config: as there.
    """
    if not isinstance(like, DTensor):
        return source
    ranks = _tp(like, name)
    if isinstance(source, DTensor):
        if ranks == 1 and source.placements == like.placements:
            return source
        source = gathered(source)
    if ranks > 1:
        rows = rank_rows(config.n_head, config.kv_heads, source.shape[0], ranks)
        source = source[rows.to(source.device)]
    return _spread(source, like.device_mesh, like.placements)


def restore(stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: GPTConfig) -> None:
    """Fill tensors in place from what a checkpoint has of them, under the same names."""
    with torch.no_grad():
        for name, t in tensors.items():
            if stored[name] is not t:
                t.copy_(placed(stored[name], t, name, config))


def gathered(t: Tensor) -> Tensor:
    """All of a tensor, on every rank.

    Of a DTensor one dimension of the mesh after the other: first that of fsdp, whose parts are
    parts of those of tp.
    """
    t = t.detach()
    if not isinstance(t, DTensor):
        return t
    placements: list[Placement] = list(t.placements)
    for dim in range(t.device_mesh.ndim):
        placements[dim] = Replicate()
        t = t.redistribute(placements=placements)
    return t.to_local()


def _spread(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Each rank keeps its part of what all have."""
    return distribute_tensor(t, mesh, placements, src_data_rank=None)


def _blocks(mesh: DeviceMesh) -> list[Placement]:
    """Blocks of rows, over the ranks of fsdp, or of tp where there are none."""
    names = mesh.mesh_dim_names or ()
    by = "shard" if "shard" in names else "tp"
    return [Shard(0) if name == by else Replicate() for name in names]
