"""Sum the rows of a few float32 matrices of partial sums: the last step of weight gradients.

One program owns BLOCK_N columns and adds the rows in order, so the same input gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.tiles import cdiv, interpreting, on_device


@triton.jit(do_not_specialize=["P"])
def _column_sum_kernel(
    part_ptr, out0_ptr, out1_ptr, out2_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    which = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    part_ptr += which.to(tl.int64) * P * N
    acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for p in tl.range(0, P, BLOCK_P):
        rows = p + offs_p
        mask = (rows[:, None] < P) & (offs_n[None, :] < N)
        ptrs = part_ptr + rows[:, None].to(tl.int64) * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if which == 0:
        tl.store(out0_ptr + offs_n, total.to(out0_ptr.dtype.element_ty), mask=offs_n < N)
    elif which == 1:
        tl.store(out1_ptr + offs_n, total.to(out1_ptr.dtype.element_ty), mask=offs_n < N)
    else:
        tl.store(out2_ptr + offs_n, total.to(out2_ptr.dtype.element_ty), mask=offs_n < N)


def column_sum(part: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """part: (1 to 3, P, N) float32, contiguous -> for each of the first the (N,) sums, in its
    dtype."""
    count, P, N = part.shape
    out = [torch.empty(N, dtype=dtype, device=part.device) for dtype in dtypes]
    # Many programs, since there are few columns: of 2112 x 768 an H100 makes this in a fifth of
    # the time of blocks of 16 x 64.
    block_p, block_n = (4, 64) if interpreting() else (128, 16)
    with on_device(part):
        _column_sum_kernel[(cdiv(N, block_n), count)](
            part, out[0], out[min(1, count - 1)], out[-1], P, N, BLOCK_P=block_p, BLOCK_N=block_n,
            num_warps=8,
        )  # fmt: skip
    return out
