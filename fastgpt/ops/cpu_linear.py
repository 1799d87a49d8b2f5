"""A linear layer of 16 bits on a CPU, many rows in blocks.

oneDNN multiplies 1024 rows by a matrix with at least as many rows as columns up to twice as slowly
as two times 512 rows: the feed-forward's second product, and the gradient through its first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import backend

ROWS = 512
PLAIN = (Tensor, torch.nn.Parameter, type(None))
HALF = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear, with the same values and gradients to within rounding."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows <= ROWS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if backend.transformed() or any(type(t) not in PLAIN for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    x16, w16 = backend.autocast(x, weight)
    (b16,) = backend.autocast(bias)
    if any(t is not None and t.dtype not in HALF for t in (x16, w16, b16)):
        return F.linear(x, weight, bias)
    y = _Linear.apply(x16.reshape(rows, -1), w16, b16)
    return y.view(*x.shape[:-1], len(weight))  # type: ignore[no-any-return]


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, for a (M, K), b (K, N)."""
    if len(a) <= ROWS or a.shape[1] < b.shape[1]:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty(len(a), b.shape[1])
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        if bias is None:
            torch.mm(a[rows], b, out=out[rows])
        else:
            torch.addmm(bias, a[rows], b, out=out[rows])
    return out


class _Linear(torch.autograd.Function):
    """(x (M, K), weight (N, K), bias (N,)) -> (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with backend.without_autocast(dy):
            if torch.is_grad_enabled():  # a gradient of this gradient may be asked for
                need_b = ctx.needs_input_grad[2]
                return dy @ weight, dy.T @ x, dy.sum(0) if need_b else None
            need_x, need_w, need_b = ctx.needs_input_grad
            dx = _product(dy, weight) if need_x else None
            return dx, dy.T @ x if need_w else None, dy.sum(0) if need_b else None
