"""How errors against float64 grow with the context and the width, ours and PyTorch's.

    python -m benchmarks.error_growth --png docs/error_growth.png

The kernels run in Triton's interpreter, in float32 and float16, on inputs that are rounded to the
dtype first; PyTorch runs the reference in the same dtype. Error is the root mean square of the
difference to float64 over that of the values: forward, and the gradient of the input backward.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is decorated

import torch
from torch import Tensor

from fastgpt import ops, use

DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Growth:
    """One op at growing sizes.

    Attributes:
        name, along: of a panel and of its axis.
        sizes: what grows; make: inputs of a size, the first of which is differentiated.
        op, ref: ours and the specification.
    """

    name: str
    along: str
    sizes: tuple[int, ...]
    make: Callable[[int], dict[str, Tensor]]
    op: Callable[..., Tensor]
    ref: Callable[..., Tensor]


def growths(most: int | None = None) -> list[Growth]:
    """The panels; with most, only sizes up to it."""

    def cut(*sizes: int) -> tuple[int, ...]:
        return tuple(n for n in sizes if most is None or n <= most)

    def qkv(T: int) -> dict[str, Tensor]:
        return {name: torch.randn(1, T, 1, 64) for name in "qkv"}

    def rows(N: int) -> dict[str, Tensor]:
        return {"x": torch.randn(4, N) + 1, "weight": torch.rand(N) + 0.5, "bias": torch.randn(N)}

    def feed(C: int) -> dict[str, Tensor]:
        w1, w2 = torch.randn(64, C) * C**-0.5, torch.randn(16, 64) / 8
        return {"x": torch.randn(16, C), "w1": w1, "b1": torch.randn(64), "w2": w2}

    def logits(V: int) -> dict[str, Tensor]:
        return {"logits": 4 * torch.randn(4, V)}

    def ffn(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w1, b1, w2: f(x, w1, b1, w2, None)

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits: f(logits, torch.arange(logits.shape[0]), reduction="sum")

    return [
        Growth("attention", "context T", cut(16, 64, 256, 512), qkv, ops.attention,
               ops.attention_ref),
        Growth("layer norm", "width", cut(64, 768, 4096, 16384), rows, ops.layer_norm,
               ops.layer_norm_ref),
        Growth("feed-forward", "width", cut(64, 256, 1024), feed, ffn(ops.ffn),
               ffn(ops.ffn_ref)),
        Growth("cross-entropy", "vocabulary", cut(256, 4096, 50257), logits,
               loss(ops.cross_entropy), loss(ops.cross_entropy_ref)),
    ]  # fmt: skip


def errors(growth: Growth, size: int, dtype: torch.dtype) -> dict[tuple[str, str], float]:
    """By path, "kernel" or "PyTorch", and direction: relative error against float64."""
    torch.manual_seed(size)
    inputs = {name: t.to(dtype) for name, t in growth.make(size).items()}
    dy: Tensor | None = None
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, f, to in (
        ("float64", growth.ref, torch.float64), ("PyTorch", growth.ref, dtype),
        ("kernel", growth.op, dtype),
    ):  # fmt: skip
        leaves = {name: t.to(to).detach().requires_grad_() for name, t in inputs.items()}
        with use("triton" if path == "kernel" else "reference"):
            y = f(**leaves)
            dy = torch.randn_like(y).to(dtype) if dy is None else dy
            (dx,) = torch.autograd.grad(y, [next(iter(leaves.values()))], dy.to(y.dtype))
        found[path] = y.detach().double(), dx.double()
    gold = found.pop("float64")
    return {
        (path, way): ((got - want).square().mean() / want.square().mean()).sqrt().item()
        for path, both in found.items()
        for way, got, want in zip(("forward", "backward"), both, gold, strict=True)
    }


Series = dict[tuple[str, torch.dtype, str, str], list[float]]


def measure(panels: list[Growth], say: Callable[[str], None] = lambda what: None) -> Series:
    """Errors along the sizes of each panel, by panel, dtype, path and direction."""
    series: Series = {}
    for growth in panels:
        for size in growth.sizes:
            for dtype in DTYPES:
                say(f"{growth.name} {size} {dtype}")
                for (path, way), error in errors(growth, size, dtype).items():
                    series.setdefault((growth.name, dtype, path, way), []).append(error)
    return series


def worst(panels: list[Growth], series: Series) -> list[tuple[str, str, str, float, float]]:
    """Of each panel, dtype and direction at its largest size: the kernel's and PyTorch's error."""
    return [
        (g.name, str(dtype).removeprefix("torch."), way,
         series[g.name, dtype, "kernel", way][-1], series[g.name, dtype, "PyTorch", way][-1])
        for g in panels for dtype in DTYPES for way in ("forward", "backward")
    ]  # fmt: skip


def draw(panels: list[Growth], series: Series, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    for growth, axis in zip(panels, axes.flat, strict=False):
        for dtype, colour in zip(DTYPES, ("tab:blue", "tab:orange"), strict=True):
            for path, style in (("kernel", "-"), ("PyTorch", "--")):
                for way, mark in (("forward", "o"), ("backward", "s")):
                    values = series[growth.name, dtype, path, way]
                    label = f"{path}, {str(dtype).removeprefix('torch.')}, {way}"
                    axis.plot(growth.sizes, values, style, marker=mark, color=colour, label=label,
                              markersize=3, linewidth=1)  # fmt: skip
        axis.set(xscale="log", yscale="log", title=growth.name, xlabel=growth.along)
        axis.set_xticks(growth.sizes, [str(size) for size in growth.sizes])
        axis.set_xticks([], minor=True)
    figure.supylabel("relative error against float64")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=4, fontsize=7, loc="outside lower center")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="leave out larger sizes")
    parser.add_argument("--png", type=Path, help="draw them into this file; needs matplotlib")
    args = parser.parse_args()
    start = time.perf_counter()
    panels = growths(args.most)

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(what, file=sys.stderr)

    series = measure(panels, say)
    print("largest size of each; root mean square error against float64, relative")
    print(f"{'':14} {'dtype':8} {'':9} {'kernel':>8} {'PyTorch':>8}")
    for name, dtype, way, kernel, theirs in worst(panels, series):
        print(f"{name:14} {dtype:8} {way:9} {kernel:8.1e} {theirs:8.1e}")
    if args.png:
        draw(panels, series, args.png)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
