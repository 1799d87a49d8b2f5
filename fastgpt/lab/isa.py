"""What a compiled Triton kernel's machine code is made of: instructions, loops, source lines.

    code = disassemble(kernel.binary.asm, "sm_90")
    code.counts()                                 # the whole kernel
    code.counts(code.main_loop().instructions)    # one pass of its main loop

Counts are static: an instruction counts once, however often it runs, for one warp (wave) that
runs it. In code for one warp of many (tcgen05, TMA) that is more than the average warp issues.
Useful work, the products that the kernel's author asked for, comes from Triton's own form of the
kernel (TTGIR), where a product still has its shape.
"""

import linecache
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastgpt.lab import amdgcn, sass
from fastgpt.lab.flow import Instruction, Loop, control_flow
from fastgpt.lab.lines import in_triton, resolved
from fastgpt.lab.result import KINDS, MEMORY, Counts, Line

GLOBAL = ("global_load", "global_store", "global_async")

__all__ = [
    "Disassembly", "Dot", "Instruction", "Loop", "disassemble", "dots", "loop_flops",
    "warp_specialised",
]  # fmt: skip


@dataclass(frozen=True)
class Disassembly:
    """The instructions that can be reached, and the loops that do some work."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def counts(self, indices: Iterable[int] | None = None) -> Counts:
        """Instructions of the whole kernel, or of those with the given indices."""
        code = self.instructions
        if indices is not None:
            code = tuple(code[i] for i in indices)
        kinds = Counter(i.kind for i in code)
        widths = {
            kind: dict(Counter(i.width for i in code if i.kind == kind))
            for kind in MEMORY
            if kinds[kind]
        }
        return Counts(
            kinds={kind: kinds[kind] for kind in KINDS},
            matrix=dict(Counter(i.opcode for i in code if i.kind == "matrix")),
            widths=widths,
            matrix_flops=sum(i.flops for i in code),
        )

    def main_loop(self) -> Loop | None:
        """The loop in which the kernel is thought to spend its time; None without a loop.

        Of the loops with matrix instructions and none within them that has some: the one with
        the most matrix work, of equals the one with the fewest instructions, which is the steady
        loop without masks. Where no loop has matrix instructions: of the innermost loops the one
        that moves most bytes to and from global memory, of equals the longest.
        """
        return self._main

    @cached_property
    def _main(self) -> Loop | None:
        inner = {id(a): [b for b in self.loops if b is not a and _within(b, a)] for a in self.loops}
        counts = {id(loop): self.counts(loop.instructions) for loop in self.loops}

        def matrix(loop: Loop) -> tuple[int, int]:
            found = counts[id(loop)]
            return found.matrix_flops, found.kinds["matrix"]

        products = [
            loop
            for loop in self.loops
            if any(matrix(loop)) and not any(any(matrix(b)) for b in inner[id(loop)])
        ]
        if products:
            return max(products, key=lambda loop: (matrix(loop), -len(loop.instructions)))

        def moved(loop: Loop) -> tuple[int, int]:
            found = counts[id(loop)]
            return sum(found.bytes_a_lane(kind) for kind in GLOBAL), len(loop.instructions)

        return max((a for a in self.loops if not inner[id(a)]), key=moved, default=None)

    def lines(self, loop: Loop | None) -> tuple[Line, ...]:
        """Each source line with its instructions in the kernel and in a loop, in their order."""
        whole = Counter(i.line for i in self.instructions if i.line)
        body = loop.instructions if loop else ()
        inside = Counter(self.instructions[i].line for i in body)
        return tuple(
            Line(file, line, linecache.getline(file, line).strip(), n, inside[file, line])
            for (file, line), n in sorted(whole.items())
        )


def _within(a: Loop, b: Loop) -> bool:
    return set(a.instructions) < set(b.instructions)


def disassemble(asm: Mapping[str, Any], target: str) -> Disassembly:
    """The machine code of a compiled kernel.

    Args:
        asm: what Triton keeps of a compilation: "cubin" and "ptx", or "amdgcn".
        target: "sm_90", "gfx942", ...

    Raises:
        ValueError: asm lacks the target's machine code.
        FileNotFoundError: nvdisasm is missing.
    """
    form = "cubin" if target.startswith("sm_") else "amdgcn"
    if form not in asm:
        raise ValueError(f"disassemble: {target} needs {form}; got {', '.join(sorted(asm))}")
    if form == "amdgcn":
        return Disassembly(*control_flow(*amdgcn.parse(asm["amdgcn"])))
    steps, labels, entries = sass.parse(sass.disassembled(asm["cubin"]))
    return Disassembly(*control_flow(resolved(steps, asm.get("ptx", "")), labels, entries))


@dataclass(frozen=True)
class Dot:
    """A product of matrices as Triton's compiler distributes it, [m, k] x [k, n].

    Attributes:
        line: where the author wrote it.
        depth: loops around it; 0 for what the pipeliner peeled off or what is in none.
        replicas: how many warps compute each element, where there are more than it needs.
        loop: which loop of the kernel is around it, counted from 0; -1 outside of all.
        warps: of the partition it is in, of a warp-specialised kernel; else of the program.
        instructions: tcgen05 instructions that it becomes; else 0.
    """

    m: int
    n: int
    k: int
    line: tuple[str, int] | None
    depth: int
    replicas: int
    loop: int = -1
    warps: int = 0
    instructions: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def warp_specialised(asm: Mapping[str, Any]) -> bool:
    """Whether different warps run different code, so that no single loop is the kernel's work."""
    return re.search(r"\bttg\.warp_specialize\b *\(", asm.get("ttgir", "")) is not None


_DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
_TYPE = re.compile(
    r"(?:tensor|!ttg\.memdesc)<((?:\d+x)+)([A-Za-z]\w*)(?:, (#[\w.]+(?:<\{.*?\}>)?))?"
)
_OPENS = re.compile(r"scf\.(for|while)\b.*\{$|partition\d+\(.*num_warps\((\d+)\).*\{$")


def dots(asm: Mapping[str, Any]) -> tuple[Dot, ...]:
    """The products in the kernel's TTGIR, in their order there."""
    text = asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#tt\w*\..*)$", text, re.M))
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
    program = int(m[1]) if (m := re.search(r'"ttg\.num-warps" = (\d+)', text)) else 0
    found: list[Dot] = []
    around: list[tuple[int, int, int]] = []  # indentation, loop or -1, warps of a partition or 0
    loops = 0
    for row in text.splitlines():
        code, _, place = row.rpartition(" loc(")
        indent = len(row) - len(row.lstrip())
        closes = row.lstrip().startswith("}") and not row.endswith("{")
        if closes and around and around[-1][0] == indent:
            around.pop()
        if m := _OPENS.search(row):
            around.append((indent, loops if m[1] else -1, int(m[2] or 0)))
            loops += bool(m[1])
        elif m := _DOT.search(code):
            enclosing = [loop for _, loop, _ in around if loop >= 0]
            warps = next((w for _, _, w in reversed(around) if w), program)
            line = _line(place.removesuffix(")"), places)
            found.append(_dot(code, layouts, line, enclosing, warps))
    return tuple(found)


def _dot(
    code: str,
    layouts: Mapping[str, str],
    line: tuple[str, int] | None,
    loops: Sequence[int],
    warps: int,
) -> Dot:
    operands, _, types = code.rpartition(" : ")
    a, b, d = _TYPE.findall(types)[:3]
    rows, columns, tile = ([int(n) for n in t[0].split("x")[:-1]] for t in (a, b, d))
    m, n, k = math.prod(rows[:-1]), columns[-1], rows[-1]
    layout = layouts.get(d[2], d[2])
    replicas, instructions = _replicas(layout, tile), 0
    if "tc_gen5_mma" in operands:  # each takes 256 bits of a row: PTX ISA, tcgen05.mma, shapes
        block = _numbers(layout, "blockM") + _numbers(layout, "blockN") or [128, n]
        bits = int(re.findall(r"\d+", a[1])[0])
        instructions = math.ceil(m / block[0]) * math.ceil(n / block[1]) * (k * bits // 256)
    loop = loops[-1] if loops else -1
    return Dot(m, n, k, line, len(loops), replicas, loop, warps, instructions)


def _numbers(layout: str, name: str) -> list[int]:
    m = re.search(rf"\b{name} = \[?([\d, ]+)", layout)
    return [int(n) for n in m[1].replace(" ", "").split(",") if n] if m else []


def _replicas(layout: str, tile: Sequence[int]) -> int:
    """How many times the warps of an MMA layout compute a tile; 1 for other layouts."""
    if not layout.startswith(("#ttg.nvidia_mma", "#ttg.amd_mfma", "#ttg.amd_wmma")):
        return 1
    shape = _numbers(layout, "instrShape") or [16, 16]
    shape = shape[-2:] if "versionMajor = 2" in layout else shape[:2]
    warps, copies = _numbers(layout, "warpsPerCTA"), 1
    if not warps:  # a basis vector for each bit of the warp's number
        m = re.search(r"warp = \[((?:\[[\d, ]+\],? ?)*)\]", layout)
        bases = [
            [int(n) for n in b.split(",")] for b in re.findall(r"\[([\d, ]+)\]", m[1] if m else "")
        ]
        copies = 2 ** sum(not any(basis) for basis in bases)
        warps = [1 + sum(axis) for axis in zip(*bases, strict=True)] or [1] * len(tile)
    instruction = [1] * (len(tile) - 2) + shape
    over = [max(1, w * i // t) for w, i, t in zip(warps, instruction, tile, strict=True)]
    return copies * math.prod(over)


def _line(place: str, places: Mapping[str, str]) -> tuple[str, int] | None:
    """File and line of an MLIR location: of inlined code the innermost outside Triton's library."""
    place = places.get(place, place)
    if m := re.fullmatch(r'"(.*)":(\d+):\d+(?: to .*)?', place):
        return m[1], int(m[2])
    if m := re.fullmatch(r"callsite\((.*) at (.*)\)", place):
        inner = _line(m[1], places)
        return inner if inner and not in_triton(inner[0]) else _line(m[2], places)
    if m := re.fullmatch(r'(?:"[^"]*"\(|fused(?:<.*>)?\[)([^,\])]*).*', place):
        return _line(m[1], places)
    return None


def loop_flops(
    asm: Mapping[str, Any], disassembly: Disassembly, loop: Loop | None, warps: int
) -> tuple[int, float]:
    """Useful FLOPs per pass of a loop and program, and issued over useful matrix work.

    Without a loop, of the whole kernel. Where the opcodes tell the work that is issued, useful is
    issued / redundancy, so that it counts passes as the machine code does when the compiler
    unrolls; redundancy is the mean of the dots' replicas, weighted by their work. tcgen05 does
    not tell: useful is that of the dots, times the unrolling that the number of its instructions
    shows. float32 products without tensor cores are taken as the dots say, once.

    Of a warp-specialised kernel this is the work of the one partition that the loop is in.

    Args:
        warps: of the program.
    """
    counts = disassembly.counts(loop.instructions if loop else None)
    products = _dots_of(asm, disassembly, loop)
    asked = sum(dot.flops for dot in products)
    if counts.matrix_flops:
        made = sum(dot.flops * dot.replicas for dot in products)
        redundancy = made / asked if asked else 1.0
        if products and warp_specialised(asm):
            warps = products[0].warps
        return round(counts.matrix_flops * warps / redundancy), redundancy
    one_pass = sum(dot.instructions for dot in products)
    unrolled = round(counts.kinds["matrix"] / one_pass) if one_pass else 1
    return asked * max(1, unrolled), 1.0


def asked_flops(asm: Mapping[str, Any], disassembly: Disassembly, loop: Loop | None) -> int:
    """FLOPs of the products as written, in one pass of a loop that is not unrolled."""
    return sum(dot.flops for dot in _dots_of(asm, disassembly, loop))


def _dots_of(
    asm: Mapping[str, Any], disassembly: Disassembly, loop: Loop | None
) -> tuple[Dot, ...]:
    """The dots of the TTGIR loop that shares most lines with a loop of the machine code."""
    found = dots(asm)
    if loop is None:
        return found
    code = [disassembly.instructions[i] for i in loop.instructions]
    products = [i for i in code if i.kind == "matrix"] or code
    lines = {i.line for i in products if i.line}
    groups = [[d for d in found if d.loop == n] for n in {d.loop for d in found} - {-1}]

    def match(group: list[Dot]) -> tuple[int, int]:
        return len({d.line for d in group} & lines), sum(d.flops for d in group)

    best = max(groups, key=match, default=[])
    return tuple(best) if best and (match(best)[0] or not lines) else ()
