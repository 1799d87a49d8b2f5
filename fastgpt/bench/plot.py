"""A PNG of a run: seconds and bytes along what was swept, or bars if nothing was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.bench.result import TIMED, Row
from fastgpt.bench.stats import fit


def needs_matplotlib() -> None:
    """Raises ImportError, in a line, if it is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "bench: --png needs the package matplotlib; pip install 'fastgpt-triton[bench]'"
        ) from None


def draw(rows: Sequence[Row], file: Path) -> None:
    """A panel for each op, dtype and mode, and one more for its memory if a size was swept.

    Lines have the quartiles as a band, and with three sizes or more the exponent by which they grow
    (`stats.fit`).
    """
    from matplotlib.figure import Figure

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.state == TIMED:
            groups.setdefault((row.what, row.dtype, row.mode, row.part), []).append(row)
    panels = []
    for key, each in groups.items():
        title = ", ".join(filter(None, key))
        panels.append((title, each, False))
        with_peak = [r for r in each if r.peak_bytes]
        if with_peak and swept(each):
            panels.append((title, with_peak, True))
    across = min(4, max(1, len(panels)))
    down = max(1, -(-len(panels) // across))
    figure = Figure(figsize=(4.6 * across, 3.6 * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, each, memory) in zip(axes.flat, panels, strict=False):
        axis.set_title(title, fontsize=9)
        along = swept(each)
        if along:
            _lines(axis, each, along, memory)
        else:
            _bars(axis, each)
    figure.savefig(file, dpi=120, format="png")


def swept(rows: Sequence[Row]) -> str | None:
    """The size with the most values, if any has more than one."""
    values = {n: len({r.sizes[n] for r in rows}) for n in rows[0].sizes}
    if not values:
        return None
    along = max(values, key=lambda n: values[n])
    return along if values[along] > 1 else None


def _bars(axis: Any, rows: list[Row]) -> None:
    for n, row in enumerate(reversed(rows)):
        middle, low, high = (1e3 * (value or 0.0) for value in (row.median, row.low, row.high))
        axis.barh(n, middle, xerr=[[middle - low], [high - middle]], capsize=3)
    axis.set_yticks(range(len(rows)), [r.provider for r in reversed(rows)], fontsize=7)
    axis.set_xlabel("ms, median and quartiles", fontsize=8)


def _lines(axis: Any, rows: list[Row], along: str, memory: bool) -> None:
    others = [n for n in rows[0].sizes if n != along and len({r.sizes[n] for r in rows}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        rest = [f"{n}={row.sizes[n]}" for n in others]
        lines.setdefault(", ".join([row.provider, *rest]), []).append(row)
    for label, each in lines.items():
        each.sort(key=lambda r: r.sizes[along])
        x = [r.sizes[along] for r in each]
        if memory:
            centre = [(r.peak_bytes or 0) / 2**20 for r in each]
        else:
            centre = [1e3 * (r.median or 0.0) for r in each]
        found = fit(x, centre) if len(x) > 2 else None
        if found:
            label = f"{label}, {along}^{found.power:.2f}"
        (line,) = axis.plot(x, centre, marker="o", markersize=3, linewidth=1, label=label)
        if not memory:
            lower, upper = ([1e3 * (getattr(r, n) or 0.0) for r in each] for n in ("low", "high"))
            axis.fill_between(x, lower, upper, alpha=0.2, color=line.get_color())
    ticks = sorted({r.sizes[along] for r in rows})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(along, fontsize=8)
    axis.set_ylabel("peak MiB" if memory else "ms, median and quartiles", fontsize=8)
    axis.legend(fontsize=6)
