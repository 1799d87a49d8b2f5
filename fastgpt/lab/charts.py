"""Drawings of the page: the roofline of a chip in SVG, and what its instructions are for.

Everything that came from outside passes through Markup.format, which escapes it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastgpt.lab.chips import Chip
from fastgpt.lab.result import Counts, Row, Traffic

# Kinds of instructions that the mix tells apart, in the order of its bars.
GROUPS = {
    "matrix": ("matrix",),
    "special functions": ("mufu",),
    "floating point": ("fp32", "fp64", "convert"),
    "integer": ("integer", "uniform"),
    "global memory": ("global_load", "global_store", "global_async", "atomic"),
    "shared memory": ("shared_load", "shared_store", "shuffle"),
    "spills": ("spill_load", "spill_store"),
    "control and rest": ("barrier", "control", "other"),
}


def mix(counts: Counts) -> list[int]:
    """Instructions of each of GROUPS; together they are all instructions."""
    return [sum(counts.kinds.get(kind, 0) for kind in kinds) for kinds in GROUPS.values()]


@dataclass(frozen=True)
class Point:
    """A kernel on a chip's roofline.

    Attributes:
        row: what was compiled; traffic: of its largest launch that was counted.
        speed: TFLOP/s that the binding pipe leaves, TB/s for a kernel without products.
        serial: the same with no overlap.
        low, high: FLOP/byte, if every access goes to memory, and if every byte goes once.
    """

    row: Row
    traffic: Traffic | None
    speed: float
    serial: float
    low: float | None = None
    high: float | None = None

    @property
    def products(self) -> bool:
        return self.row.cost is not None and self.row.cost.bound == "tensor"

    @property
    def drawn(self) -> bool:
        """Whether there is a place for it: products need an intensity, and both a speed."""
        return self.serial > 0 and (self.low is not None or not self.products)


def points(rows: Iterable[Row], traffic: Sequence[Traffic], chip: Chip) -> list[Point]:
    """Where the rows of one target stand.

    With products, TFLOP/s = useful FLOPs / cycles of the binding pipe x multiprocessors x clock.
    """
    found = []
    for row in rows:
        cost = row.cost
        if cost is None or not cost.ceiling:
            continue
        counted = [t for t in traffic if t.kernel == row.kernel and row.target in t.target.split()]
        most = max(counted, key=lambda t: t.moved, default=None)
        speed = cost.ceiling * chip.bandwidth / 1000
        low = high = None
        if cost.bound == "tensor":
            clocks = chip.multiprocessors * chip.clock_ghz / 1000
            speed = cost.useful_flops / cost.cycles[cost.binding] * clocks
            if most and most.flops and most.least:
                low, high = most.flops / most.moved, most.flops / most.least
        serial = speed * cost.serial / cost.ceiling
        found.append(Point(row, most, speed, serial, low, high))
    return found


def roofs(drawn: Iterable[Point], chip: Chip) -> dict[str, float]:
    """TFLOP/s of the products that the kernels make, by class; 16-bit in any case."""
    peaks = {name: chip.peak(name) for name in chip.products}
    made = {
        name
        for point in drawn
        if point.products and point.row.cost
        for name, peak in peaks.items()
        if math.isclose(point.speed / point.row.cost.ceiling, peak, rel_tol=0.01)
    }
    return {n: p for n, p in peaks.items() if n == "16-bit" or n in made}


WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46


@dataclass(frozen=True)
class Axes:
    """Two logarithmic axes, in powers of ten."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.x0) / (self.x1 - self.x0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def inside(self, x: float, y: float) -> bool:
        return LEFT + 8 < x < WIDTH - RIGHT - 8 and TOP + 8 < y < HEIGHT - BOTTOM - 8


def roofline(found: Sequence[Point], chip: Chip) -> Markup:
    """The chip's roofs and the numbered points under them; numbers are places in found, from 1.

    A point stands at the speed its binding pipe leaves and hangs down to its serial speed; it
    reaches from the intensity without any cache to that with a perfect one. Kernels without
    products have no intensity: they stand in the band at the left, at bandwidth x ceiling.
    """
    slope = chip.bandwidth / 1000  # TFLOP/s at 1 FLOP/byte
    peaks = roofs(found, chip)
    ridge = max(peaks.values()) / slope
    placed = [p for p in found if p.drawn]
    plain = [p for p in placed if not p.products]
    lows = [p.low for p in placed if p.low]
    start = math.log10(min([*lows, ridge / 10]) / 1.6)
    end = math.log10(max([ridge * 6, *(1.5 * p.high for p in placed if p.high)]))
    band = 0.7 if plain else 0.0
    at = {id(p): 10 ** (start + band * ((i + 0.5) / len(plain) - 1)) for i, p in enumerate(plain)}
    lowest = [p.serial * at.get(id(p), 1.0) for p in placed] + [slope * 10 ** (start - band)]
    axes = Axes(
        start - band, end, math.log10(min(lowest) / 1.6), math.log10(max(peaks.values()) * 1.9)
    )
    lines, labels = _roofs(axes, peaks, slope, chip)
    parts = [grid(axes, start, "intensity, FLOP per byte", "TFLOP/s"), lines]
    marks = [
        (number, p, axes.x(p.low or at[id(p)]), p.speed if p.products else p.speed * at[id(p)])
        for number, p in enumerate(found, 1)
        if p.drawn
    ]
    taken = [(x, axes.y(speed)) for _, _, x, speed in marks]
    # where the labels of the flat roofs stand
    taken += [
        (WIDTH - RIGHT - dx, axes.y(p) - 10) for p in peaks.values() for dx in range(0, 190, 10)
    ]
    for number, p, x, speed in marks:
        parts.append(_mark(axes, number, p, x, axes.y(speed), speed, taken))
    parts.append(labels)
    return Markup(
        '<svg class="roofline" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(
        WIDTH, HEIGHT,
        f"Roofline of {chip.name}: the numbers are those of the table that follows",
        Markup("").join(parts),
    )  # fmt: skip


def grid(axes: Axes, start: float, across: str, up: str) -> Markup:
    """Axes and what they say, a line at every power of ten, ticks at 2 to 9 times that."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    if axes.x0 < start:
        edge = axes.x(10**start)
        parts += [
            line("edge", edge, TOP, edge, bottom),
            text("middle", (LEFT + edge) / 2, bottom + 17, "no products"),
        ]
    for power in range(math.floor(start), math.floor(axes.x1) + 1):
        for value in (n * 10.0**power for n in range(1, 10)):
            if not start <= math.log10(value) <= axes.x1:
                continue
            x = axes.x(value)
            if value == 10.0**power:
                parts += [
                    line("grid", x, TOP, x, bottom),
                    text("middle", x, bottom + 17, f"{value:g}"),
                ]
            parts.append(line("axis", x, bottom, x, bottom + 4))
    for power in range(math.floor(axes.y0), math.floor(axes.y1) + 1):
        for value in (n * 10.0**power for n in range(1, 10)):
            if not axes.y0 <= math.log10(value) <= axes.y1:
                continue
            y = axes.y(value)
            if value == 10.0**power:
                parts += [
                    line("grid", LEFT, y, right, y),
                    text("end", LEFT - 8, y + 4, f"{value:g}"),
                ]
            parts.append(line("axis", LEFT - 4, y, LEFT, y))
    turned = '<text class="middle title" transform="translate(14 {:.0f}) rotate(-90)">{}</text>'
    parts += [
        line("axis", LEFT, bottom, right, bottom),
        line("axis", LEFT, TOP, LEFT, bottom),
        text("middle title", (axes.x(10**start) + right) / 2, HEIGHT - 8, across),
        Markup(turned).format((TOP + bottom) / 2, up),
    ]
    return Markup("").join(parts)


def _roofs(axes: Axes, peaks: dict[str, float], slope: float, chip: Chip) -> tuple[Markup, Markup]:
    """The lines, and their labels, which are drawn over the marks."""
    top, right = max(peaks.values()), WIDTH - RIGHT
    lines = [line("roof", LEFT, axes.y(slope * 10**axes.x0), axes.x(top / slope), axes.y(top))]
    labels = []
    for name, peak in peaks.items():
        y = axes.y(peak)
        lines.append(line("roof", axes.x(peak / slope), y, right, y))
        labels.append(text("end", right - 4, y - 6, f"{peak:,.0f} TFLOP/s, {name} products"))
    lean = math.degrees(math.atan2(axes.y(10) - axes.y(1), axes.x(10) - axes.x(1)))
    middle = 10 ** (0.4 * axes.x0 + 0.6 * math.log10(top / slope))
    turned = '<text class="middle" transform="translate({:.1f} {:.1f}) rotate({:.1f})">{}</text>'
    labels.append(
        Markup(turned).format(
            axes.x(middle) - 5, axes.y(slope * middle) - 7, lean, f"{chip.bandwidth:,.0f} GB/s"
        )
    )
    return Markup("").join(lines), Markup("").join(labels)


def _mark(
    axes: Axes, number: int, point: Point, x: float, y: float, speed: float,
    taken: list[tuple[float, float]],
) -> Markup:  # fmt: skip
    """A point, its reach, and its number where no other one is."""
    foot = axes.y(speed * point.serial / point.speed)
    parts = [line("reach", x, y, x, foot), line("reach", x - 4, foot, x + 4, foot)]
    if point.low and point.high:
        end = axes.x(point.high)
        parts += [line("reach", x, y, end, y), line("reach", end, y - 4, end, y + 4)]
    shape = '<circle cx="{0:.1f}" cy="{1:.1f}" r="4.5"/>'
    if not point.products:
        shape = '<path d="M{0:.1f} {1:.1f}m0-6 6 6-6 6-6-6z"/>'
    around = ((0, -14), (-13, -8), (13, 14), (-13, 8), (13, -12), (-18, 0), (0, 17), (-22, -16))
    free = [
        (x + dx, y + dy)
        for reach in (1, 1.7, 2.4)
        for dx, dy in ((dx * reach, dy * reach) for dx, dy in around)
        if axes.inside(x + dx, y + dy)
        and all(abs(x + dx - a) > 13 or abs(y + dy - b) > 12 for a, b in taken)
    ]
    a, b = free[0] if free else (x, y - 14)
    taken.append((a, b))
    if math.hypot(a - x, b - y) > 19:
        parts.append(line("leader", x, y, a, b))
    parts += [Markup(shape).format(x, y), text("middle number", a, b + 4, str(number))]
    row, unit = point.row, "TFLOP/s" if point.products else "TB/s"
    said = f"{number}. {row.kernel}: at most {point.speed:.3g} {unit}, serial {point.serial:.3g}"
    return Markup("<g><title>{}</title>{}</g>").format(said, Markup("").join(parts))


def line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(
        '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    ).format(name, x1, y1, x2, y2)  # fmt: skip


def text(name: str, x: float, y: float, said: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(name, x, y, said)
