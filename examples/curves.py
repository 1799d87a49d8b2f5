"""The curves of a training run, from its log.jsonl.

python examples/curves.py runs/train curves.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

folder, png = sys.argv[1:]
lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
steps = [line for line in lines if "loss" in line]
held_out = [line for line in lines if "held_out_loss" in line]

at = [s["step"] for s in steps]
seen = [h["step"] for h in held_out]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
left.plot([s["tokens"] / 1e6 for s in steps], [s["loss"] for s in steps], lw=0.8, label="training")
per_step = steps[-1]["tokens"] / steps[-1]["step"]
left.plot(
    [n * per_step / 1e6 for n in seen], [h["held_out_loss"] for h in held_out],
    "o-", ms=3, label="held out",
)  # fmt: skip
left.set(xlabel="million tokens", title="loss, nats a token")
left.legend(frameon=False)
middle.plot(seen, [h["held_out_bits_per_byte"] for h in held_out], "o-", ms=3)
middle.set(xlabel="step", title="held out, bits a byte")
right.plot(at, [s["grad_norm"] for s in steps], lw=0.8, label="gradient norm")
rate = right.twinx()
rate.plot(at, [s["lr"] for s in steps], "C1", lw=1, label="learning rate")
rate.ticklabel_format(axis="y", scilimits=(0, 0))
right.set(xlabel="step", title="gradient norm; learning rate (orange)")
for axes in (left, middle, right):
    axes.grid(alpha=0.3)
figure.savefig(png, dpi=90)
