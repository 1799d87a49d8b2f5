"""Context parallelism: the ranks of cp share the positions of each row.

A row is cut into two chunks for each rank, and rank r has chunks r and 2 n - 1 - r: so each has as
many pairs of query and earlier key as the others. Attention gathers the keys and values of all
positions, as Llama 3 does (https://arxiv.org/abs/2407.21783, section 3.3.2), and is then exact: a
chunk's queries see the keys up to its end, which is what a causal `ops.attention` of fewer queries
than keys means. Backward gathers once more rather than keep them, and sums the gradients of keys
and values onto the ranks that they belong to.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgpt.ops import backend
from fastgpt.ops.attention import backward_op, bounds_of, forward_op
from fastgpt.ops.attention_reference import Extras
from fastgpt.ops.dropout import draw_seed
from fastgpt.parallel import traffic


class Context:
    """The ranks of cp, for the modules of one model.

    Attributes:
        group: their process group.
        size, rank: how many, and which this is.
        split: whether, in the forward pass at hand, each holds a part of the positions.
        ids: (B, T) the documents of that pass's positions, or None.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.split = False
        self.ids: Tensor | None = None

    def begin(self, T: int, cached: bool) -> None:
        """A forward pass of T positions begins."""
        self.split = not cached and T % (2 * self.size) == 0

    def mine(self, x: Tensor, dim: int = 1) -> Tensor:
        """Of a tensor with all positions, those that are here."""
        if not self.split:
            return x
        chunks = x.chunk(2 * self.size, dim)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim)

    def whole(self, x: Tensor) -> Tensor:
        """(B, T / size, ...), the parts of all ranks in order: (B, T, ...); no autograd."""
        both = torch.stack(x.chunk(2, 1))  # (2, B, c, ...)
        chunks = traffic.gathered(both, 0, self.group).unbind()
        return torch.cat([*chunks[::2], *chunks[::-2]], 1)

    def summed(self, dx: Tensor) -> Tensor:
        """(B, T, ...) of each rank -> the sum of all ranks', of the positions that are here."""
        chunks = dx.chunk(2 * self.size, 1)
        pairs = [(chunks[r], chunks[-1 - r]) for r in range(self.size)]
        both = torch.stack([chunk for pair in pairs for chunk in pair])  # (2 n, B, c, ...)
        return torch.cat(traffic.scattered(both, 0, self.group).unbind(), 1)

    def all(self, h: Tensor) -> Tensor:
        """(B, T / size, ...), the parts of all ranks in order, for all to do the same with."""
        return _All.apply(h, self)  # type: ignore[no-any-return]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Causal attention of the whole rows; q (B, T', H, D), k and v (B, T', Hkv, D)."""
        seed = draw_seed(q.device) if dropout_p > 0.0 else None
        q, k, v = backend.autocast(q, k, v)
        return _Attention.apply(q, k, v, self, self.ids, dropout_p, seed)  # type: ignore[no-any-return]


class _All(torch.autograd.Function):
    """Gradients are a mean over ranks in the end, and of each position one rank gives one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, ranks: Context) -> Tensor:
        ctx.ranks = ranks
        return ranks.whole(h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ranks: Context = ctx.ranks
        chunks = dy.chunk(2 * ranks.size, 1)
        return torch.cat([chunks[ranks.rank], chunks[-1 - ranks.rank]], 1) * ranks.size, None


class _Attention(torch.autograd.Function):
    """(q, k, v, ...) -> o, of the positions that are here; autograd keeps nothing of the others."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranks: Context, ids: Tensor | None,
        dropout_p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        with backend.without_autocast(q):
            keys, values = ranks.whole(torch.stack([k, v], 2)).unbind(2)  # (B, T, Hkv, D)
            made = [
                forward_op(
                    part, keys[:, :end], values[:, :end], *_how(q, dropout_p), seed_of, *x
                )
                for part, end, seed_of, x in _chunks(q, ranks, ids, seed)
            ]  # fmt: skip
            o, lse = torch.cat([o for o, _ in made], 1), torch.cat([lse for _, lse in made], 2)
        ctx.save_for_backward(q, k, v, o, lse, ids, seed)
        ctx.ranks, ctx.dropout_p = ranks, dropout_p
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, ids, seed = ctx.saved_tensors
        ranks: Context = ctx.ranks
        with backend.without_autocast(q):
            keys, values = ranks.whole(torch.stack([k, v], 2)).unbind(2)
            wide = torch.promote_types(k.dtype, torch.float32)
            dkv = k.new_zeros((*keys.shape[:2], 2, *keys.shape[2:]), dtype=wide)
            dq = []
            for n, (part, end, seed_of, x) in enumerate(_chunks(q, ranks, ids, seed)):
                rows = slice(n * part.shape[1], (n + 1) * part.shape[1])
                made = backward_op(
                    do[:, rows], None, part, keys[:, :end], values[:, :end], o[:, rows],
                    lse[..., rows].contiguous(), *_how(q, ctx.dropout_p), seed_of, *x, False, False,
                )  # fmt: skip
                dq.append(made[0])
                dkv[:, :end, 0] += made[1]
                dkv[:, :end, 1] += made[2]
            dk, dv = ranks.summed(dkv).to(k.dtype).unbind(2)
        return torch.cat(dq, 1), dk, dv, None, None, None, None


def _how(q: Tensor, dropout_p: float) -> tuple[Any, ...]:
    return q.shape[-1] ** -0.5, *bounds_of(True, None), dropout_p


def _chunks(
    q: Tensor, ranks: Context, ids: Tensor | None, seed: Tensor | None
) -> list[tuple[Tensor, int, Tensor | None, Extras]]:
    """This rank's two chunks of queries, where the keys that each may see end, and their masks."""
    first, last = q.chunk(2, 1)
    c, made = first.shape[1], []
    ends = (ranks.rank + 1) * c, (2 * ranks.size - ranks.rank) * c
    for n, (part, end) in enumerate(zip((first, last), ends, strict=True)):
        x = Extras(document_ids=None if ids is None else ids[:, :end].contiguous())
        made.append((part, end, None if seed is None else seed + n, x))
    return made
