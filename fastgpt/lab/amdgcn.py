"""AMD's machine code: the assembly text that Triton keeps, to instructions.

Opcodes as in AMD's ISA guides (CDNA 2, 3, 4 and RDNA 3) and LLVM's AMDGPU usage guide. A dual
instruction of RDNA 3 (v_dual_fmac_f32 ... :: v_dual_mov_b32 ...) is one, of its first half's kind
or fp32 if either half is.
"""

import re

from fastgpt.lab.flow import Instruction, Step
from fastgpt.lab.lines import Files, innermost

# The first that matches tells.
_TABLE = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"v_(s?mfma|smfmac|s?wmma|swmmac)", "matrix"),
        (r"v_permlane|.*_dpp(8|16)?$|ds_b?permute|ds_swizzle", "shuffle"),
        (r"v_(exp|log|rcp|rsq|sqrt|sin|cos|tanh)_", "mufu"),
        (r"v_(pk_)?cvt_", "convert"),
        (r"v_(dual_)?(cmp|cmpx|cndmask)_", "integer"),
        (r"v_\w*_f64", "fp64"),
        (r"v_\w*_b?f(16|32)|v_(pk_)?fma", "fp32"),
        (r"v_", "integer"),
        (r"s_(barrier|wait|sleep)", "barrier"),
        (r"s_(c?branch|endpgm|setpc|swappc|call|trap|nop|clause|delay_alu|sendmsg|setprio|set_|inst"
         r"|code_end|sethalt|icache|denorm_mode|round_mode)", "control"),
        (r"s_", "uniform"),
        (r"scratch_load", "spill_load"),
        (r"scratch_store", "spill_store"),
        (r"(global|buffer|flat)_atomic", "atomic"),
        (r"(global|buffer)_(gl[012]_)?(inv|wb)", "barrier"),
        (r"(global|buffer)_load_lds|tensor_load_to_lds", "global_async"),
        (r"(global|buffer|tbuffer|flat)_load", "global_load"),
        (r"(global|buffer|tbuffer|flat)_store|tensor_store", "global_store"),
        (r"ds_(read|load)", "shared_load"),
        (r"ds_(write|store)", "shared_store"),
        (r"ds_", "atomic"),
    )
)  # fmt: skip
_STEM = r"(?:s|v|ds|global|buffer|tbuffer|flat|scratch|image|tensor|cluster)_"
_INSTRUCTION = re.compile(rf"\s+({_STEM}\w+)\s*([^;]*)(?:;(.*))?$")
_LABEL = re.compile(r"(\.?[\w$.]+):")


def kind(opcode: str, operands: str = "", comment: str = "") -> str:
    """What an opcode is for, one of result.KINDS.

    Args:
        operands: "lds" among them makes a load one to shared memory.
        comment: the compiler's "Folded Spill" or "Folded Reload" marks a spill that goes through
            a buffer instruction (CDNA 2).
    """
    found = next((kind for pattern, kind in _TABLE if pattern.match(opcode)), "other")
    second = re.search(r"::\s*(\w+)", operands)
    if found == "integer" and second and kind(second[1]) == "fp32":
        return "fp32"
    if found == "global_load":
        if "Folded Reload" in comment:
            return "spill_load"
        return "global_async" if re.search(r"\blds\b", operands) else found
    return "spill_store" if found == "global_store" and "Folded Spill" in comment else found


def width(opcode: str) -> int:
    """Bytes that one lane moves, for vector loads and stores."""
    if not re.match(r"(global|buffer|tbuffer|flat|scratch)_(load|store)|ds_(read|load|write|store)",
                    opcode):  # fmt: skip
        return 0
    two = 2 if re.search(r"read2|write2|2addr", opcode) else 1
    if m := re.search(r"dword(?:x(\d))?", opcode):
        return 4 * int(m[1] or 1)
    if m := re.search(r"_[a-z]*?[bui](8|16|32|64|96|128)", opcode):
        return two * int(m[1]) // 8
    return 1 if "byte" in opcode else 2 if "short" in opcode or "d16" in opcode else 4


def matrix_flops(opcode: str) -> int:
    """Floating point operations that one wave issues, 2 a multiply-add.

    Several blocks in one instruction are counted where the opcode says so (_4b) and for 4 x 4,
    which is always 16 blocks of 4 x 4 (CDNA 3 ISA, section 7.1).
    """
    m = re.match(r"v_\w*?(?:mma|mfma|mmac|smfmac)_\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode)
    if m is None:
        return 0
    rows, columns, depth = int(m[1]), int(m[2]), int(m[3])
    blocks = int(m[4] or (16 if rows == 4 else 1))
    return 2 * rows * columns * depth * blocks


def parse(text: str) -> tuple[list[Step], dict[str, int]]:
    """The text of asm["amdgcn"]: steps and labels."""
    steps: list[Step] = []
    labels: dict[str, int] = {}
    files = Files(text)
    line: tuple[str, int] | None = None
    for row in text.split("\t.amdgpu_metadata")[0].splitlines():
        if m := _INSTRUCTION.match(row):
            opcode, operands, comment = m[1], m[2].strip(), m[3] or ""
            instruction = Instruction(
                len(steps), opcode, kind(opcode, operands, comment), width(opcode),
                matrix_flops(opcode), line, f"{opcode} {operands}".strip(),
            )  # fmt: skip
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            stops = opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
            steps.append(Step(instruction, (operands,) if jumps else (), not stops))
        elif m := _LABEL.match(row):
            labels[m[1]] = len(steps)
        elif (frames := files.frames(row)) is not None:
            line = innermost(frames)
    return steps, labels
