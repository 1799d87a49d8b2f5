# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Small kernels, each with one fault, for the lab's tests; the line with the fault says FAULT."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def dropped_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # FAULT dropped_mask
    tl.store(y_ptr + offs, x, mask=offs < n)


@triton.jit
def dropped_store_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x)  # FAULT dropped_store_mask


@triton.jit
def add_to_one_cell(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.load(y_ptr) + tl.sum(x, 0))  # FAULT add_to_one_cell


@triton.jit
def lanes_disagree(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs))  # FAULT lanes_disagree


@triton.jit
def forgets_the_tail(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n // BLOCK * BLOCK
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)  # FAULT forgets_the_tail


@triton.jit
def sums_masked_lanes(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)  # FAULT sums_masked_lanes
    tl.store(y_ptr, tl.sum(tl.exp(x), 0))


@triton.jit
def adds_to_its_output(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + offs)  # FAULT adds_to_its_output
    tl.store(y_ptr + offs, y + tl.load(x_ptr + offs))


@triton.jit
def float_atomics(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(y_ptr, tl.sum(x, 0))


@triton.jit
def divides(y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, offs // n)  # FAULT divides


@triton.jit
def reads_much(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every program copies all of x: whether they race shows only in every single access."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def gelu_reference(x_ptr: Tensor) -> dict[str, Tensor]:
    """Gives what the kernel does not have."""
    return {"z_ptr": x_ptr}


def half_reference(x_ptr: Tensor) -> Tensor:
    """Gives half of what the kernel writes."""
    return x_ptr[:500]
