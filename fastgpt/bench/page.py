"""A run as one HTML file, in the manner of the lab's page: charts, sortable tables, no network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

import fastgpt.lab
from fastgpt.bench.plot import swept
from fastgpt.bench.result import TIMED, Row, Run
from fastgpt.bench.stats import fit
from fastgpt.lab import charts
from fastgpt.lab.cells import Cell, Table, number, percent, short, size
from fastgpt.lab.charts import HEIGHT, WIDTH, Axes
from fastgpt.lab.files import write_whole
from fastgpt.lab.page import breakable

COLOURS = 8  # of the style's
COLUMNS = [
    ("Who", "", False), ("What", "", False), ("Precision", "", False), ("Pass", "", False),
    ("ms", "median", True), ("from", "quartile", True), ("to", "quartile", True),
    ("Ratio", "to ours", True), ("TFLOP/s", "", True), ("GB/s", "", True),
    ("tokens/s", "", True), ("Of product", "", True), ("Of copy", "", True),
    ("Adds", "", True), ("Keeps", "", True), ("Process", "", True),
]  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A chart of what grows with a size, and what it says in words."""

    title: str
    drawing: Markup
    powers: Sequence[str]


def render(run: Run) -> str:
    """The page's text."""
    lab = Path(fastgpt.lab.__path__[0])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, lab]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    timed = [row for row in run.rows if row.state == TIMED and row.median]
    who = list(dict.fromkeys(row.provider for row in timed))
    return environment.get_template("bench.html").render(
        run=run,
        providers=[(name, n % COLOURS) for n, name in enumerate(who)],
        panels=list(panels(timed, who)),
        times=Table("times", "What was timed", COLUMNS, [_cells(row) for row in timed]),
        others=[row for row in run.rows if row.state != TIMED],
    )


def write(run: Run, path: Path) -> None:
    """Raises OSError if the folder is not there, or cannot be written."""
    write_whole(path, render(run))


def _cells(row: Row) -> list[Cell]:
    def milli(seconds: float | None) -> Cell:
        return short(None if seconds is None else seconds * 1e3)

    def memory(taken: int | None) -> Cell:
        return Cell() if taken is None else size(taken)

    return [
        Cell(row.provider), Cell(row.case), Cell(row.dtype), Cell(row.mode), milli(row.median),
        milli(row.low), milli(row.high), number(row.ratio, "{:.2f}"), short(row.tflops),
        short(row.gbytes), short(row.tokens_s), percent(row.of_gemm), percent(row.of_copy),
        memory(row.peak_bytes), memory(row.saved_bytes), memory(row.resident_bytes),
    ]  # fmt: skip


def panels(rows: Sequence[Row], who: Sequence[str]) -> list[Panel]:
    """Time and memory of what was timed at three sizes or more."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.what, row.dtype, row.mode, row.part), []).append(row)
    made = []
    for (what, dtype, mode, _), each in groups.items():
        along = swept(each)
        if along is None or len({row.sizes[along] for row in each}) < 3:
            continue
        for unit in ("ms", "MiB"):
            lines = {}
            for name in who:
                points = sorted(
                    (row.sizes[along], value)
                    for row in each
                    if row.provider == name and (value := _value(row, unit)) > 0
                )
                if len(points) > 1:
                    lines[name] = points
            if lines:
                title = ", ".join(dict.fromkeys((what, dtype, mode))) + f", {unit} along {along}"
                made.append(_panel(title, along, unit, lines, who))
    return made


def _value(row: Row, unit: str) -> float:
    return (row.median or 0) * 1e3 if unit == "ms" else (row.peak_bytes or 0) / 2**20


def _panel(
    title: str, along: str, unit: str, lines: dict[str, list[tuple[int, float]]],
    who: Sequence[str],
) -> Panel:  # fmt: skip
    every = [point for points in lines.values() for point in points]
    x, y = ([math.log10(p[n]) for p in every] for n in (0, 1))
    axes = Axes(min(x) - 0.1, max(x) + 0.1, min(y) - 0.15, max(y) + 0.15)
    parts = [charts.grid(axes, axes.x0, along, unit)]
    powers = []
    for name, points in lines.items():
        n = who.index(name)
        path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in points)
        marks = [Markup('<polyline points="{}"/>').format(path)]
        for a, b in points:
            marks.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(
                    axes.x(a), axes.y(b), f"{name}, {along} = {a}: {b:.4g} {unit}"
                )
            )
        parts.append(
            Markup('<g class="p p{} c{}">{}</g>').format(n, n % COLOURS, Markup("").join(marks))
        )
        found = fit(*zip(*points, strict=True))
        if found:
            powers.append(f"{name}: {along}^{found.power:.2f}")
    drawing = Markup(
        '<svg class="lines" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, f"{title}; {'; '.join(powers)}", Markup("").join(parts))
    return Panel(title, drawing, powers)
