"""A decoding step along the positions that are held, beside what reading them must cost.

    modelled(p) = measured(p_0) + (cache(p) - cache(p_0)) / bandwidth

cache(p) are the bytes of keys and values that a step attends to, bandwidth is that of a copy on the
same machine in the same run: a step that does nothing else that grows lies on that line.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench import timing
from fastgpt.bench.result import facts
from fastgpt.decoder import Decoder
from fastgpt.lab.files import write_whole
from fastgpt.model import GPT, GPTConfig

WINDOW = 256


@dataclass(frozen=True)
class Point:
    """Seconds of a step with so many positions held: median, quartiles, and as modelled.

    Attributes:
        cache: bytes of keys and values that it attends to.
        room: bytes that are set aside for all of them.
    """

    model: str
    position: int
    median: float
    low: float
    high: float
    modelled: float
    cache: int
    room: int


def measure(
    positions: Sequence[int], rounds: int, dtype: torch.dtype, device: str, config: GPTConfig
) -> list[Point]:
    """Time one row's step of a model of random weights, with and without a window.

    The rounds visit all positions in turn, so that what else the machine does meets them alike.
    """
    speed = timing.peaks(device, dtype)["copy_bytes"]
    points = []
    for window in (None, WINDOW):
        longest = max(positions) + 1
        shape = replace(config, block_size=longest, window=window)
        model = GPT(shape).to(device, dtype).eval()
        decoder = Decoder(model, 1)
        cache, token = decoder.cache, torch.zeros(1, dtype=torch.int64, device=device)
        for layer in range(shape.n_layer):
            cache.room(layer).normal_()
        times: dict[int, list[float]] = {p: [] for p in positions}
        for n in range(rounds + 2):
            for p in positions:
                cache.hold([p])
                taken = timing.seconds(partial(decoder.step, token), device)
                if n >= 2:
                    times[p].append(taken)
        read = {p: _bytes(shape, min(p + 1, window or p + 1), dtype) for p in positions}
        name = f"{_size(model)}{f', window {window}' if window else ''}"
        first = min(positions)
        for p in positions:
            low, median, high = statistics.quantiles(times[p], n=4)
            base = statistics.median(times[first])
            modelled = base + (read[p] - read[first]) / speed
            points.append(Point(name, p, median, low, high, modelled, read[p], cache.nbytes))
    return points


def _bytes(c: GPTConfig, seen: int, dtype: torch.dtype) -> int:
    return 2 * c.n_layer * seen * c.kv_heads * c.head_dim * dtype.itemsize


def _size(model: GPT) -> str:
    return f"GPT-2, {model.num_params() / 1e6:.0f} M"


def table(points: Sequence[Point]) -> list[str]:
    """Lines of markdown."""
    lines = [
        "| model | positions held | step, ms (quartiles) | modelled, ms | read of the cache, MB |"
        " room, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for p in points:
        lines.append(
            f"| {p.model} | {p.position} | {1e3 * p.median:.2f} ({1e3 * p.low:.2f} to"
            f" {1e3 * p.high:.2f}) | {1e3 * p.modelled:.2f} | {p.cache / 1e6:.1f} |"
            f" {p.room / 1e6:.1f} |"
        )
    return lines


def draw(points: Sequence[Point], file: Path) -> None:
    """Times along positions, as measured and as modelled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis: Any = figure.subplots()
    for name in dict.fromkeys(p.model for p in points):
        each = sorted((p for p in points if p.model == name), key=lambda p: p.position)
        x = [p.position for p in each]
        (line,) = axis.plot(
            x, [1e3 * p.median for p in each], marker="o", markersize=3, label=f"{name}, measured"
        )
        low, high = ([1e3 * getattr(p, n) for p in each] for n in ("low", "high"))
        axis.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        axis.plot(
            x, [1e3 * p.modelled for p in each], linestyle="--", linewidth=1,
            color=line.get_color(), label=f"{name}, modelled: the cache at a copy's bandwidth",
        )  # fmt: skip
    axis.set(xlabel="positions held", ylabel="ms a step", xscale="log", ylim=(0, None))
    axis.set_xticks(sorted({p.position for p in points}), sorted({p.position for p in points}))
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=120, format="png")


def run(
    positions: Sequence[int], rounds: int, dtype: torch.dtype, device: str,
    markdown: Path | None, png: Path | None, config: GPTConfig | None = None,
) -> None:  # fmt: skip
    """Measure, print the table, and write the page and the picture that are wanted."""
    points = measure(positions, rounds, dtype, device, config or GPTConfig.preset("gpt2"))
    lines = table(points)
    print("\n".join(lines))
    if markdown is not None:
        from fastgpt.bench.report import MARKS, parts

        head, tail = parts(markdown)
        f = facts(device)
        said = (
            f"Measured on {f.get('machine')}, {f.get('threads')} threads, torch {f['torch']},"
            f" {str(dtype).removeprefix('torch.')}, one row, random weights, {rounds} rounds."
        )
        text = "\n".join([said, "", *lines])
        write_whole(markdown, f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{tail}")
    if png is not None:
        draw(points, png)
