"""The figures of docs/flash_attention.md, docs/layer_norm.md and docs/gelu.md, from the formulas.

python -m examples.figures.kernels docs
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

plt.rcParams |= {"svg.hashsalt": "fastgpt", "svg.fonttype": "none"}
FULL, EDGE, NONE = "#4c72b0", "#dd8452", "#eeeeee"


def tiles(T: int, block_m: int, block_n: int, left: int, right: int) -> list[list[str]]:
    """For each block of queries and of keys: full, edge (in the masked loop) or none."""
    t, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    see = (j <= t + right) & (j >= t - left)
    rows = []
    for m in range(0, T, block_m):
        blocks = [see[m : m + block_m, n : n + block_n] for n in range(0, T, block_n)]
        rows.append(["full" if b.all() else "edge" if b.any() else "none" for b in blocks])
    return rows


def square(axes: Axes, T: int, block_m: int, block_n: int, left: int, title: str) -> None:
    colours = {"full": FULL, "edge": EDGE, "none": NONE}
    for m, row in enumerate(tiles(T, block_m, block_n, left, 0)):
        for n, kind in enumerate(row):
            at = (n * block_n, m * block_m)
            axes.add_patch(Rectangle(at, block_n, block_m, fc=colours[kind], ec="white", lw=1.5))
    axes.plot([0, T], [0, T], "k", lw=0.8)
    if left < T:
        axes.plot([0, T - left], [left, T], "k", lw=0.8)
    axes.set(xlim=(0, T), ylim=(T, 0), aspect="equal", title=title, xlabel="key", ylabel="query")
    axes.set_xticks(range(0, T + 1, 256))
    axes.set_yticks(range(0, T + 1, 256))


def attention() -> Figure:
    figure: Figure
    figure, (one, two, three) = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    square(one, 1024, 128, 64, 1024, "causal, blocks of 128 x 64")
    square(two, 1024, 128, 64, 255, "a window of 256 keys")
    square(three, 1024, 128, 128, 1024, "who owns what")
    row, column = (0, 640), (256, 0)
    three.add_patch(Rectangle(row, 768, 128, fc="none", ec="black", lw=2.5))
    three.text(512, 704, "o, dq: a row", ha="center", va="center", color="white")
    three.add_patch(Rectangle((column[0], 256), 128, 768, fc="none", ec="black", lw=2.5, ls="--"))
    three.text(520, 900, "dk, dv: a column", ha="center", va="center", color="white")
    for colour, label in ((FULL, "loop without mask"), (EDGE, "masked loop"), (NONE, "skipped")):
        one.plot([], [], "s", color=colour, label=label)
    one.legend(loc="upper right", frameon=True, fontsize=8)
    return figure


def gelu() -> Figure:
    u = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    curves = {
        "gelu, tanh": torch.nn.functional.gelu(u, approximate="tanh"),
        "relu": torch.relu(u),
    }
    figure: Figure
    figure, (value, slope, error) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    x = u.detach()
    for name, y in curves.items():
        (grad,) = torch.autograd.grad(y.sum(), u)
        value.plot(x, y.detach(), label=name)
        slope.plot(x, grad, label=name)
    exact = torch.nn.functional.gelu(u)
    off = curves["gelu, tanh"] - exact
    error.plot(x, 1e4 * off.detach(), label="value")
    (d,) = torch.autograd.grad(torch.nn.functional.gelu(u, approximate="tanh").sum(), u)
    (e,) = torch.autograd.grad(exact.sum(), u)
    error.plot(x, 1e4 * (d - e), label="derivative")
    value.set(title="f(u)", xlabel="u")
    slope.set(title="f'(u)", xlabel="u")
    error.set(title="tanh form less erf form, in 1e-4", xlabel="u")
    for axes in (value, slope, error):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def variance_error(mean: float, N: int = 768, rows: int = 64) -> tuple[float, float]:
    """Relative errors of the variance in float32: E[x^2] - E[x]^2, and squares around the mean."""
    torch.manual_seed(0)
    x = (torch.randn(rows, N) + mean).float()
    truth = x.double().var(-1, correction=0)
    one = (x * x).mean(-1) - x.mean(-1) ** 2
    two = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)
    return relative(one, truth), relative(two, truth)


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((got - truth).abs() / truth).max())


def layer_norm() -> Figure:
    figure: Figure
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=[1.5, 1]
    )
    programs, rows = 4, 12
    colours = ["#4c72b0", "#dd8452", "#55a868", "#c44e52"]
    for r in range(rows):
        colour = colours[r % programs]
        left.add_patch(Rectangle((0, rows - 1 - r), 6, 0.85, fc=colour, alpha=0.75))
        left.text(
            3, rows - 0.6 - r, f"row {r}", ha="center", va="center", fontsize=7, color="white"
        )
    for p in range(programs):
        y = rows - 4 - p * 1.6
        left.add_patch(Rectangle((8.5, y), 6, 0.85, fc=colours[p]))
        words = f"partial sums of program {p}"
        left.text(11.5, y + 0.4, words, ha="center", va="center", fontsize=7, color="white")
        left.annotate(
            "", (8.4, y + 0.4), (6.1, rows - 0.6 - p - 4), arrowprops={"arrowstyle": "->"}
        )
        left.annotate("", (16.9, 5.9), (14.6, y + 0.4), arrowprops={"arrowstyle": "->"})
    left.add_patch(Rectangle((17, 5.5), 5, 0.85, fc="black"))
    left.text(19.5, 5.9, "dweight", ha="center", va="center", fontsize=8, color="white")
    left.text(3, -0.9, "dy * xhat, M rows", ha="center", fontsize=8)
    left.text(11.5, -0.9, "float32, P rows", ha="center", fontsize=8)
    left.text(19.5, -0.9, "a second kernel", ha="center", fontsize=8)
    left.set(xlim=(-0.5, 22.5), ylim=(-1.4, rows + 0.4), title="gradients of weight and bias")
    left.axis("off")
    means = [4.0**n for n in range(-1, 7)]
    errors = [variance_error(mean) for mean in means]
    right.loglog(means, [e[0] for e in errors], "o-", ms=3, label="E[x²] − E[x]²")
    right.loglog(means, [e[1] for e in errors], "o-", ms=3, label="around the mean (ours)")
    right.set(xlabel="mean / standard deviation", title="relative error of the variance, float32")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return figure


def main(folder: Path) -> None:
    figures = {"flash_attention": attention, "gelu": gelu, "layer_norm": layer_norm}
    for name, draw in figures.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
