"""NVIDIA's machine code: nvdisasm's text to instructions.

Kinds follow the pipe that executes an instruction (NVIDIA, Nsight Compute, Kernel Profiling
Guide, section Pipelines): the ALU has integer and logic, the FMA pipe FP32 and packed FP16
arithmetic, CBU the branches, ADU constant loads and barriers. Comparison, minimum and maximum of
floats have the ALU's rate, not the FMA pipe's (CUDA C++ Programming Guide, table of arithmetic
throughput, "compare, minimum, maximum"), so FSETP, FSEL and FMNMX are integer. One exception:
IMAD runs on the FMA pipe and is integer here, because it makes addresses and moves registers.

Loads and stores of tensor memory (LDTM, STTM) are shared loads and stores of width 0: they take
a path of their own, not the shared memory's bandwidth.
"""

import math
import re
import subprocess
import tempfile

from fastgpt.lab.compile import tool
from fastgpt.lab.flow import Instruction, Step
from fastgpt.lab.lines import Location, innermost

# Opcodes up to the first dot: CUDA Binary Utilities, "Instruction Set Reference", Turing to
# Blackwell. What begins with U and is not here runs on the uniform datapath.
_KINDS = {
    "matrix": "HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA"
    " UTCHMMA UTCQMMA UTCIMMA UTCOMMA UTCMXQMMA",
    "mufu": "MUFU",
    "fp32": "FADD FADD32I FADD2 FMUL FMUL32I FMUL2 FFMA FFMA32I FFMA2 FSWZADD FHADD FHFMA"
    " HADD2 HADD2_32I HMUL2 HMUL2_32I HFMA2 HFMA2_32I",
    "fp64": "DADD DMUL DFMA DSETP",
    "convert": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    "integer": "FSETP FSEL FSET FMNMX FMNMX3 FCHK HSET2 HSETP2 HMNMX2 VHMNMX BMSK BREV FLO IABS"
    " IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL IMUL32I ISCADD ISETP LEA LOP LOP3 LOP32I POPC"
    " SHF SHL SHR SGXT VABSDIFF VABSDIFF4 VIADD VIADDMNMX VIMNMX VIMNMX3 MOV MOV32I PRMT SEL PLOP3"
    " PSETP P2R R2P CS2R VOTE MATCH LEPC QSPC",
    "uniform": "LDC S2R R2UR ELECT",
    "global_load": "LD LDG LDGMC",
    "global_store": "ST STG UTMASTG",
    "global_async": "LDGSTS UTMALDG UBLKCP",
    "shared_load": "LDS LDSM LDT LDTM UTCCP",
    "shared_store": "STS STSM STAS STT STTM",
    "shuffle": "SHFL REDUX CREDUX MOVM",
    "spill_load": "LDL",
    "spill_store": "STL",
    "atomic": "ATOM ATOMG ATOMS RED REDG REDAS UTMAREDG UBLKRED UREDGR",
    "barrier": "BAR MEMBAR ERRBAR CGAERRBAR DEPBAR LDGDEPBAR ARRIVES SYNCS WARPSYNC WARPGROUP"
    " WARPGROUPSET FENCE NANOSLEEP CCTL CCTLL ACQBULK UCGABAR_ARV UCGABAR_WAIT UTCBAR UTCATOMSWS"
    " UTMACCTL UTMACMDFLUSH USETMAXREG B2R",
    "control": "BRA BRX BRXU JMP JMX JMXU CALL RET EXIT KILL BSSY BSYNC BREAK BMOV BPT RPCMOV RTT"
    " YIELD NOP PREEXIT ENDCOLLECTIVE PMTRIG",
}
_KIND = {stem: kind for kind, stems in _KINDS.items() for stem in stems.split()}

# Rows, columns and depth of one warp's product, as the opcode spells them.
_SHAPES = {
    "884": (8, 8, 4), "8816": (8, 8, 16), "8832": (8, 8, 32), "1684": (16, 8, 4),
    "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32), "16864": (16, 8, 64),
}  # fmt: skip
_BYTES = {"8": 1, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

_THROUGH_REGISTERS = "LD LDG LDGMC LDS LDL ST STG STS STAS STL LDGSTS".split()

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"([.$\w]+):\s*$")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')


def kind(opcode: str) -> str:
    """What an opcode is for, one of result.KINDS."""
    stem = opcode.split(".")[0]
    on_uniform = stem.startswith(("U", "LDCU", "S2UR", "CS2UR", "VOTEU"))
    return _KIND.get(stem) or ("uniform" if on_uniform else "other")


def width(opcode: str) -> int:
    """Bytes that one lane moves, for loads and stores through registers and for LDGSTS."""
    stem, *suffixes = opcode.split(".")
    if stem in ("LDSM", "STSM"):  # 8 x 8 tiles of 16 bits, or 16 x 16 of 8: 4 and 8 bytes a lane
        tile = 8 if any("1616" in s for s in suffixes) else 4
        return tile * (int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1)
    if stem not in _THROUGH_REGISTERS:
        return 0
    return next((_BYTES[s] for s in suffixes if s in _BYTES), 4)


def matrix_flops(opcode: str) -> int:
    """Floating point operations that one warp issues, 2 a multiply-add.

    Of a warpgroup's product (HGMMA) a warp has a quarter. tcgen05 (UTC...) does not tell: 0.
    """
    stem, *suffixes = opcode.split(".")
    for suffix in suffixes:
        if m := re.fullmatch(r"64x(\d+)x(\d+)", suffix):
            return 2 * 64 * int(m[1]) * int(m[2]) // 4
        if stem.endswith("MMA") and suffix in _SHAPES:
            return 2 * math.prod(_SHAPES[suffix])
    return 0


def parse(text: str) -> tuple[list[Step], dict[str, int], list[int]]:
    """The text of `nvdisasm -c -gi`: steps, labels, and where functions start."""
    steps: list[Step] = []
    labels: dict[str, int] = {}
    entries: list[int] = []
    frames: list[Location] = []  # rows before an instruction, innermost first
    line: Location | None = None
    for row in text.splitlines():
        if m := _INSTRUCTION.match(row):
            address, predicate, opcode, operands = m.groups()
            frames = []
            words = " ".join(row.split("*/", 1)[1].split())
            found = (kind(opcode), width(opcode), matrix_flops(opcode))
            if predicate == "@!PT":  # never executed: ptxas pads with @!PT LDS RZ, [RZ]
                found = ("control", 0, 0)
            instruction = Instruction(int(address, 16), opcode, *found, line, words)
            steps.append(_step(instruction, predicate, operands))
        elif m := _LINE.match(row):
            frames.append((m[1], int(m[2])))
            line = innermost(frames)
        elif m := _LABEL.match(row):
            labels[m[1]] = len(steps)
            if m[1].startswith(".text."):
                entries.append(len(steps))
                line, frames = None, []
    anywhere = tuple(labels)
    steps = [Step(s.instruction, anywhere, s.falls) if s.targets == ("?",) else s for s in steps]
    return steps, labels, entries or [0]


def _step(instruction: Instruction, predicate: str | None, operands: str) -> Step:
    stem, _, suffix = instruction.opcode.partition(".")
    labels = tuple(re.findall(r"`\(([^)]+)\)", operands))
    if stem in ("EXIT", "RET", "KILL"):
        return Step(instruction, (), predicate is not None)
    if stem in ("BRX", "BRXU", "JMX", "JMXU"):  # a table of labels, in a comment if it is known
        known = re.search(r"BRANCH_TARGETS ([^\"]*)", operands)
        labels = tuple(known[1].replace(" ", "").split(",")) if known else labels or ("?",)
        return Step(instruction, labels, predicate is not None)
    if stem == "CALL":  # also jumps out of a divergent region; what is called comes back
        return Step(instruction, labels, True)
    if stem in ("BRA", "JMP"):
        if suffix == "DIV":  # the slow copy for a warp that has diverged, which Triton's does not
            return Step(instruction, (), True)
        conditional = predicate is not None or not operands.startswith("`")
        return Step(instruction, labels, conditional)
    return Step(instruction)


def disassembled(cubin: bytes) -> str:
    """What nvdisasm writes for a cubin, with source lines.

    Raises:
        FileNotFoundError: nvdisasm is missing.
        RuntimeError: it cannot read the cubin.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", "-gi", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: must read the cubin; got {done.stderr.strip()!r}")
    return done.stdout
