# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Small kernels that are right but cost too much, or do not compile, for the lab's tests."""

import os
from multiprocessing import parent_process

import triton
import triton.language as tl


@triton.jit
def spilling(x_ptr, y_ptr, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile is used twice, so that all of it must be kept: too much for one warp."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + rows * COLS + cols).to(tl.float32)
    for i in range(N):
        x = x * tl.sum(x, 1)[:, None] + i
    tl.store(y_ptr + rows * COLS + cols, x)


@triton.jit
def strided(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """Elements lie a stride apart: every access is of one."""
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * stride
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def inner(x):
    return x + undefined  # type: ignore[name-defined] # noqa: F821 FAULT inner


@triton.jit
def fails(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, inner(tl.load(x_ptr + offs)))


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((128, 1), (256, 2), (512, 4))],
    key=["n"],
)
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned(x_ptr, y_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs >= 0 if EVEN else offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


if parent_process() is not None and os.environ.get("LAB_TEST_CRASH"):
    os.abort()  # as a compiler does that fails an assertion of its own
