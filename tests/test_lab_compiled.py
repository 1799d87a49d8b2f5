"""The reader of machine code, on kernels compiled here whose counts can be reckoned by hand."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, arg-type, call-overload"

import linecache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastgpt.kernels.attention import attention_fwd
from fastgpt.kernels.layer_norm import layer_norm_fwd
from fastgpt.lab.compile import Kernel, offline
from fastgpt.lab.isa import disassemble, dots, loop_flops
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA

compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < n)
    tl.store(y_ptr + offs * stride, x, mask=offs < n)


@triton.jit
def _exp_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.math.exp2(tl.load(x_ptr + offs)))


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, K, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    in_m, in_n, in_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        offs_k = k * BLOCK_K + in_k
        a = tl.load(a_ptr + in_m[:, None] * stride + offs_k[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * stride + in_n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + in_m[:, None] * stride + in_n[None, :], acc)


def compiled(target: str, launch: Any) -> Kernel:
    with offline(target) as kernels:
        launch()
    return kernels[0]


def matmul(target: str, M: int, N: int, K: int, dtype: torch.dtype, warps: int = 4) -> Kernel:
    a, c = torch.empty(4096, dtype=dtype), torch.empty(4096)
    return compiled(
        target, lambda: _matmul_kernel[(1,)](a, a, c, 512, 256, M, N, K, num_warps=warps)
    )


@pytest.mark.parametrize("target", NVIDIA + AMD)
class TestEveryTarget:
    pytestmark = compiles

    def test_main_loop_of_a_matmul(self, target: str) -> None:
        kernel = matmul(target, 64, 64, 32, torch.float16)
        code = disassemble(kernel.binary.asm, target)
        main = code.main_loop()
        assert main is not None
        flops, redundancy = loop_flops(kernel.binary.asm, code, main, 4)
        steps = flops / (2 * 64 * 64 * 32)  # more than 1 where the compiler unrolls
        assert steps in (1, 2, 4) and redundancy == 1
        assert code.counts().kinds["other"] == 0
        matrix = code.counts(main.instructions).kinds["matrix"]
        assert (matrix > 0) == (target != "sm_75")  # Triton 3.7 has no tensor cores of Turing
        lines = {line.line for line in code.lines(main) if line.loop}
        first = _matmul_kernel.starting_line_number
        assert lines <= set(range(first, first + 17)) and lines
        dot = next(d for d in dots(kernel.binary.asm))
        assert dot.line is not None and Path(dot.line[0]).name == Path(__file__).name
        assert dot.line[1] in lines and "tl.dot" in linecache.getline(__file__, dot.line[1])

    def test_every_opcode_of_layer_norm_is_known(self, target: str) -> None:
        x, w = torch.empty(64, 768, dtype=torch.float16), torch.empty(768)
        kernel = compiled(target, lambda: layer_norm_fwd(x, x, w, w, 1e-5, 0.0, None))
        code = disassemble(kernel.binary.asm, target)
        assert [i.opcode for i in code.instructions if i.kind == "other"] == []
        widths = code.counts().widths
        assert set(widths["global_load"]) == {16}
        assert widths["global_store"].pop(4) == 2  # mean and rstd
        assert set(widths["global_store"]) == {16}
        files = {i.line[0] for i in code.instructions if i.line}
        assert all(file.endswith("kernels/layer_norm.py") for file in files)

    def test_one_exponential_an_element(self, target: str) -> None:
        x = torch.empty(1024)
        kernel = compiled(target, lambda: _exp_kernel[(1,)](x, x, 1024, num_warps=4))
        lanes = 64 if target.startswith("gfx9") else 32
        assert disassemble(kernel.binary.asm, target).counts().kinds["mufu"] == 1024 // lanes // 4


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942", "gfx1100"])
class TestWidths:
    pytestmark = compiles

    def test_aligned_copies_are_wide_and_strided_ones_are_not(self, target: str) -> None:
        x = torch.empty(65536, dtype=torch.float16)
        for stride, width in ((1, 16), (3, 2)):
            kernel = compiled(
                target, lambda s=stride: _copy_kernel[(1,)](x, x, 4096, s, 1024, num_warps=1)
            )
            counts = disassemble(kernel.binary.asm, target).counts()
            lanes = 64 if target.startswith("gfx9") else 32
            each = {width: 1024 * 2 // lanes // width}
            assert counts.widths["global_load"] == counts.widths["global_store"] == each
            assert counts.wide_share() == (width == 16)


@pytest.mark.parametrize(
    "target, instructions",
    [
        ("sm_80", {"HMMA.16816.F32.BF16": 2 * 128 * 64 * 64 // (16 * 8 * 16) // 4}),
        ("sm_90", {"HGMMA.64x64x16.F32.BF16": 4 + 4}),
        ("sm_100", {"UTCHMMA": 4 + 8}),
        ("gfx942", {"v_mfma_f32_32x32x8_bf16": 2 * 128 * 64 * 64 // (32 * 32 * 8) // 4}),
    ],
)
class TestAttention:
    pytestmark = compiles

    def test_main_loop(self, target: str, instructions: dict[str, int]) -> None:
        q = torch.empty(1, 256, 4, 64, dtype=torch.bfloat16)
        kernel = compiled(target, lambda: attention_fwd(q, q, q, 0.125, -1, 0, 0.0, None))
        code = disassemble(kernel.binary.asm, target)
        assert len(code.loops) == 2  # with masks and without
        main = code.main_loop()
        assert main is not None
        counts = code.counts(main.instructions)
        flags, warps = kernel.constexprs, kernel.binary.metadata.num_warps
        block_m, block_n = flags["BLOCK_M"], flags["BLOCK_N"]
        assert counts.matrix == instructions
        assert loop_flops(kernel.binary.asm, code, main, warps) == (
            2 * (2 * block_m * block_n * 64), 1.0,
        )  # fmt: skip
        lanes = 64 if target.startswith("gfx9") else 32
        assert counts.kinds["mufu"] - block_m * block_n // (warps * lanes) in range(5)  # + alpha
        assert counts.kinds["other"] == counts.kinds["spill_load"] == 0
        masked = [code.counts(loop.instructions).instructions for loop in code.loops]
        assert counts.instructions == min(masked) < max(masked)


class TestRedundancy:
    pytestmark = compiles

    @pytest.mark.parametrize("target, tile", [("sm_80", 16), ("gfx942", 32), ("gfx1100", 16)])
    def test_warps_without_a_tile_of_their_own(self, target: str, tile: int) -> None:
        """8 warps on a tile with fewer pieces of 16 x 8, 32 x 32 or 16 x 16."""
        kernel = matmul(target, tile, tile, 64, torch.float16, warps=8)
        code = disassemble(kernel.binary.asm, target)
        main = code.main_loop()
        assert main is not None
        flops, redundancy = loop_flops(kernel.binary.asm, code, main, 8)
        assert redundancy > 1
        assert flops / (2 * tile * tile * 64) in (1, 2, 4)
