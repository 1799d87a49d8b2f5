"""The reader of machine code, on fragments whose counts are known."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, arg-type, call-overload"

from typing import Any

import pytest
import triton

from fastgpt.lab import amdgcn, sass
from fastgpt.lab.compile import tool
from fastgpt.lab.flow import control_flow
from fastgpt.lab.isa import Disassembly, Dot, disassemble, dots, warp_specialised
from fastgpt.lab.lines import resolved
from fastgpt.lab.result import KINDS
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA

compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")


def read_sass(code: str, ptx: str = "") -> Disassembly:
    """The fragment as nvdisasm would print it: addresses are put before its instructions."""
    rows = []
    for n, row in enumerate(code.strip().splitlines()):
        bare = row.strip()
        label = bare.endswith(":") or bare.startswith("//##")
        rows.append(bare if label else f"        /*{16 * n:04x}*/    {bare} ;")
    steps, labels, entries = sass.parse("\n".join(rows))
    return Disassembly(*control_flow(resolved(steps, ptx), labels, entries))


def read_amd(code: str) -> Disassembly:
    return Disassembly(*control_flow(*amdgcn.parse(code)))


def opcodes(code: Disassembly, indices: tuple[int, ...]) -> list[str]:
    return [code.instructions[i].opcode for i in indices]


SPIN = """
.text.kernel:
    S2R R0, SR_TID.X
.L_main:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
    @!P0 BRA `(.L_setup)
.L_back:
    HGMMA.64x64x16.F32 R4, gdesc[UR4], R4
    MUFU.EX2 R5, R5
    @P1 BRA `(.L_main)
    EXIT
.L_setup:
    SHF.L.U32 R3, R2, 0x1f, RZ
.L_spin:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
    @!P0 BRA `(.L_spin)
    BRA `(.L_back)
.L_trap:
    BRA `(.L_trap)
    NOP
    NOP
"""


def test_a_wait_out_of_line_is_neither_a_loop_nor_work() -> None:
    code = read_sass(SPIN)
    (loop,) = code.loops
    assert loop.depth == 1
    assert opcodes(code, loop.instructions) == [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "HGMMA.64x64x16.F32", "MUFU.EX2", "BRA",
    ]  # fmt: skip
    assert code.counts(loop.instructions).matrix_flops == 2 * 64 * 64 * 16 // 4


def test_padding_behind_the_last_exit_does_not_count() -> None:
    counts = read_sass(SPIN).counts()
    assert counts.instructions == 11  # all but the trap and its two NOPs
    assert counts.kinds["control"] == 5
    assert set(counts.kinds) == set(KINDS)


def test_a_wait_in_line_is_no_loop_and_integer_work_is() -> None:
    code = read_sass("""
        .L_wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_wait)
        .L_hash:
        LOP3.LUT R0, R0, R1, RZ, 0xc0
        @P1 BRA `(.L_hash)
        EXIT
    """)
    assert [opcodes(code, loop.instructions) for loop in code.loops] == [["LOP3.LUT", "BRA"]]


NESTED = """
    .L_outer:
    LDG.E.128 R0, desc[UR4][R2.64]
    .L_inner:
    HMMA.16816.F32 R4, R0, R2, R4
    LDS.128 R0, [R5]
    @P0 BRA `(.L_inner)
    HMMA.16816.F32 R4, R0, R2, R4
    STG.E.64 desc[UR4][R2.64], R4
    BRA.U UP0, `(.L_outer)
    EXIT
"""


def test_the_main_loop_is_the_innermost_with_products() -> None:
    code = read_sass(NESTED)
    assert [(len(loop.instructions), loop.depth) for loop in code.loops] == [(7, 1), (3, 2)]
    main = code.main_loop()
    assert main and main.depth == 2
    assert code.counts(main.instructions).matrix == {"HMMA.16816.F32": 1}
    whole = code.counts()
    assert whole.widths == {"global_load": {16: 1}, "global_store": {8: 1}, "shared_load": {16: 1}}
    assert whole.wide_share() == 0.5


def test_of_equal_loops_the_main_one_is_the_steady_one() -> None:
    code = read_sass("""
        .L_masked:
        HMMA.16816.F32 R4, R0, R2, R4
        FSEL R4, R4, -INF, P1
        @P0 BRA `(.L_masked)
        .L_steady:
        HMMA.16816.F32 R4, R0, R2, R4
        @P0 BRA `(.L_steady)
        EXIT
    """)
    main = code.main_loop()
    assert main and opcodes(code, main.instructions) == ["HMMA.16816.F32", "BRA"]


def test_without_products_the_main_loop_moves_most_bytes() -> None:
    code = read_sass("""
        .L_a:
        LDG.E R4, desc[UR4][R2.64]
        FADD R4, R4, R5
        FADD R4, R4, R5
        @P0 BRA `(.L_a)
        .L_b:
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 BRA `(.L_b)
        EXIT
    """)
    main = code.main_loop()
    assert main and opcodes(code, main.instructions) == ["LDG.E.128", "BRA"]
    assert read_sass("EXIT").main_loop() is None


def test_a_jump_table_leads_to_all_its_labels() -> None:
    table = '(*"BRANCH_TARGETS .L_a,.L_b"*)'
    code = read_sass(f"""
        BRX R2 -0x1a0 {table}
        .L_a:
        FADD R0, R0, R1
        EXIT
        .L_b:
        FMUL R0, R0, R1
        EXIT
        .L_never:
        MUFU.EX2 R0, R0
    """)
    assert [i.opcode for i in code.instructions] == ["BRX", "FADD", "EXIT", "FMUL", "EXIT"]


LIBRARY = "/opt/site-packages/triton/language/standard.py"


def test_lines_are_those_of_the_author() -> None:
    ptx = f"""
        .loc 1 10 5                     // user.py:10:5
        .loc 2 43 17                    // standard.py:43:17 @[ user.py:11:9 ]
        .loc 2 99 3                     // standard.py:99:3 @[ standard.py:98:1 @[ user.py:20:9 ] ]
        .loc 2 99 3                     // standard.py:99:3 @[ user.py:30:9 ]
        .file 1 "/home/me/user.py"
        .file 2 "{LIBRARY}"
    """
    code = read_sass(
        f"""
        //## File "/home/me/user.py", line 10
        FADD R0, R0, R1
        //## File "{LIBRARY}", line 43
        FMUL R0, R0, R1
        //## File "/home/me/user.py", line 30
        FADD R0, R0, R1
        //## File "{LIBRARY}", line 99
        SHFL.BFLY PT, R0, R1, 0x1, 0x1f
        FADD R0, R0, R1
        FADD R0, R0, R1
        //## File "{LIBRARY}", line 43 inlined at "{LIBRARY}", line 98
        //## File "{LIBRARY}", line 98 inlined at "/home/me/user.py", line 20
        //## File "/home/me/user.py", line 20
        FADD R0, R0, R1
        EXIT
        """,
        ptx,
    )
    assert [i.line[1] for i in code.instructions if i.line] == [10, 11, 30, 30, 30, 20, 20, 20]
    rows = code.lines(None)
    assert [(r.file, r.line, r.whole, r.loop) for r in rows] == [
        ("/home/me/user.py", 10, 1, 0), ("/home/me/user.py", 11, 1, 0),
        ("/home/me/user.py", 20, 3, 0), ("/home/me/user.py", 30, 3, 0),
    ]  # fmt: skip


GCN = f"""
_kernel:                                ; @_kernel
\t.file\t1 "/home/me" "user.py"
\t.file\t2 "{LIBRARY.rpartition("/")[0]}" "standard.py"
\t.loc\t1 5 0 prologue_end             ; user.py:5:0
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tbuffer_store_dword v9, off, s[96:99], 0 ; 4-byte Folded Spill
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t2 43 17                         ; standard.py:43:17 @[ user.py:7:25 ]
\tbuffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
\tbuffer_load_dwordx4 v1, s[4:7], 0 offen lds
\ts_waitcnt vmcnt(0)
\tds_read2st64_b64 v[0:3], v4 offset1:4
\t.loc\t1 0 0 is_stmt 0                 ; :0:0
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_dual_mov_b32 v0, v1 :: v_dual_mul_f32 v2, v3, v4
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\tglobal_store_short_d16_hi v0, v1, s[0:1]
\ts_endpgm
\ts_code_end
\t.section\t.rodata
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .args:
\ts_nop 0
\t.end_amdgpu_metadata
"""


def test_amd() -> None:
    code = read_amd(GCN)
    (loop,) = code.loops
    counts = code.counts(loop.instructions)
    assert {k: n for k, n in counts.kinds.items() if n} == {
        "matrix": 1, "fp32": 1, "global_load": 1, "global_async": 1, "shared_load": 1,
        "barrier": 1, "control": 1,
    }  # fmt: skip
    assert counts.matrix_flops == 2 * 32 * 32 * 8
    assert counts.widths == {
        "global_load": {16: 1}, "global_async": {16: 1}, "shared_load": {16: 1},
    }  # fmt: skip
    whole = code.counts()
    assert whole.instructions == 11 and whole.kinds["spill_store"] == 1
    assert whole.widths["global_store"] == {2: 1}
    assert [(r.line, r.whole, r.loop) for r in code.lines(loop)] == [(5, 2, 0), (7, 4, 4)]


@pytest.mark.parametrize(
    "opcode, kind, width, flops",
    [
        ("HMMA.1688.F32.TF32", "matrix", 0, 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", "matrix", 0, 2 * 16 * 8 * 32),
        ("DMMA.884", "matrix", 0, 2 * 8 * 8 * 4),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "matrix", 0, 2 * 64 * 128 * 32 // 4),
        ("QMMA.16832.F32.E4M3.E4M3", "matrix", 0, 2 * 16 * 8 * 32),
        ("UTCHMMA", "matrix", 0, 0),
        ("FFMA2", "fp32", 0, 0),
        ("HFMA2.MMA", "fp32", 0, 0),
        ("FMNMX3", "integer", 0, 0),
        ("FSETP.GT.AND", "integer", 0, 0),
        ("DSETP.GT.AND", "fp64", 0, 0),
        ("UISETP.GE.AND", "uniform", 0, 0),
        ("LDCU.64", "uniform", 0, 0),
        ("LDG.E.U16.SYS", "global_load", 2, 0),
        ("LDG.E.ENL2.256", "global_load", 32, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128", "global_async", 16, 0),
        ("UTMALDG.2D", "global_async", 0, 0),
        ("UTMASTG.2D", "global_store", 0, 0),
        ("LDS.U.128", "shared_load", 16, 0),
        ("LDSM.16.M88", "shared_load", 4, 0),
        ("LDSM.16.MT88.4", "shared_load", 16, 0),
        ("STSM.16.M88.2", "shared_store", 8, 0),
        ("LDTM.x32", "shared_load", 0, 0),
        ("STL.64", "spill_store", 8, 0),
        ("REDUX.SUM.S32", "shuffle", 0, 0),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic", 0, 0),
        ("LDGDEPBAR", "barrier", 0, 0),
        ("FROBNICATE", "other", 0, 0),
    ],
)
def test_sass_opcodes(opcode: str, kind: str, width: int, flops: int) -> None:
    assert (sass.kind(opcode), sass.width(opcode), sass.matrix_flops(opcode)) == (
        kind, width, flops,
    )  # fmt: skip


@pytest.mark.parametrize(
    "opcode, kind, width, flops",
    [
        ("v_mfma_f32_32x32x8bf16_1k", "matrix", 0, 2 * 32 * 32 * 8),
        ("v_mfma_f32_16x16x4_4b_f32", "matrix", 0, 2 * 16 * 16 * 4 * 4),
        ("v_mfma_f32_4x4x4_16b_f16", "matrix", 0, 2 * 4 * 4 * 4 * 16),
        ("v_wmma_f32_16x16x16_bf16", "matrix", 0, 2 * 16**3),
        ("v_exp_f32_e32", "mufu", 0, 0),
        ("v_rcp_iflag_f32_e32", "mufu", 0, 0),
        ("v_cvt_pk_bf16_f32", "convert", 0, 0),
        ("v_pk_fma_f32", "fp32", 0, 0),
        ("v_div_scale_f32", "fp32", 0, 0),
        ("v_fma_f64", "fp64", 0, 0),
        ("v_cmp_gt_f32_e32", "integer", 0, 0),
        ("v_accvgpr_read_b32", "integer", 0, 0),
        ("v_add_f32_dpp", "shuffle", 0, 0),
        ("v_permlane32_swap_b32_e32", "shuffle", 0, 0),
        ("ds_bpermute_b32", "shuffle", 0, 0),
        ("s_waitcnt_depctr", "barrier", 0, 0),
        ("buffer_gl0_inv", "barrier", 0, 0),
        ("s_cbranch_execz", "control", 0, 0),
        ("s_load_dwordx8", "uniform", 0, 0),
        ("buffer_load_ushort", "global_load", 2, 0),
        ("global_load_b128", "global_load", 16, 0),
        ("global_load_lds_dwordx4", "global_async", 16, 0),
        ("buffer_load_dwordx3", "global_load", 12, 0),
        ("buffer_load_sbyte", "global_load", 1, 0),
        ("ds_load_u16_d16_hi", "shared_load", 2, 0),
        ("ds_read_b64_tr_b16", "shared_load", 8, 0),
        ("ds_store_2addr_stride64_b32", "shared_store", 8, 0),
        ("ds_add_u32", "atomic", 0, 0),
        ("scratch_load_b128", "spill_load", 16, 0),
        ("global_atomic_add_f32", "atomic", 0, 0),
    ],
)
def test_amd_opcodes(opcode: str, kind: str, width: int, flops: int) -> None:
    assert (amdgcn.kind(opcode), amdgcn.width(opcode), amdgcn.matrix_flops(opcode)) == (
        kind, width, flops,
    )  # fmt: skip


TTGIR = f"""
#mma = #ttg.nvidia_mma<{{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}}>
#wmma = #ttg.amd_wmma<{{version = 1, isTranspose = true, ctaLayout = {{warp = [[1, 0], [0, 0]]}}}}>
#tmem = #ttng.tensor_memory_encoding<blockM = 128, blockN = 64, colStride = 1>
#loc = loc("/home/me/user.py":1:0)
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 8 : i32}} {{
    %0 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (f32)  : i32 {{
      %1 = scf.if %p -> (f32) {{
        %s = tt.dot %q, %k, %z : tensor<64x32xbf16, #ttg.dot_op<{{opIdx = 0, parent = #mma}}>> * tensor<32x16xbf16, #ttg.dot_op<{{opIdx = 1, parent = #mma}}>> -> tensor<64x16xf32, #mma> loc(#loc3)
      }} else {{
      }} loc(#loc)
    }} {{tt.num_stages = 2 : i32}} loc(#loc)
    %t = tt.dot %q, %k, %z : tensor<2x32x8xf16, #ttg.dot_op<{{opIdx = 0}}>> * tensor<2x8x16xf16, #ttg.dot_op<{{opIdx = 1}}>> -> tensor<2x32x16xf32, #blocked> loc(#loc1)
    %u = tt.dot %q, %k, %z : tensor<32x16xf16, #ttg.dot_op<{{opIdx = 0}}>> * tensor<16x16xf16, #ttg.dot_op<{{opIdx = 1}}>> -> tensor<32x16xf32, #wmma> loc(#loc4)
    scf.while (%p) : (i1) -> i1 {{
    }} do {{
      ttng.tc_gen5_mma %q, %k, %d[], %t, %t {{is_async}} : !ttg.memdesc<128x64xbf16, #shared, #smem>, !ttg.memdesc<64x128xbf16, #shared1, #smem>, !ttg.memdesc<128x128xf32, #tmem, #ttng.tensor_memory, mutable> loc(#loc1)
    }} loc(#loc)
}} loc(#loc)
#loc1 = loc("/home/me/user.py":9:4)
#loc2 = loc("{LIBRARY}":43:17)
#loc3 = loc("s"(#loc1))
#loc4 = loc(callsite(#loc2 at #loc5))
#loc5 = loc("name"(#loc))
"""  # noqa: E501


def test_dots_of_ttgir() -> None:
    user = "/home/me/user.py"
    assert dots({"ttgir": TTGIR}) == (
        Dot(64, 16, 32, (user, 9), depth=1, replicas=2, loop=0, warps=8),  # 8 warps x 16 rows on 64
        Dot(2 * 32, 16, 8, (user, 9), depth=0, replicas=1, warps=8),
        Dot(32, 16, 16, (user, 1), depth=0, replicas=2, warps=8),  # a bit that moves no warp
        Dot(128, 128, 64, (user, 9), depth=1, replicas=1, loop=1, warps=8, instructions=2 * 4),
    )
    assert not warp_specialised({"ttgir": TTGIR + "scf.for {tt.warp_specialize}"})
    assert warp_specialised({"ttgir": "ttg.warp_specialize(%a) attributes {}"})


def test_missing_code_and_missing_tools_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="sm_90 needs cubin; got amdgcn, ttgir"):
        disassemble({"ttgir": "", "amdgcn": ""}, "sm_90")
    with pytest.raises(RuntimeError, match="must read the cubin"):
        disassemble({"cubin": b"no ELF"}, "sm_90")
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    tool.cache_clear()
    with pytest.raises(FileNotFoundError, match="nvdisasm: must be in the triton wheel"):
        disassemble({"cubin": b""}, "sm_90")
    monkeypatch.undo()
    tool.cache_clear()
