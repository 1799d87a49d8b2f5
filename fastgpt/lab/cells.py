"""The tables of the page as plain cells; page.html draws and escapes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from fastgpt.lab import charts
from fastgpt.lab.cost import per_kflop
from fastgpt.lab.result import Number, Result, Row, Traffic


@dataclass(frozen=True)
class Cell:
    """What a cell says; value is what a column of numbers is sorted by.

    Attributes:
        mark: "bad" breaks a rule, "good" keeps one that was tested, "most" is the row's largest.
        heat: from 0 to 1, the strength of its colour.
        span: columns that it takes.
    """

    text: str = "–"
    value: float | None = None
    mark: str = ""
    heat: float = 0.0
    span: int = 1


@dataclass(frozen=True)
class Table:
    """Columns are (name, unit, whether of numbers); the first cell of a row is its head."""

    id: str
    caption: str
    columns: Sequence[tuple[str, str, bool]]
    rows: Sequence[Sequence[Cell]]
    rules: Sequence[bool] = ()


def number(value: float | None, text: str = "{:,.4g}", mark: str = "", heat: float = 0) -> Cell:
    """A number, or a dash where there is none."""
    if value is None:
        return Cell()
    if not math.isfinite(value):
        return Cell(str(value), None, mark)
    return Cell(text.format(value), value, mark, heat)


def short(value: float | None, mark: str = "", heat: float = 0.0) -> Cell:
    """Three digits, or all those before the point."""
    large = value is not None and abs(value) >= 100
    return number(value, "{:,.0f}" if large else "{:.3g}", mark, heat)


def count(value: int, mark: str = "") -> Cell:
    return number(value, "{:,}", mark)


def percent(value: float | None, mark: str = "") -> Cell:
    return number(value, "{:,.0%}", mark)


def size(value: float) -> Cell:
    """Bytes, in the unit that suits them."""
    power = min(int(math.log2(value) // 10), 4) if value >= 1 else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return number(value, f"{value / 1024**power:,.{0 if power == 0 else 1}f} {unit}")


def variants(rows: Sequence[Row]) -> list[str]:
    """For each row, of its constexprs and options those that its kernel's rows do not share."""

    def said(row: Row) -> str:
        kin = [r.variant for r in rows if r.kernel == row.kernel and r.error is None]
        return " ".join(
            f"{name}={value}"
            for name, value in row.variant.items()
            if any(name not in v or v[name] != value for v in kin)
        )

    return [said(row) for row in rows]


def breaks_rule(row: Row) -> bool:
    return row.error is not None or row.spills > 0 or row.shared > row.shared_limit


def summary(rows: Sequence[Row], said: Sequence[str]) -> Table:
    columns = [
        *_head(said),
        ("Registers", "a thread", True), ("Spills", "B a thread", True),
        ("Shared", "KiB, of limit", True), ("Occupancy", "", True), ("limited by", "", False),
        ("Binding", "pipe", False), ("Ceiling", "", True), ("Serial", "", True),
        ("serial to", "ceiling", False), ("of peak", "", False), ("Redundancy", "", True),
        ("Warps", "", True), ("Matrix", "instructions", True), ("16-byte", "share", True),
    ]  # fmt: skip

    def cells(row: Row, head: list[Cell]) -> list[Cell]:
        if row.error is not None:
            why = f"does not compile: {row.error}"
            return [*head, Cell(why, None, "bad", span=len(columns) - len(head))]
        fits, c, body = row.occupancy, row.cost, row.loop or row.whole
        over = "bad" if row.shared > row.shared_limit else ""
        bar = Markup('<span class="range" style="--from:{:.1%};--to:{:.1%}"></span>')
        return [
            *head,
            count(row.registers),
            count(row.spills, "bad" if row.spills else ""),
            number(row.shared / 1024, f"{{:,.1f}} of {row.shared_limit / 1024:,.0f}", over),
            percent(fits.share if fits else None),
            Cell(fits.limited_by if fits else "–"),
            Cell(c.binding if c else "–"),
            percent(c.ceiling if c else None),
            percent(c.serial if c else None),
            Cell(bar.format(c.serial, c.ceiling) if c else ""),
            Cell(c.bound if c else "–"),
            number(c.redundancy if c else None, "{:.2f}"),
            count(row.warps),
            count(body.kinds.get("matrix", 0)),
            percent(row.whole.wide_share()),
        ]

    return Table(
        "summary-table",
        "Resources and ceilings, a row for each kernel and target",
        columns,
        [cells(row, head) for row, head in zip(rows, _heads(rows, said), strict=True)],
        [breaks_rule(row) for row in rows],
    )


def _head(said: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Columns that name a row; variants only where there are any."""
    names = ("Kernel", "Target", "Variant") if any(said) else ("Kernel", "Target")
    return [(name, "", False) for name in names]


def _heads(rows: Sequence[Row], said: Sequence[str]) -> list[list[Cell]]:
    return [
        [Cell(row.kernel), Cell(row.target), *([Cell(variant or "–")] if any(said) else [])]
        for row, variant in zip(rows, said, strict=True)
    ]


def legend(found: Sequence[charts.Point], said: dict[int, str], index: int, chip: str) -> Table:
    """What the numbers of a roofline stand for."""
    columns = [
        ("No.", "", True), ("Kernel", "", False), ("Variant", "", False),
        ("Intensity", "no cache", True), ("Intensity", "perfect cache", True),
        ("Counted at", "", False), ("Ceiling", "", True), ("At most", "TFLOP/s", True),
        ("Serial", "TFLOP/s", True), ("At most", "TB/s", True), ("Serial", "TB/s", True),
    ]  # fmt: skip

    def cells(place: int, p: charts.Point) -> list[Cell]:
        speeds = [short(p.speed), short(p.serial)]
        return [
            count(place),
            Cell(p.row.kernel),
            Cell(said[id(p.row)] or "–"),
            short(p.low),
            short(p.high),
            Cell(p.traffic.size if p.traffic else "–"),
            percent(p.row.cost.ceiling if p.row.cost else None),
            *(speeds + [Cell()] * 2 if p.products else [Cell()] * 2 + speeds),
        ]

    rows = [cells(place, p) for place, p in enumerate(found, 1)]
    return Table(f"roofline-{index}", f"Kernels on the roofline of {chip}", columns, rows)


def accesses(rows: Sequence[Row], said: dict[int, str], index: int, chip: str) -> Table:
    """Matrix instructions by opcode, memory accesses by bytes a lane, barriers."""
    columns = [
        ("Kernel", "", False), ("Variant", "", False), ("Matrix", "", False),
        ("Global", "loads", False), ("Global", "stores", False), ("Global", "to shared", False),
        ("Shared", "loads", False), ("Shared", "stores", False), ("Barriers", "", True),
    ]  # fmt: skip
    kinds = ("global_load", "global_store", "global_async", "shared_load", "shared_store")

    def cells(row: Row) -> list[Cell]:
        body = row.loop or row.whole
        opcodes = ", ".join(f"{name} × {n}" for name, n in sorted(body.matrix.items()))
        by_width = [
            ", ".join(
                f"{f'{width} B' if width else 'bulk'} × {n}"
                for width, n in sorted(body.widths.get(kind, {}).items(), reverse=True)
            )
            for kind in kinds
        ]
        texts = [row.kernel, said[id(row)], opcodes, *by_width]
        return [*(Cell(text or "–") for text in texts), count(body.kinds.get("barrier", 0))]

    caption = f"Matrix instructions, and memory accesses by bytes a lane, on {chip}"
    return Table(f"accesses-{index}", caption, columns, [cells(row) for row in rows])


PER_KFLOP = [("cycles", "per useful kFLOP", True), ("instructions", "per useful kFLOP", True)]


def cycles(rows: Sequence[Row], said: Sequence[str]) -> Table:
    pipes = list(dict.fromkeys(p for row in rows if row.cost for p in row.cost.cycles))
    products = any(row.cost and row.cost.useful_flops for row in rows)
    columns = [*_head(said), *(PER_KFLOP if products else [])]
    made = []
    for row, head in zip(rows, _heads(rows, said), strict=True):
        if row.cost is None:
            continue
        longest = max(row.cost.cycles.values(), default=0) or 1
        cells = [
            Cell()
            if (time := row.cost.cycles.get(pipe)) is None
            else short(time, "most" if pipe == row.cost.binding else "", time / longest)
            for pipe in pipes
        ]
        flops, longest = row.cost.useful_flops, row.cost.cycles[row.cost.binding]
        per = [Cell(), Cell()]
        if flops:
            issued = per_kflop(row.loop or row.whole, flops, row.warps)["instructions"]
            per = [short(longest * 1000 / flops), short(issued)]
        made.append([*head, *(per if products else []), *cells])
    caption = "Cycles of one multiprocessor for one program, by pipe"
    return Table("cycles-table", caption, columns + [(pipe, "", True) for pipe in pipes], made)


def traffic(rows: Sequence[Traffic]) -> Table:
    columns = [
        ("Kernel", "", False), ("Targets", "", False), ("Size", "", False),
        ("Loaded", "", True), ("Stored", "", True), ("Least", "", True), ("Ratio", "", True),
        ("Growth", "of moved", True), ("Growth", "of least", True), ("FLOP", "millions", True),
    ]  # fmt: skip
    made = []
    for _, group in groupby(rows, key=lambda t: (t.kernel, t.target)):
        before: Traffic | None = None
        for t in group:
            made.append(
                [
                    Cell(t.kernel),
                    Cell(t.target),
                    Cell(t.size),
                    *(size(n) for n in (t.loaded, t.stored, t.least)),
                    number(t.ratio, "{:.2f}"),
                    number(t.moved / before.moved if before and before.moved else None, "×{:.2f}"),
                    number(t.least / before.least if before and before.least else None, "×{:.2f}"),
                    short(t.flops / 1e6 if t.flops else None),
                ]
            )
            before = t
    return Table("traffic-table", "Bytes of one launch", columns, made)


def checks(result: Result) -> list[Table]:
    """What was run on each kernel, and what it showed."""
    ran = result.checked
    names = list(dict.fromkeys(c.check for c in ran))
    outcomes = {(c.kernel, c.size, c.check): c.outcome for c in ran}

    def cell(outcome: str | None) -> Cell:
        marks = {"clean": "good", "found": "bad"}
        return Cell() if outcome is None else Cell(outcome, None, marks.get(outcome, ""))

    made = []
    if result.findings:
        columns = [(name, "", False) for name in ("Kernel", "Check", "Where", "What")]
        rows = [
            [Cell(f.kernel), Cell(f.check), Cell(f.where or "–"), Cell(f.what, None, "bad")]
            for f in result.findings
        ]
        made.append(
            Table("findings-table", "Faults that running the kernels showed", columns, rows)
        )
    if ran:
        columns = [(name, "", False) for name in ("Kernel", "Size", *names)]
        rows = [
            [Cell(k), Cell(s or "–"), *(cell(outcomes.get((k, s, name))) for name in names)]
            for k, s in dict.fromkeys((c.kernel, c.size) for c in ran)
        ]
        made.append(Table("checks-table", "Checks and their outcome", columns, rows))
    return made


def numbers(found: Sequence[Number]) -> Table:
    columns = [
        ("Op", "", False), ("dtype", "", False), ("Shape", "", False), ("Of", "", False),
        ("Path", "", False), ("Error", "kernel", True), ("Error", "PyTorch", True),
        ("Allowed", "", True), ("Used", "of allowed", True), ("Verdict", "", False),
    ]  # fmt: skip
    rows = [
        [
            Cell(n.op),
            *(Cell(text or "–") for text in (n.dtype, n.shape, n.what, n.path)),
            *(number(error, "{:.2e}") for error in (n.kernel, n.pytorch, n.allowed)),
            percent(n.kernel / n.allowed if n.allowed else None),
            Cell("agrees", None, "good") if n.agrees else Cell("does not agree", None, "bad"),
        ]
        for n in found
    ]
    caption = "Largest errors against float64 at drawn shapes, and the tolerance law"
    return Table("numbers-table", caption, columns, rows)


def saved(result: Result) -> Table:
    providers = list(dict.fromkeys(s.provider for s in result.saved))
    held = {(s.what, s.shape, s.provider): s.bytes for s in result.saved}
    rows = []
    for what, shape in dict.fromkeys((s.what, s.shape) for s in result.saved):
        found = [held.get((what, shape, p)) for p in providers]
        least = min(b for b in found if b is not None)
        cells = [
            Cell() if b is None else Cell(size(b).text, b, "most" if b == least else "")
            for b in found
        ]
        rows.append([Cell(what), Cell(shape), *cells])
    columns = [("What", "", False), ("Shape", "", False), *((p, "", True) for p in providers)]
    return Table("saved-table", "Bytes kept from forward to backward", columns, rows)


def host(result: Result) -> Table:
    columns = [("What", "", False), ("Time", "µs", True), ("Launches", "", True)]
    rows = [
        [Cell(h.what), number(h.microseconds, "{:,.1f}"), count(h.launches)] for h in result.host
    ]
    return Table("host-table", "Python between a call and its launches", columns, rows)
