"""A result as one HTML file that needs nothing else: no network, no fonts, no server.

Tables are built here as plain cells; page.html draws them, and escapes all that they say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path, PurePath

import jinja2
from markupsafe import Markup

from fastgpt.lab import cells, charts, cost
from fastgpt.lab.cells import Cell, Table, count
from fastgpt.lab.chips import CHIPS
from fastgpt.lab.files import write_whole
from fastgpt.lab.result import Line, Result, Row
from fastgpt.lab.table import notes


@dataclass(frozen=True)
class Section:
    """A heading, what to know about it, and tables."""

    id: str
    title: str
    text: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class View:
    """What is shown of one target only."""

    index: int
    target: str
    chip: str
    roofline: Markup | None
    legend: Table | None
    mix: Sequence["Mix"]
    counts: Table | None
    accesses: Table | None


@dataclass(frozen=True)
class Mix:
    """A bar: instructions of each of charts.GROUPS, in the main loop or the whole kernel."""

    row: Row
    variant: str
    counts: Sequence[int]

    @property
    def spoken(self) -> str:
        named = zip(charts.GROUPS, self.counts, strict=True)
        return ", ".join(f"{name} {n}" for name, n in named if n)


@dataclass(frozen=True)
class Source:
    """A kernel's lines, with the counts of every row that was compiled from it."""

    kernel: str
    columns: Sequence[tuple[int, Row, str]]
    files: Sequence[tuple[str, Sequence["SourceLine"]]]

    @property
    def targets(self) -> list[int]:
        return sorted({index for index, _, _ in self.columns})


@dataclass(frozen=True)
class SourceLine:
    """Attributes:
    gap: whether lines without instructions lie before it.
    counts: (share of the loop, in the loop, in the kernel) for each column.
    heat: for each target, from 0 to 1.
    """

    line: int
    text: str
    gap: bool
    counts: Sequence[tuple[float, int, int] | None]
    heat: dict[int, float] = field(default_factory=dict)


def views(result: Result, targets: Sequence[str], said: dict[int, str]) -> list[View]:
    """The charts of every target."""
    made = []
    for index, target in enumerate(targets):
        rows = [r for r in result.rows if r.target == target and r.error is None]
        chip = CHIPS.get(target)
        found = charts.points(rows, result.traffic, chip) if chip else []
        name = f"{target}, {chip.name}" if chip else target
        mixes = [
            Mix(row, said[id(row)], charts.mix(row.loop or row.whole))
            for row in rows
            if row.whole.instructions
        ]
        drawn = chip and result.traffic and any(p.drawn for p in found)
        columns = [("Kernel", "", False), ("Variant", "", False), ("All", "", True)]
        counts = Table(
            f"mix-{index}",
            f"Instructions by kind on {name}, as one warp issues them",
            columns + [(group, "", True) for group in charts.GROUPS],
            [
                [
                    Cell(m.row.kernel),
                    Cell(m.variant or "–"),
                    *map(count, (sum(m.counts), *m.counts)),
                ]
                for m in mixes
            ],
        )
        made.append(
            View(
                index,
                target,
                chip.name if chip else "",
                charts.roofline(found, chip) if chip and drawn else None,
                cells.legend(found, said, index, name) if drawn else None,
                mixes,
                counts if mixes else None,
                cells.accesses([m.row for m in mixes], said, index, name) if mixes else None,
            )
        )
    return made


def sources(rows: Sequence[Row], said: Sequence[str], targets: Sequence[str]) -> list[Source]:
    made = []
    for kernel in dict.fromkeys(row.kernel for row in rows if row.lines):
        # what two ops launch alike is shown once
        found = {
            (row.target, variant, row.lines): (targets.index(row.target), row, variant)
            for row, variant in zip(rows, said, strict=True)
            if row.kernel == kernel and row.lines
        }
        columns = list(found.values())
        made.append(Source(kernel, columns, _files(columns)))
    return made


def _files(
    columns: Sequence[tuple[int, Row, str]],
) -> list[tuple[str, list[SourceLine]]]:
    """The lines of all columns, by file: the kernel's own first, which has the most of them."""
    counted: list[dict[tuple[str, int], Line]] = []
    texts: dict[tuple[str, int], str] = {}
    weight: dict[str, int] = {}
    for _, row, _ in columns:
        counted.append({(line.file, line.line): line for line in row.lines})
        for line in row.lines:
            texts.setdefault((line.file, line.line), line.text)
            weight[line.file] = weight.get(line.file, 0) + line.whole

    def source_line(place: tuple[str, int], gap: bool) -> SourceLine:
        counts: list[tuple[float, int, int] | None] = []
        heat: dict[int, float] = {}
        for (target, row, _), lines in zip(columns, counted, strict=True):
            if (line := lines.get(place)) is None:
                counts.append(None)
                continue
            part, total = line.whole, row.whole.instructions
            if row.loop:
                part, total = line.loop, row.loop.instructions
            share = part / total if total else 0.0
            counts.append((share, line.loop, line.whole))
            most = max((ln.loop if row.loop else ln.whole) for ln in row.lines)
            heat[target] = max(heat.get(target, 0.0), part / most if most else 0.0)
        return SourceLine(place[1], texts[place], gap, counts, heat)

    made = []
    ordered = sorted(texts, key=lambda place: (-weight[place[0]], place))
    for file, places in groupby(ordered, key=lambda place: place[0]):
        group = list(places)
        gaps = [False, *(after[1] > before[1] + 1 for before, after in pairwise(group))]
        lines = [source_line(place, gap) for place, gap in zip(group, gaps, strict=True)]
        made.append(("/".join(PurePath(file).parts[-2:]), lines))
    return made


def sections(result: Result) -> list[Section]:
    """What follows the source, each only where there is something to say."""
    made = [
        Section(
            "traffic",
            "Memory traffic",
            "Counted access by access in the interpreter, masked lanes left out. Ratio is what is "
            "moved (loaded and stored) over the least possible, every distinct byte once. Growth "
            "is over the size in the line above: where moved outgrows least, data is loaded ever "
            "more often.",
            [cells.traffic(result.traffic)] if result.traffic else [],
        ),
        Section(
            "checks",
            "Checks and findings",
            "Every kernel runs on the CPU with each access watched: out of bounds, races between "
            "programs, memory read before it was written, the same bits twice.",
            cells.checks(result),
        ),
        Section(
            "numbers",
            "Numbers",
            "Against a float64 reference, a kernel may err at most twice what PyTorch errs at the "
            "same dtype, plus a small absolute term.",
            [cells.numbers(result.numbers)] if result.numbers else [],
        ),
        Section(
            "saved",
            "Memory kept for the backward pass",
            "Distinct storages that autograd holds between forward and backward, without the "
            "parameters. ◆ marks the least of a line.",
            [cells.saved(result)] if result.saved else [],
        ),
        Section(
            "host",
            "Host cost",
            "Time of the Python and PyTorch around the launches, on this machine's CPU, with a "
            "driver that launches nothing.",
            [cells.host(result)] if result.host else [],
        ),
    ]
    return [section for section in made if section.tables]


def breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break after its dots."""
    return Markup(".<wbr>").join(name.split("."))


def render(result: Result) -> str:
    """The page's text."""
    rows = result.rows
    said, targets = cells.variants(rows), list(dict.fromkeys(row.target for row in rows))
    compiled = [r for r in rows if r.error is None]
    seen = views(result, targets, {id(r): v for r, v in zip(rows, said, strict=True)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html").render(
        result=result,
        kernels=len({row.kernel for row in rows}),
        notes=notes(result),
        limits=cost.LIMITS,
        summary=cells.summary(rows, said) if rows else None,
        broken=sum(map(cells.breaks_rule, rows)),
        views=seen,
        # the first view with a roofline, else the first with anything
        shown=max(seen, key=lambda v: (v.roofline is not None, bool(v.mix)), default=None),
        groups=list(charts.GROUPS),
        cycles=cells.cycles(rows, said) if any(r.cost for r in compiled) else None,
        sources=sources(rows, said, targets),
        sections=sections(result),
    )


def write(result: Result, path: str | Path) -> None:
    """Write the page whole or not at all.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    write_whole(path, render(result))
