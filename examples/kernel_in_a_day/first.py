"""The first form of the kernel, kept to show what the lab says of it: a row in registers."""

import triton
import triton.language as tl


@triton.jit
def whole_row_kernel(x_ptr, y_ptr, N, scale, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    s = tl.load(x_ptr + row * N + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
    p = tl.math.exp2(s - tl.max(s, 0))
    y = p * (1.0 / tl.sum(p, 0))
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
