"""The figure of docs/benchmarks.md: forward products of docs/gpu.md under the roofline of an H100.

python -m examples.figures.roofline docs
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from fastgpt.lab.chips import chip

plt.rcParams |= {"svg.hashsalt": "fastgpt", "svg.fonttype": "none"}
ROW = re.compile(
    r"^\| (attention|ffn) \(([\d, ]+)\) \| (\S+) \| (\d+) \| \d+ \| (\d+), \d+ \|", re.M
)


def intensity(op: str, sizes: list[int]) -> float:
    """FLOPs over the least bytes of a forward pass in bfloat16."""
    if op == "attention":  # causal: half of 4 T T D; q, k, v and o
        B, T, H, D = sizes
        return 2 * B * H * T * T * D / (4 * B * T * H * D * 2)
    M, C = sizes  # x and y, and two weights of 4 C x C
    return 16 * M * C * C / (2 * (2 * M * C + 8 * C * C))


def main(folder: Path) -> None:
    h100 = chip("sm_90")
    peak, bandwidth = h100.peak("16-bit"), h100.bandwidth / 1e3
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    at = [2.0**n for n in range(4, 14)]
    roof = [min(peak, bandwidth * x) for x in sorted([*at, peak / bandwidth])]
    axes.loglog(sorted([*at, peak / bandwidth]), roof, "k", lw=1.5)
    colours = {"fastgpt": "C0", "flash": "C1", "cuDNN": "C2", "torch": "C3"}
    for op, sizes, who, _, rate in ROW.findall((folder / "gpu.md").read_text()):
        x = intensity(op, [int(n) for n in sizes.split(",")])
        mark = {"marker": "o" if op == "attention" else "s", "color": colours[who]}
        axes.plot(x, float(rate), ms=6, mfc=colours[who] if who == "fastgpt" else "none", **mark)
    for who, colour in colours.items():
        axes.plot([], [], "o", color=colour, mfc=colour if who == "fastgpt" else "none", label=who)
    axes.plot([], [], "ko", mfc="none", label="attention")
    axes.plot([], [], "ks", mfc="none", label="feed-forward")
    axes.text(24, 110, f"{bandwidth:.2f} TB/s", rotation=38)
    axes.text(3000, 1050, f"{peak:.0f} TFLOP/s")
    axes.set(ylim=(40, 1600), xlabel="FLOPs over the least bytes", ylabel="TFLOP/s, forward")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(folder / "roofline.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
