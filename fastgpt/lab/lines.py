"""Source lines of machine code: the line that the kernel's author wrote.

LLVM writes .file and .loc directives, with a comment that names the callers of what was inlined:

    .loc 2 43 17      ; standard.py:43:17 @[ attention.py:118:25 ]

The innermost frame outside Triton's own library counts: attention.py, line 118. A cubin names the
callers from Triton 3.9 on; before, it keeps the innermost frame alone, and the callers come from
the PTX, which has such comments too.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from fastgpt.lab.flow import Step

Location = tuple[str, int]
_FILE = re.compile(r'^\s*\.file[ \t]+(\d+)[ \t]+"([^"]*)"(?:[ \t]+"([^"]*)")?', re.M)
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_FRAME = re.compile(r"([^\s\[\]@]+):(\d+):\d+")


def in_triton(file: str) -> bool:
    """Whether a file is of Triton's own library: tl.sum, tl.cdiv, ..."""
    return "/triton/language/" in file


def innermost(frames: Sequence[Location]) -> Location | None:
    """The innermost frame outside Triton's library, else the innermost; None without any."""
    return next((f for f in frames if not in_triton(f[0])), frames[0] if frames else None)


class Files:
    """The files that a text's .file directives number; they may stand behind their use."""

    def __init__(self, text: str) -> None:
        self.numbered = {
            number: f"{folder}/{name}" if name else folder
            for number, folder, name in _FILE.findall(text)
        }
        # Comments say no more than the last part of the path.
        self.named = {path.rpartition("/")[2]: path for path in self.numbered.values()}

    def frames(self, row: str) -> list[Location] | None:
        """Frames of a .loc, innermost first and [] without a line; None for another row."""
        m = _LOC.match(row)
        if m is None:
            return None
        callers = _FRAME.findall(row)[1:]
        found = [(self.numbered.get(m[1], ""), int(m[2]))]
        found += [(self.named.get(file, file), int(line)) for file, line in callers]
        return [frame for frame in found if frame[1]]


def resolved(steps: Sequence[Step], ptx: str) -> list[Step]:
    """Steps whose lines inside Triton's library are those of the caller, as the PTX names it.

    Where a library line has several callers, the caller with the nearest instruction of its own
    is taken: the compiler moves instructions, but seldom far.
    """
    files, callers = Files(ptx), dict[Location, set[Location]]()
    for row in ptx.splitlines():
        frames = files.frames(row)
        user = innermost(frames or [])
        if frames and user and in_triton(frames[0][0]) and not in_triton(user[0]):
            callers.setdefault(frames[0], set()).add(user)
    lines = [step.instruction.line for step in steps]

    def line_of(i: int) -> Location | None:
        line = lines[i]
        choice = callers.get(line) if line else None
        if not choice:
            return line
        if len(choice) > 1:
            for far in range(1, len(lines)):
                for j in (i - far, i + far):
                    if 0 <= j < len(lines) and (near := lines[j]) in choice:
                        return near
        return min(choice)

    return [
        replace(step, instruction=replace(step.instruction, line=line_of(i)))
        for i, step in enumerate(steps)
    ]
