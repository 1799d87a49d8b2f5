"""Rows as flat columns: for the terminal, as CSV, as Markdown; a gate over them; two compared."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastgpt.lab.chips import chip
from fastgpt.lab.cost import LIMITS, per_kflop, roofline
from fastgpt.lab.result import Number, Result, Row, Traffic
from fastgpt.lab.spec import evaluate

Flat = dict[str, Any]

# Column: its head in a table, and what it says.
COLUMNS = {
    "kernel": ("kernel", "file.function"),
    "target": ("target", "chip"),
    "warps": ("warps", "of one program"),
    "registers": ("regs", "a thread"),
    "spills": ("spills", "bytes a thread, in local memory"),
    "spill_instructions": ("spill instr", "loads and stores of local memory"),
    "smem": ("smem", "shared memory of one program, bytes"),
    "limit": ("smem limit", "the most that the chip gives one program"),
    "occupancy": ("occup", "share of the warps that a multiprocessor can hold"),
    "limited_by": ("by", "what stops one more program"),
    "matrix": ("matrix", "matrix instructions of the main loop, a warp"),
    "mufu": ("mufu", "special function instructions of the main loop, a warp"),
    "instructions": ("instr", "instructions of the main loop, a warp; the whole kernel without"),
    "wide": ("16 B", "share of global accesses that move 16 bytes a lane"),
    "redundancy": ("redund", "matrix work issued over matrix work asked for"),
    "binding": ("binding", "the pipe that takes longest"),
    "ceiling": ("ceiling", "share of peak that it leaves, all else overlapped"),
    "serial": ("serial", "the same with nothing overlapped"),
    "bound": ("of", "what peak: tensor or bandwidth"),
    "cycles": ("cycles", "of the binding pipe, for one program's pass"),
    "per_kflop": ("instr/kFLOP", "warp instructions per 1000 useful FLOPs of a program"),
    "per_element": (
        "instr/elem",
        "thread instructions an element; with products, of the main loop",
    ),
    "budget": ("budget", "instr/elem that can be issued while memory streams the element"),
    "traffic": ("traffic", "bytes moved over the least possible"),
    "intensity": ("FLOP/B", "useful FLOPs per byte, each byte moved once"),
    "attainable": ("TFLOP/s", "under the roofline: the ceiling, or bandwidth x intensity"),
}
SHOWN = (
    "target", "warps", "registers", "spills", "smem", "occupancy", "limited_by", "matrix", "mufu",
    "instructions", "wide", "binding", "ceiling", "serial", "bound",
)  # fmt: skip


def flat(row: Row, traffic: Sequence[Traffic] = ()) -> Flat:
    """A row as one value a column; None is what there is not."""
    if row.error is not None:
        empty: Flat = dict.fromkeys(COLUMNS)
        return (
            empty
            | {"kernel": row.kernel, "target": row.target, "error": row.error}
            | {"variant": row.variant}
        )
    body = row.loop or row.whole
    cost, fits = row.cost, row.occupancy
    moved = [t for t in traffic if t.kernel == row.kernel and row.target in t.target.split()]
    last = moved[-1] if moved else None
    flops = cost.useful_flops if cost else 0
    roof = flops and cost and last and roofline(last.flops, last.least, chip(row.target), cost)
    return {
        "kernel": row.kernel,
        "target": row.target,
        "variant": row.variant,
        "warps": row.warps,
        "registers": row.registers,
        "spills": row.spills,
        "spill_instructions": row.spill_instructions,
        "smem": row.shared,
        "limit": row.shared_limit,
        "occupancy": fits and fits.share,
        "limited_by": fits and fits.limited_by,
        "matrix": body.kinds.get("matrix", 0),
        "mufu": body.kinds.get("mufu", 0),
        "instructions": body.instructions,
        "wide": row.whole.wide_share(),
        "redundancy": cost and cost.redundancy,
        "binding": cost and cost.binding,
        "ceiling": cost and cost.ceiling,
        "serial": cost and cost.serial,
        "bound": cost and cost.bound,
        "cycles": cost and cost.cycles[cost.binding],
        "per_kflop": per_kflop(body, flops, row.warps)["instructions"] if flops else None,
        "per_element": row.per_element,
        "budget": row.budget,
        "traffic": last and last.ratio,
        "intensity": roof[0] if roof else None,
        "attainable": roof[1] if roof else None,
        "error": None,
    }


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return str(value)


def text(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for the terminal: words to the left, numbers to the right."""
    cells = [[shown(v) for v in row] for row in rows]
    raw = [list(heads), *cells]
    widths = [max(len(r[i]) for r in raw) for i in range(len(heads))]
    numeric = [
        all(c[i] == "–" or c[i].replace(".", "", 1).lstrip("-").isdigit() for c in cells)
        for i in range(len(heads))
    ]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(r, widths, numeric, strict=True)
        ).rstrip()
        for r in raw
    ]
    return "\n".join(lines)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same as Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(shown(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def report(result: Result) -> str:
    """Everything a run found, as text."""
    parts = []
    for kernel in dict.fromkeys(r.kernel for r in result.rows if r.error is None):
        rows = [r for r in result.rows if r.kernel == kernel and r.error is None]
        parts.append(_of_kernel(kernel, rows, result.traffic))
    failed: dict[tuple[str, str], list[str]] = {}
    for r in result.rows:
        if r.error is not None:
            failed.setdefault((r.kernel, r.error), []).append(r.target)
    errors = [f"{kernel} {' '.join(on)}: {error}" for (kernel, error), on in failed.items()]
    parts.append("\n".join([*errors, *notes(result)]))
    if result.traffic:
        parts.append(_traffic(result))
    if result.checked:
        same: dict[tuple[str, str, str], list[str]] = {}
        for c in result.checked:
            same.setdefault((c.kernel, c.size, c.outcome), []).append(c.check)
        lines: list[list[Any]] = [[k, s, o, ", ".join(of)] for (k, s, o), of in same.items()]
        parts.append(text(["checked", "size", "outcome", "of"], lines))
    for f in result.findings:
        parts.append(f"{f.kernel}: {f.check} at {f.where or 'an unknown line'}: {f.what}")
    if result.numbers:
        parts.append(_numbers(result.numbers))
    if result.saved:
        lines = [[s.what, s.provider, round(s.bytes / 2**20, 2), s.shape] for s in result.saved]
        parts.append(text(["saved for backward by", "provider", "MiB", "shape"], lines))
    if result.host:
        lines = [[h.what, round(h.microseconds, 1), h.launches] for h in result.host]
        parts.append(text(["host cost of", "us", "launches"], lines))
    return "\n\n".join(filter(None, parts))


def notes(result: Result) -> list[str]:
    """What is to be said of rows, once for all targets of a kernel, and of the run."""
    of: dict[tuple[str, str], list[str]] = {}
    for row in result.rows:
        for note in row.notes:
            of.setdefault((row.kernel, note), []).append(row.target)
    return [f"{kernel} {' '.join(on)}: {note}" for (kernel, note), on in of.items()] + [
        *result.notes
    ]


def _numbers(found: Sequence[Number]) -> str:
    """The worst of all shapes for each op, dtype and tensor."""
    of: dict[tuple[str, str, str], list[Number]] = {}
    for n in found:
        of.setdefault((n.op, n.dtype, n.what), []).append(n)
    lines = []
    for (op, dtype, what), group in of.items():
        worst = max(group, key=lambda n: (not n.agrees, n.kernel / n.allowed))
        agree = sum(n.agrees for n in group)
        verdict = f"{agree} of {len(group)} agree"
        errors = [f"{e:.1e}" for e in (worst.kernel, worst.pytorch, worst.allowed)]
        lines.append([op, what, dtype, *errors, worst.shape, verdict])
    heads = ["error of", "in", "dtype", "kernel", "PyTorch", "allowed", "worst at", "shapes"]
    return text(heads, lines)


def _traffic(result: Result) -> str:
    """Each kernel's traffic at its largest size, and how it grew from the smallest."""
    from fastgpt.lab.traffic import growth

    chips = {r.target for r in result.rows}
    same: dict[tuple[str, str], list[Traffic]] = {}
    for one in result.traffic:
        same.setdefault((one.kernel, one.target), []).append(one)
    lines = []
    for (kernel, targets), found in same.items():
        first, last = found[0], found[-1]
        grows = growth(found, [t.least for t in found])[0] if first.least < last.least else None
        on = "all" if chips == set(targets.split()) else targets
        lines.append(
            [kernel, first.size, last.size, last.loaded, last.stored, last.least, first.ratio,
             last.ratio, grows, on]
        )  # fmt: skip
    heads = ["traffic of", "from", "to", "loaded", "stored", "least", "ratio", "to", "growth", "on"]
    return (
        text(heads, lines) + "\n(bytes; ratio of moved to least at both sizes; "
        "moved grows as the least to the power of growth)"
    )


def _of_kernel(kernel: str, rows: Sequence[Row], traffic: Sequence[Traffic]) -> str:
    """One kernel's table: a target a line; over it the variant, as far as all lines share it."""
    shared, own = _variants(rows)
    cells = [flat(r, traffic) for r in rows]
    columns = [
        *SHOWN,
        *(["spill_instructions"] if any(c["spill_instructions"] for c in cells) else []),
        *(["redundancy"] if any((c["redundancy"] or 1) > 1 for c in cells) else []),
        *(c for c in ("per_element", "budget", "traffic") if any(cell[c] for cell in cells)),
    ]
    varies = any(own)
    heads = [COLUMNS[c][0] for c in columns] + ["variant"] * varies
    lines = [
        [cell[c] for c in columns] + [mine] * varies for cell, mine in zip(cells, own, strict=True)
    ]
    table = text(heads, lines)
    return f"{kernel}  {shown(shared)}".rstrip() + "\n" + table


DOCUMENTED = (
    "target", "registers", "spills", "smem", "occupancy", "limited_by", "matrix", "redundancy",
    "binding", "ceiling", "serial", "bound", "per_element", "budget", "traffic",
)  # fmt: skip


def document(result: Result, command: str) -> str:
    """The rows as a page of Markdown: a table a kernel, under the command that made it."""
    parts = [
        "# Kernels as compiled",
        f"Made by `{command}` with Triton {result.versions['triton']}.",
    ]
    legend = [f"- {COLUMNS[c][0]}: {COLUMNS[c][1]}" for c in DOCUMENTED if c != "target"]
    parts += ["\n".join(legend), LIMITS]
    for kernel in dict.fromkeys(r.kernel for r in result.rows):
        rows = [r for r in result.rows if r.kernel == kernel]
        parts.append(f"## {kernel}")
        shared, own = _variants(rows)
        if shared:
            parts.append(f"`{shown(shared)}`")
        good = [r for r in rows if r.error is None]
        heads = [COLUMNS[c][0] for c in DOCUMENTED] + ["variant"] * any(own)
        cells = [
            [flat(r, result.traffic)[c] for c in DOCUMENTED] + [mine] * any(own)
            for r, mine in zip(rows, own, strict=True)
            if r.error is None
        ]
        if good:
            parts.append(markdown(heads, cells))
        parts += [f"{r.target}: {r.error}" for r in rows if r.error is not None]
    parts += notes(result)
    return "\n\n".join(parts) + "\n"


def _variants(rows: Sequence[Row]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the variants of all rows share, and for each row what it does not share."""
    shared = {
        name: value
        for name, value in rows[0].variant.items()
        if all(r.variant.get(name) == value for r in rows)
    }
    return shared, [{k: v for k, v in r.variant.items() if k not in shared} for r in rows]


def to_csv(result: Result) -> str:
    """The rows, one a line, all columns."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*COLUMNS, "variant", "error"])
    for row in result.rows:
        found = flat(row, result.traffic)
        cells = [found[c] for c in COLUMNS]
        variant = " ".join(f"{k}={v}" for k, v in row.variant.items())
        writer.writerow(["" if c is None else c for c in cells] + [variant, row.error or ""])
    return out.getvalue()


class _Absent:
    """Stands for what a row does not have: no comparison with it is broken."""

    def _holds(self, other: object) -> bool:
        return True

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _holds
    __hash__ = None  # type: ignore[assignment]


def check_rule(rule: str, traffic: bool) -> None:
    """That a gate is an expression of columns, and that those are known which it asks for.

    Args:
        traffic: whether traffic is counted.

    Raises:
        ValueError: it is not.
    """
    words = ("kernel", "target", "limited_by", "binding", "bound")
    evaluate(rule, {name: "" if name in words else 1 for name in COLUMNS})
    needs = [name for name in ("traffic", "intensity", "attainable") if name in rule]
    if needs and not traffic:
        raise ValueError(f"gate: {needs[0]} is counted --with traffic; got no traffic")


def gate(result: Result, rule: str) -> list[str]:
    """The rows that break a rule, each in one line; a kernel that did not compile breaks any.

    Args:
        rule: an expression of COLUMNS: "spills == 0 and smem <= limit". What a row does not have,
            as redundancy without products, breaks none.

    Raises:
        ValueError: the rule is no such expression, names what is no column, or asks for traffic
            that was not counted.
    """
    check_rule(rule, bool(result.traffic))
    broken = []
    for row in result.rows:
        values = flat(row, result.traffic)
        if row.error is not None:
            broken.append(f"{row.kernel} {row.target}: {row.error}")
            continue
        known = {name: values[name] for name in COLUMNS}
        if not evaluate(rule, {n: _Absent() if v is None else v for n, v in known.items()}):
            words = set(re.findall(r"\w+", rule)) - {"kernel", "target"}
            used = {name: value for name, value in known.items() if name in words}
            said = ", ".join(f"{n} {shown(v)}" for n, v in used.items())
            broken.append(f"{row.kernel} {row.target}: {said}")
    return broken


def compare(a: Sequence[Row], b: Sequence[Row], traffic: Sequence[Traffic] = ()) -> list[list[Any]]:
    """Two kernels, or one at two revisions: kernel, target, column, before, after, change.

    Rows are paired by kernel and target; a lone kernel on either side is paired with the other.
    Only columns that differ are listed.

    Raises:
        ValueError: nothing on one side has a partner on the other.
    """
    names_a, names_b = ({r.kernel for r in side} for side in (a, b))
    alone = len(names_a) == len(names_b) == 1
    pairs = [
        (x, y) for x in a for y in b if x.target == y.target and (alone or x.kernel == y.kernel)
    ]
    if not pairs:
        raise ValueError(
            f"lab: there is nothing to compare; got {', '.join(sorted(names_a))} "
            f"and {', '.join(sorted(names_b))}"
        )
    lines = []
    for x, y in pairs:
        before, after = flat(x, traffic), flat(y, traffic)
        name = x.kernel if x.kernel == y.kernel else f"{x.kernel} → {y.kernel}"
        for column in [*list(COLUMNS)[2:], "error"]:
            old, new = before[column], after[column]
            if shown(old) != shown(new):
                both = isinstance(old, (int, float)) and isinstance(new, (int, float)) and old
                change = f"{(new / old - 1) * 100:+.0f}%" if both else "–"
                lines.append([name, x.target, column, old, new, change])
    return lines
