"""Cross-entropy of a linear layer's output, of which only a chunk of rows exists at a time.

    z = x w^T + bias        loss = cross_entropy(z, target)
    dx = dz w        dw = dz^T x        dbias = sum over rows of dz

(Wijmans et al., Cut your losses in large-vocabulary language models, 2024,
https://arxiv.org/abs/2411.09009, say why the logits are what fills the memory.) Per chunk of rows
the vendor's product makes z in a buffer, the rows of cross_entropy.py turn it into losses and dz in
place, and two more products of the vendor's take dz to dx and dw: the gradients for an incoming
gradient of 1 are ready with the loss, and no logit is made twice. Where every row has an incoming
gradient of its own, backward makes z again, chunk by chunk, and costs a fourth product.

Rows of the buffer are padded to a multiple of 64 columns, so that they begin on whole pieces of 16
bytes: 50257 columns lie in rows of 50304. A product with an odd number of columns is several times
as slow (on an H100 cuBLAS falls back to a kernel of two chip generations before, without wide
accesses), so the products take the padding along: weight is copied once a call into a matrix with
rows of zeros below, and the logits of those are zeros that nothing reads. dw is added over chunks
in float32.
"""

import functools

import torch
from torch import Tensor

from fastgpt.kernels.cross_entropy import (
    How,
    cross_entropy_both,
    cross_entropy_bwd,
    cross_entropy_fwd,
)


@functools.cache
def _makes_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the vendor's product of 16-bit matrices gives a float32 one: asked once."""
    a, acc = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(acc, a, a, torch.float32, out=acc)
    except (NotImplementedError, TypeError, RuntimeError):
        return False
    return True


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a b, or out += a b, out in float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif _makes_wide(a.device, a.dtype):
        torch.addmm(out, a, b, torch.float32, beta=int(add), out=out)
    elif add:  # a chunk's product is rounded to 16 bits; the sum stays float32
        out += a @ b
    else:
        out.copy_(a @ b)


def _padded(t: Tensor, rows: int) -> Tensor:
    """t with rows of zeros below, up to so many."""
    made = torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=t.device)
    made[: len(t)] = t
    made[len(t) :] = 0.0
    return made


class _Chunks:
    """The logits of x (M, C) against weight (V, C), chunk rows at a time, in one buffer.

    Attributes:
        weight, bias: with rows of zeros below, where V is no multiple of 8.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> None:
        self.x, self.weight, self.bias, self.chunk = x, weight, bias, chunk
        self.V = len(weight)
        columns = (self.V + 63) // 64 * 64
        if self.V % 8 != 0:
            self.weight = _padded(weight, columns)
            self.bias = None if bias is None else _padded(bias, columns)
        self.buffer = torch.empty((min(len(x), chunk), columns), dtype=x.dtype, device=x.device)

    def rows(self) -> list[slice]:
        M = len(self.x)
        return [slice(start, min(start + self.chunk, M)) for start in range(0, M, self.chunk)]

    def logits(self, rows: slice) -> Tensor:
        """(rows, V or more), a view of the buffer."""
        z = self.buffer[: rows.stop - rows.start, : len(self.weight)]
        if self.bias is None:
            return torch.mm(self.x[rows], self.weight.T, out=z)
        return torch.addmm(self.bias, self.x[rows], self.weight.T, out=z)


class _Gradients:
    """dx (M, C), dw (V, C) and db (V,) in float32, each empty where not needed."""

    def __init__(self, chunks: _Chunks, needs: list[bool]) -> None:
        x, weight = chunks.x, chunks.weight
        self.chunks, self.needs = chunks, needs
        self.dx = torch.empty(x.shape if needs[0] else 0, dtype=torch.float32, device=x.device)
        self.dw = torch.empty(weight.shape if needs[1] else 0, dtype=torch.float32, device=x.device)
        self.db = torch.zeros(chunks.V if needs[2] else 0, dtype=torch.float32, device=x.device)
        if len(x) == 0:  # the first chunk writes dw, the others add to it
            self.dw.zero_()

    def add(self, dz: Tensor, rows: slice) -> None:
        if self.needs[0]:
            _product(self.dx[rows], dz, self.chunks.weight, add=False)
        if self.needs[1]:
            _product(self.dw, dz.T, self.chunks.x[rows], add=rows.start > 0)
        if self.needs[2]:
            self.db += dz[:, : self.chunks.V].sum(0, dtype=torch.float32)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dx, self.dw[: self.chunks.V], self.db


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: How, chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x: (M, C), target: (M,) -> losses (M,), and the gradients of their sum as needed; without
    any, the statistics (2, M) that backward needs to make them."""
    chunks = _Chunks(x, weight, bias, chunk)
    made = _Gradients(chunks, needs)
    target = target.contiguous()
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    stats = torch.empty((2, 0 if any(needs) else len(x)), dtype=torch.float32, device=x.device)
    for rows in chunks.rows():
        z = chunks.logits(rows)
        if any(needs):
            cross_entropy_both(z[:, : chunks.V], target[rows], how, losses[rows])
            made.add(z, rows)
        else:
            losses[rows], stats[:, rows] = cross_entropy_fwd(z[:, : chunks.V], target[rows], how)
    return losses, stats, *made.all()


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, stats: Tensor,
    how: How, chunk: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dloss: (M,) float32, stats: (2, M) -> dx, dw, db."""
    chunks = _Chunks(x, weight, bias, chunk)
    made = _Gradients(chunks, needs)
    for rows in chunks.rows():
        z = chunks.logits(rows)
        own = z[:, : chunks.V]
        cross_entropy_bwd(dloss[rows], own, target[rows], stats[:, rows].contiguous(), how, own)
        made.add(z, rows)
    return made.all()
