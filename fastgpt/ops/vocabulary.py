"""A head's losses and gradients by plain PyTorch, a part of the vocabulary at a time.

Of logits z = x weight^T two sweeps are made, in tiles that stay in the caches: the first finds
lse = log sum exp z, the second makes z again and of it dz = exp(z - lse) - onehot, then
dx += dz weight and dweight = dz^T x, each row of which is written once. A fourth product to the
three costs less than logits, or sums of dweight in float32, that go to memory and back. Tiles are
z^T, so that dweight's products read their 16 bits row by row.
"""

import torch
from torch import Tensor

from fastgpt.ops.cross_entropy import How

ROWS, COLUMNS = 1024, 3072  # of a tile; 30 MiB with all its copies
LOG2E = 1.4426950408889634


class _Tiles:
    """z^T of some rows x (M, C) and all the vocabulary, tile by tile, in the same memory."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> None:
        self.x, self.weight, self.bias, self.softcap = x, weight, bias, softcap
        self.wide = torch.promote_types(x.dtype, torch.float32)
        size = min(COLUMNS, len(weight))
        self.starts = range(0, len(weight), size)
        self._columns = x.T.contiguous()  # (C, M)
        self._z = x.new_empty((size, len(x)))
        self._f = x.new_empty((size, len(x)), dtype=self.wide)
        self._w = x.new_empty((size, x.shape[1]) if weight.dtype != x.dtype else 0)
        self._holds = -1  # which tile's logits _z holds

    def __call__(self, start: int) -> tuple[Tensor, Tensor]:
        """-> weight's rows (n, C) in x's dtype; z^T (n, M), capped, float32, to be overwritten."""
        w = self.weight[start : start + len(self._z)]
        if w.dtype != self.x.dtype:
            w = self._w[: len(w)].copy_(w)
        z, f = self._z[: len(w)], self._f[: len(w)]
        if self._holds != start:
            if self.bias is None:
                torch.mm(w, self._columns, out=z)
            else:
                bias = self.bias[start : start + len(w), None].to(z.dtype)
                torch.addmm(bias, w, self._columns, out=z)
            self._holds = start
        f.copy_(z)
        if self.softcap != 0.0:
            f.div_(self.softcap).tanh_().mul_(self.softcap)
        return w, f

    def narrow(self, f: Tensor) -> Tensor:
        """f in x's dtype, where its logits were."""
        self._holds = -1
        return f if f.dtype == self.x.dtype else self._z[: len(f)].copy_(f)

    def stats(self, target: Tensor, means: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> lse, the target's logit and, if means, the mean of all logits, (M,) each."""
        lse = self.x.new_full((len(self.x),), float("-inf"), dtype=self.wide)
        hit, mean = torch.zeros_like(lse), torch.zeros_like(lse)
        lowest = torch.finfo(self.wide).min
        for start in self.starts:
            _, f = self(start)
            inside, at = _within(target, start, len(f))
            hit = torch.where(inside, f.gather(0, at[None])[0], hit)
            if means:
                mean += f.sum(0) / len(self.weight)
            top = f.amax(0).clamp_(min=lowest)  # a tile may be -inf throughout
            lse = torch.logaddexp(lse, f.sub_(top).exp_().sum(0).log_().add_(top))
        return lse, hit, mean


def _within(target: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and where in it; 0 for the others."""
    at = target - start
    inside = (at >= 0) & (at < n)
    return inside, torch.where(inside, at, 0)


@torch.no_grad()
def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: How, chunk: int | None,
    needs: list[bool], dloss: Tensor | None = None, stats: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> losses (M,), stats (2, M), dx (M, C), dweight (V, C), dbias (V,).

    Gradients are of the sum of losses times scale, or given dloss (M,) and stats of the losses
    weighted by dloss; those that needs does not name are empty, and stats where any is made. x has
    the products' dtype, chunk is the most of its rows at a time; results are at least float32.
    """
    ignore_index, smoothing, z_loss, softcap = how
    wide = torch.promote_types(x.dtype, torch.float32)
    target = target.long()
    keep = target != ignore_index
    dx = x.new_empty(x.shape if needs[0] else 0, dtype=wide)
    dw = x.new_empty(weight.shape if needs[1] else 0, dtype=wide)
    db = x.new_empty(len(weight) if needs[2] else 0, dtype=wide)
    if len(x) == 0:
        dw.zero_(), db.zero_()
    losses, kept = x.new_empty(len(x), dtype=wide), x.new_empty((2, len(x)), dtype=wide)
    chunk = chunk or ROWS
    for first in range(0, len(x), chunk):
        rows = slice(first, min(first + chunk, len(x)))
        tiles = _Tiles(x[rows], weight, bias, softcap)
        here, labels = keep[rows], target[rows]
        if stats is None:
            lse, hit, mean = tiles.stats(labels, smoothing != 0.0)
            loss = lse - (1.0 - smoothing) * hit - smoothing * mean
            if z_loss != 0.0:
                loss = loss + z_loss * lse.square()
            losses[rows] = torch.where(here, loss, 0.0)
            kept[0, rows], kept[1, rows] = lse * LOG2E, 1.0
        else:
            lse = (stats[0, rows] + stats[1, rows].log2()) / LOG2E
        if not any(needs):
            continue
        share = here.to(wide) if dloss is None else torch.where(here, dloss[rows], 0.0)
        factor = share * (1.0 + 2.0 * z_loss * lse)
        lse = torch.where(here, lse, float("inf"))  # exp(z - lse) = 0
        dx_rows = tiles.x.new_zeros(tiles.x.shape if needs[0] else 0, dtype=wide)
        for start in tiles.starts:
            w, f = tiles(start)
            bend = 1.0 - (f / softcap).square() if softcap != 0.0 else None
            f.sub_(lse).exp_()
            if dloss is not None or z_loss != 0.0:
                f.mul_(factor)
            if smoothing != 0.0:
                f.sub_(share * (smoothing / len(weight)))
            inside, at = _within(labels, start, len(w))
            f.scatter_add_(0, at[None], torch.where(inside, share * (smoothing - 1.0), 0.0)[None])
            if bend is not None:
                f.mul_(bend)
            tile = slice(start, start + len(w))
            if needs[2]:
                _put(db[tile], f.sum(1), scale, first)
            d = tiles.narrow(f)
            if needs[0]:
                dx_rows += d.T @ w
            if needs[1]:
                _put(dw[tile], d @ tiles.x, scale, first)
        if needs[0]:
            dx[rows] = dx_rows if scale is None else dx_rows.mul_(scale)
    return losses, kept[:, : 0 if any(needs) else None].clone(), dx, dw, db


def _put(out: Tensor, value: Tensor, scale: Tensor | None, first: int) -> None:
    """What the rows from first on add to a sum over rows."""
    if first == 0:
        out.copy_(value)
        if scale is not None:
            out.mul_(scale)
    else:
        out.add_(value if scale is None else value.to(out.dtype) * scale)
