"""Tensor parallelism: the ranks of tp share heads, feed-forward columns and the vocabulary.

Between two norms a block's products go column by column, then row by row, and what a rank computes
in between is its own (Shoeybi et al., Megatron-LM, 2019, https://arxiv.org/abs/1909.08053):

    x --enter--> c_attn: own heads of q, k, v; attention; c_proj: a part of the sum --leave--> y

Outside, the ranks share the positions of the residual stream (Korthikanti et al., 2022,
https://arxiv.org/abs/2205.05198): `enter` gathers them, `leave` sums and scatters. Where the length
does not divide, or config.sequence is False, each rank has the whole stream, and `leave` sums.

The parameters are DTensors, with GPT's names and global shapes. Inside of a module they are the
rank's own plain tensors, so that the ops meet nothing else. c_attn's rows lie in the order of the
ranks, each rank's q, k and v together: `order.py` has what a checkpoint needs of that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastgpt.layers import MLP, Again, Block, Branch, GatedMLP, made_again
from fastgpt.norms import LayerNorm, RMSNorm
from fastgpt.parallel import traffic
from fastgpt.parallel.order import rank_rows


class Tensors:
    """The ranks of tp, for the modules of one model.

    Attributes:
        group: their process group.
        size, rank: how many, and which this is.
        split: whether, in the forward pass at hand, each holds a part of the positions.
    """

    def __init__(self, mesh: DeviceMesh, sequence: bool) -> None:
        self.mesh, self.sequence = mesh, sequence
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.split = False
        self.gather = _Gather(self)

    def begin(self, T: int) -> None:
        """A forward pass of T positions begins."""
        self.split = self.sequence and T % self.size == 0

    def enter(self, x: Tensor) -> Tensor:
        """The stream (B, T / size or T, C) -> (B, T, C), for products of which each rank has its
        columns."""
        return traffic.gather(x, 1, self.group) if self.split else traffic.copied(x, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """(B, T, C), a part of a sum -> the sum, of which each rank has its positions or all."""
        return traffic.scatter(y, 1, self.group) if self.split else traffic.summed(y, self.group)

    def mine(self, T: int) -> slice:
        """The positions of T that this rank has of the stream."""
        n = T // self.size if self.split else T
        return slice(self.rank * n, self.rank * n + n) if self.split else slice(0, n)

    def local(self, p: Tensor, apart: bool = False) -> Tensor:
        """This rank's part of a parameter, as a plain tensor; its gradient is the DTensor's.

        Args:
            p: a DTensor of these ranks.
            apart: whether, of one that all hold, each makes a part of the gradient even where all
                hold all positions.
        """
        assert isinstance(p, DTensor)
        if isinstance(p.placements[0], Replicate) and (self.split or apart):
            return _Shared.apply(p)  # type: ignore[no-any-return]
        return p.to_local()

    def place(self, module: nn.Module, weight: Placement, bias: Placement) -> None:
        """Make a module's weight and bias DTensors, of which each rank keeps its part."""
        for name, placement in (("weight", weight), ("bias", bias)):
            p = getattr(module, name, None)
            if p is not None:
                # All ranks have the same: nothing need be sent.
                made = distribute_tensor(p.detach(), self.mesh, [placement], src_data_rank=None)
                setattr(module, name, nn.Parameter(made, p.requires_grad))

    def again(self, x: Tensor, again: Again | None) -> Again | None:
        """What makes enter(x) in backward, so that only x is kept; x is what `again` makes."""
        if not self.split:
            return again
        if again is None:
            return self.gather, x
        return nn.Sequential(again[0], self.gather), again[1]


class _Gather(nn.Module):
    def __init__(self, ranks: Tensors) -> None:
        super().__init__()
        self._group = ranks.group

    def forward(self, x: Tensor) -> Tensor:
        return traffic.gathered(x, 1, self._group)


class _Shared(torch.autograd.Function):
    """A parameter that all ranks hold and of whose gradient each makes a part."""

    @staticmethod
    def forward(ctx: Any, p: DTensor) -> Tensor:
        ctx.spec = p.device_mesh, p.placements
        return p.to_local()

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> DTensor:  # type: ignore[override]
        mesh, placements = ctx.spec
        made = traffic.total(dp, mesh.get_group())
        return DTensor.from_local(made, mesh, placements, run_check=False)


@contextmanager
def held(
    module: nn.Module, ranks: "Tensors | None", apart: tuple[nn.Module | None, ...] = ()
) -> Iterator[None]:
    """Within, the parameters of a module and its children are this rank's plain tensors.

    Args:
        module: with DTensors of the mesh of ranks for parameters.
        ranks: those of tp; without, nothing happens.
        apart: children that each rank uses on something else even where all hold all positions: the
            norms of its heads.
    """
    shadowed: list[tuple[dict[str, Any], str]] = []
    for owner in module.modules() if ranks is not None else ():
        for name, p in owner._parameters.items():
            if p is not None and ranks is not None:
                own = vars(owner)  # an attribute goes before a parameter of its name
                own[name] = ranks.local(p, owner in apart)
                shadowed.append((own, name))
    try:
        yield
    finally:
        for own, name in shadowed:
            del own[name]


class TensorLayerNorm(LayerNorm):
    """LayerNorm of the positions that are here."""

    ranks: Tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with held(self, self.ranks):
            return super().forward(*args, **kwargs)


class TensorRMSNorm(RMSNorm):
    """RMSNorm of the positions that are here."""

    ranks: Tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with held(self, self.ranks):
            return super().forward(*args, **kwargs)


class TensorMLP(MLP):
    """Own columns of c_fc, the same of c_proj's rows."""

    ranks: Tensors

    def forward(self, x: Tensor, apart: bool = False) -> Tensor | Branch:
        """x: (B, T', C), the stream's -> the same."""
        return _feed_forward(super().forward, self, x, apart)


class TensorGatedMLP(GatedMLP):
    """Own columns of gate_proj and up_proj, the same of down_proj's rows."""

    ranks: Tensors

    def forward(self, x: Tensor, apart: bool = False) -> Tensor | Branch:
        """x: (B, T', C), the stream's -> the same."""
        return _feed_forward(super().forward, self, x, apart)


def _feed_forward(
    forward: Callable[[Tensor, bool], Tensor | Branch], module: Any, x: Tensor, apart: bool
) -> Tensor | Branch:
    ranks: Tensors = module.ranks
    whole = ranks.enter(x)
    with held(module, ranks), made_again(whole, ranks.again(x, None)):
        part = Branch.of(forward(whole, True))
    return ended(ranks.leave(part.x), part.bias, apart)


def ended(y: Tensor, bias: Tensor | None, apart: bool) -> Tensor | Branch:
    """A branch's product and its bias, added or apart."""
    if apart:
        return Branch(y, bias)
    return y if bias is None else y + bias.to(y.dtype)


def share(block: Block, ranks: Tensors) -> None:
    """Leave this rank its part of a block's parameters and heads, and make its norms and
    feed-forward those of this file."""
    attn, mlp = block.attn, block.mlp
    rows = rank_rows(attn.n_head, attn.n_kv_head, attn.c_attn.weight.shape[0], ranks.size)
    with torch.no_grad():
        for p in attn.c_attn.parameters():
            p.copy_(p[rows.to(p.device)])
    attn.n_head, attn.n_kv_head = attn.n_head // ranks.size, attn.n_kv_head // ranks.size
    if isinstance(mlp, GatedMLP):
        columns, ends = [attn.c_attn, mlp.gate_proj, mlp.up_proj], [attn.c_proj, mlp.down_proj]
        become(mlp, TensorGatedMLP).ranks = ranks
    else:
        columns, ends = [attn.c_attn, mlp.c_fc], [attn.c_proj, mlp.c_proj]
        become(mlp, TensorMLP).ranks = ranks
    for linear in columns:
        ranks.place(linear, Shard(0), Shard(0))
    for linear in ends:
        ranks.place(linear, Shard(1), Replicate())
    for norm in (attn.q_norm, attn.k_norm):
        if norm is not None:
            ranks.place(norm, Replicate(), Replicate())
    share_norm(block.ln_1, ranks)
    share_norm(block.ln_2, ranks)


def share_norm(norm: nn.Module, ranks: Tensors) -> None:
    """Make a norm of the stream one of this file's."""
    ranks.place(norm, Replicate(), Replicate())
    if isinstance(norm, RMSNorm):
        become(norm, TensorRMSNorm).ranks = ranks
    else:
        become(norm, TensorLayerNorm).ranks = ranks


Kind = TypeVar("Kind", bound=nn.Module)


def become(module: nn.Module, kind: type[Kind]) -> Kind:
    """Make a module one of a class that its own class is the base of."""
    module.__class__ = kind
    return cast(Kind, module)
