"""The goals that a kernel's machine code meets or not, ours beside the best of the peers'.

Of a peer's configurations the best counts: without spills and within shared memory if there is one,
then the highest `serial` of a kernel with products, the fewest instructions an element of another;
of several peers the best of those. Several kernels that do one thing together add up.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt import lab
from fastgpt.lab import analyse, cases
from fastgpt.lab.cases import OPS
from fastgpt.lab.result import MEMORY, Counts, Row, from_json

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
HEAD_DIMS = (64, 128)
WIDTHS = (768, 1024, 1600, 4096)
VOCABULARIES = (50257, 50304)
GLOBAL = tuple(kind for kind in MEMORY if kind.startswith("global"))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Thing:
    """One thing that ours and theirs do.

    Attributes:
        what, at: as in `benchmarks.peers.calls`; against: what and at of the peers that it is held
            against, if others.
        op: ours, as the lab names it; kernels: which of its kernels, by a regular expression.
        rule: "attention", "element" or "product".
    """

    what: str
    at: str
    op: str
    kernels: str
    rule: str
    against: tuple[str, str] | None = None


def things() -> list[Thing]:
    """What is compared, as far as fastgpt has it."""
    found = []
    for D in HEAD_DIMS:
        op = f"attention:D={D}"
        found += [
            Thing("attention, forward", str(D), op, r"\._fwd", "attention"),
            Thing("attention, backward, dk and dv", str(D), op, r"\._dkdv", "attention"),
            Thing("attention, backward, dq", str(D), op, r"\._dq", "attention"),
        ]
    for N in WIDTHS:
        rows = [("layer norm", "layer_norm"), ("rms norm", "rms_norm")]
        for what, name in rows:
            if name in OPS and "residual" in OPS[name].sizes:
                op = f"{name}:N={N},residual=0"
                found += [
                    Thing(f"{what}, forward", str(N), op, r"\._fwd", "element"),
                    Thing(f"{what}, backward", str(N), op, r"\._bwd", "element"),
                ]
        product = ("matrix product", "4096")
        for way, kernel in (("forward", r"\._up"), ("backward", r"\._d")):
            op = f"ffn:C={N},F={4 * N}"
            found.append(Thing(f"GEMM epilogue, {way}", str(N), op, kernel, "product", product))
        if "embedding" in OPS:
            op = f"embedding:C={N}"
            found.append(Thing("embedding, forward", str(N), op, r"\._fwd", "element"))
    for V in VOCABULARIES:
        both = ("cross-entropy, loss and gradient", str(V))
        if "linear_cross_entropy" in OPS:
            op = f"linear_cross_entropy:V={V}"
            found.append(Thing(*both, op, r"\._both", "element"))
        if "cross_entropy" in OPS:
            op, what = f"cross_entropy:V={V}", "cross-entropy, forward and backward"
            found.append(Thing(what, str(V), op, r"\._(fwd|bwd)", "element", both))
    return found


def subjects() -> list[str]:
    """Every op at the sizes of the goals."""
    found = []
    for name, case in OPS.items():
        if "D" in case.sizes:
            found += [f"{name}:D={D}" for D in HEAD_DIMS]
        elif "C" in case.sizes:
            found += [f"{name}:C={C}" + (f",F={4 * C}" * ("F" in case.sizes)) for C in WIDTHS]
        elif "N" in case.sizes and case.sizes["N"] < 65536:
            found += [f"{name}:N={N}" for N in WIDTHS]
        else:
            found.append(name)
    return found


# Peers


@dataclass
class Peers:
    """Rows of peers by what and at, and what could not be had."""

    rows: dict[tuple[str, str, str, str], list[Row]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def read(self, target: str, line: str) -> None:
        """One line of a child's output."""
        said = json.loads(line)
        if "row" in said:
            key = target, said["what"], said["at"], said["peer"]
            self.rows.setdefault(key, []).append(from_json(Row, said["row"]))
        elif "error" in said:
            about = " ".join(said[k] for k in ("peer", "what", "at") if k in said)
            self.missing.setdefault(about, said["error"])


def peers(
    targets: Sequence[str],
    arguments: Sequence[str],
    say: Say,
    only: str | None = None,
    keep: Path | None = None,
) -> Peers:
    """Compile what peers launch, a process a chip, as many at once as there are cores.

    Args:
        arguments: of `benchmarks.peers.child`.
        keep: a folder; chips whose rows are there are not compiled, those of others are put there.
    """
    found = Peers()
    options = list(arguments) + (["--only", only] if only else [])

    def one(target: str) -> None:
        skip: list[str] = []
        files = sorted(keep.glob(f"{target}*.jsonl")) if keep else []
        if files:
            for file in files:
                for line in file.read_text().splitlines():
                    if not line.startswith('{"key"'):
                        found.read(target, line)
            return
        while True:
            command = [sys.executable, "-m", "benchmarks.peers.child", target, *options]
            command += [word for key in skip for word in ("--skip", key)]
            rows, under_way = [], ""
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith('{"key"'):
                        under_way = json.loads(line)["key"]
                        say(f"{target}: {under_way}")
                    elif line.startswith("{"):
                        rows.append(line)
            if child.returncode == 0 or not under_way or under_way in skip:
                break
            skip.append(under_way)  # the compiler ended the process on it
        for line in rows:
            found.read(target, line)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{target}.jsonl").write_text("".join(rows))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, targets))
    return found


@dataclass(frozen=True)
class Best:
    """The figures of the best configuration: of one kernel, or of several that belong together."""

    who: str
    rows: tuple[Row, ...]

    @property
    def spills(self) -> int:
        return sum(row.spills for row in self.rows)

    @property
    def ceiling(self) -> float:
        return min(row.cost.ceiling for row in self.rows if row.cost)

    @property
    def serial(self) -> float:
        return min(row.cost.serial for row in self.rows if row.cost)

    @property
    def per_element(self) -> float | None:
        counts = [row.per_element for row in self.rows]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def budget(self) -> float | None:
        counts = [row.budget for row in self.rows]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def wide(self) -> float:
        return min(wide_bytes(row.whole) for row in self.rows)

    @property
    def binding(self) -> str:
        return ", ".join(dict.fromkeys(row.cost.binding for row in self.rows if row.cost))

    def order(self, rule: str) -> tuple[float, ...]:
        """What is better comes first."""
        faults = float(self.spills > 0) + sum(r.shared > r.shared_limit for r in self.rows)
        if rule == "element":
            return faults, self.per_element or float("inf")
        return faults, -self.serial, -self.ceiling


def wide_bytes(counts: Counts) -> float:
    """Share of the bytes of global accesses that move 16 at a time a lane; bulk copies are such."""
    found = [(w, n) for kind in GLOBAL for w, n in counts.widths.get(kind, {}).items()]
    if any(width == 0 for width, _ in found):
        return 1.0  # what a bulk copy moves is not in the instruction
    total = sum(w * n for w, n in found)
    return sum(w * n for w, n in found if w >= 16) / total if total else 1.0


def best(found: Peers, target: str, thing: Thing) -> Best | None:
    """The best of all peers at one thing."""
    candidates = []
    key = (target, *(thing.against or (thing.what, thing.at)))
    for (*of, who), rows in found.rows.items():
        if tuple(of) != key:
            continue
        good = [row for row in rows if row.error is None and row.cost]
        groups: dict[str, list[Row]] = {}
        for row in good:
            groups.setdefault(row.kernel, []).append(row)
        if not groups:
            continue
        chosen = [
            min((Best(who, (row,)) for row in group), key=lambda b: b.order(thing.rule)).rows[0]
            for group in groups.values()
        ]
        candidates.append(Best(who, tuple(chosen)))
    return min(candidates, key=lambda b: b.order(thing.rule), default=None)


# Goals


@dataclass(frozen=True)
class Line:
    """A goal at one place: what is ours, the best peer's, whether it is met, and by how much."""

    goal: str
    what: str
    at: str
    target: str
    ours: float | None
    theirs: float | None
    who: str
    met: bool | None
    short: str = ""


def compiled(rows: Iterable[Row]) -> list[Line]:
    """Every kernel compiles, fits and spills nothing."""
    made = []
    for row in rows:
        fits = row.error is None and row.shared <= row.shared_limit
        short = row.error or (f"{row.spills} bytes spilled" if row.spills else "")
        if row.error is None and not fits:
            short = f"{row.shared} of {row.shared_limit} bytes of shared memory"
        size = " ".join(f"{k}={v}" for k, v in row.variant.items() if not isinstance(v, bool))
        met = fits and not row.spills
        spills = float(row.spills)
        made.append(Line("compiles, fits, spills nothing", row.kernel, size, row.target, spills,
                         None, "", met, short))  # fmt: skip
    return made


def of_thing(thing: Thing, target: str, mine: Best, peer: Best | None) -> list[Line]:
    """The lines of one thing on one chip."""
    who = peer.who if peer else ""

    def line(goal: str, ours: float | None, theirs: float | None, need: float | None, more: bool,
             ) -> Line:  # fmt: skip
        if ours is None or need is None:
            return Line(goal, thing.what, thing.at, target, ours, theirs, who, None)
        shown = round(ours, 2), round(need, 2)  # two digits are what the model is good for
        met = shown[0] >= shown[1] if more else shown[0] <= shown[1]
        off = abs(ours / need - 1) if need else 0.0
        short = "" if met else f"{off:.0%} {'short' if more else 'over'}; {mine.binding} binds"
        return Line(goal, thing.what, thing.at, target, ours, theirs, who, met, short)

    if thing.rule == "product":
        serial = peer.serial if peer else None
        return [
            line("main loop no worse than a plain product's", mine.serial, serial, serial, True)
        ]
    counts = peer.per_element if peer else None
    if thing.rule == "attention":
        ceiling, serial = (peer.ceiling, peer.serial) if peer else (None, None)
        return [
            line("U_max", mine.ceiling, ceiling, ceiling, True),
            line("U_ser", mine.serial, serial, serial, True),
            line("instructions per exponential", mine.per_element, counts,
                 counts and 0.9 * counts, False),
        ]  # fmt: skip
    made = [
        line("instructions an element", mine.per_element, counts, counts and 0.8 * counts, False),
        line("under the memory's budget", mine.per_element, mine.budget, mine.budget, False),
    ]
    if thing.at == "768":
        made.append(line("16-byte share of the bytes", mine.wide, peer and peer.wide, 0.9, True))
    return made


def compared(found: Peers, targets: Sequence[str], rows: Sequence[tuple[Thing, Row]]) -> list[Line]:
    """All lines of all things."""
    made = []
    for thing in dict.fromkeys(thing for thing, _ in rows):
        for target in targets:
            own = [r for t, r in rows if t == thing and r.target == target and r.error is None]
            if own:
                peer = best(found, target, thing)
                made += of_thing(thing, target, Best("fastgpt", tuple(own)), peer)
    return made


def ours(
    targets: Sequence[str],
    say: Say,
    only: str | None = None,
    everything: bool = True,
    workers: int | None = None,
) -> tuple[list[Row], list[tuple[Thing, Row]]]:
    """fastgpt's kernels: all of them at all sizes, and those of each thing.

    Args:
        only: a regular expression of things; everything: whether the others are compiled too.
    """
    wanted = [t for t in things() if not only or re.search(only, t.what)]
    whole = subjects() if everything and not only else []
    jobs = [
        (op, one, target)
        for op in dict.fromkeys([*whole, *(t.op for t in wanted)])
        for target in targets
        for one in cases.launches(op, target)
        if op in whole or any(t.op == op and re.search(t.kernels, one.name) for t in wanted)
    ]

    def progress(done: int, of: int, row: Row) -> None:
        say(f"fastgpt: {row.kernel} {row.target}, {done} of {of}")

    rows = analyse.rows([(one, t) for _, one, t in jobs], workers, progress)
    pairs = [
        (thing, row)
        for thing in wanted
        for (op, _, _), row in zip(jobs, rows, strict=True)
        if op == thing.op and re.search(thing.kernels, row.kernel)
    ]
    return rows, pairs


ROW_KERNELS = ("layer_norm", "rms_norm", "embedding", "cross_entropy", "rotary", "adamw")


def traffic(say: Say, target: str = "sm_90") -> list[Line]:
    """Bytes that each kernel moves over the least possible, at the largest size that runs here."""
    made = []
    for name in OPS:
        say(f"traffic of {name}")
        found = lab.study([lab.subject(name)], [target], ["traffic"])
        for kernel in dict.fromkeys(t.kernel for t in found.traffic):
            last = [t for t in found.traffic if t.kernel == kernel][-1]
            row = name in ROW_KERNELS
            met = last.ratio <= 1.05 if row else None
            short = "" if met is not False else f"{last.ratio / 1.05 - 1:.0%} over"
            goal = (
                "bytes moved over the least, at most 1.05" if row else "bytes moved over the least"
            )
            made.append(Line(goal, kernel, last.size, target, last.ratio, None, "", met, short))
    return made
