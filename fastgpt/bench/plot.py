"""A PNG of a run: seconds along what was swept, or bars if nothing was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.bench.result import TIMED, Row


def needs_matplotlib() -> None:
    """Raises ImportError, in a line, if it is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "bench: --png needs the package matplotlib; pip install 'fastgpt-triton[bench]'"
        ) from None


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel for each op, dtype and mode. Lines have the quartiles as a band."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.state == TIMED:
            panels.setdefault((row.what, row.dtype, row.mode), []).append(row)
    across = min(3, max(1, len(panels)))
    down = max(1, -(-len(panels) // across))
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, each) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(", ".join(title), fontsize=9)
        _panel(axis, each)
    figure.savefig(file, dpi=120, format="png")


def _panel(axis: Any, rows: list[Row]) -> None:
    varied = [n for n in rows[0].sizes if len({r.sizes[n] for r in rows}) > 1]
    if not varied:
        for n, row in enumerate(reversed(rows)):
            middle, low, high = (1e3 * (value or 0.0) for value in (row.median, row.low, row.high))
            axis.barh(n, middle, xerr=[[middle - low], [high - middle]], capsize=3)
        axis.set_yticks(range(len(rows)), [r.provider for r in reversed(rows)], fontsize=7)
        axis.set_xlabel("ms, median and quartiles", fontsize=8)
        return
    along = max(varied, key=lambda n: len({r.sizes[n] for r in rows}))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        rest = [f"{n}={row.sizes[n]}" for n in varied if n != along]
        lines.setdefault(", ".join([row.provider, *rest]), []).append(row)
    for label, each in lines.items():
        each.sort(key=lambda r: r.sizes[along])
        x = [r.sizes[along] for r in each]
        centre, lower, upper = (
            [1e3 * (getattr(r, n) or 0.0) for r in each] for n in ("median", "low", "high")
        )
        (line,) = axis.plot(x, centre, marker="o", markersize=3, linewidth=1, label=label)
        axis.fill_between(x, lower, upper, alpha=0.2, color=line.get_color())
    ticks = sorted({r.sizes[along] for r in rows})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(along, fontsize=8)
    axis.set_ylabel("ms, median and quartiles", fontsize=8)
    axis.legend(fontsize=6)
