"""A result as the lab's page gets it, made up: kernels, chips, an error, hostile text."""

import math
from typing import TYPE_CHECKING, Any

from fastgpt.lab.chips import chip
from fastgpt.lab.result import (
    KINDS,
    Checked,
    Cost,
    Counts,
    Finding,
    HostCost,
    Line,
    Number,
    Occupancy,
    Result,
    Row,
    Saved,
    Traffic,
)

if TYPE_CHECKING:
    pass

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def counts(scale: int, matrix: int) -> Counts:
    kinds = dict.fromkeys(KINDS, 0) | {
        "matrix": matrix,
        "mufu": scale // 4 if matrix else 1,
        "fp32": 3 * scale,
        "convert": scale // 2,
        "integer": 2 * scale,
        "uniform": scale // 3,
        "global_load": 8,
        "global_store": 4,
        "shared_load": 12 if matrix else 2,
        "barrier": 2,
        "control": 3,
    }
    widths = {"global_load": {16: 7, 4: 1}, "global_store": {16: 4}}
    return Counts(kinds, {"HMMA.16816.F32.BF16": matrix} if matrix else {}, widths)


def lines(whole: Counts, loop: Counts | None, count: int) -> tuple[Line, ...]:
    made = []
    for i in range(count):
        share = (1 + i * 7 % 13) / (7 * count)
        text = f"    acc_{i} = tl.dot(q, k{i})  # if i < {i} and m_i[:, None] > -inf:"
        inside = int(share * loop.instructions) if loop and i > count // 3 else 0
        at = 100 + i + (10 if i > 9 else 0)
        text = text if i != 5 else f'    x = "{HOSTILE}"'
        made.append(
            Line("repo/kernels/k.py", at, text, int(share * whole.instructions) + 1, inside)
        )
    made.append(Line("lib/triton/standard.py", 290, "return core.reduce(x, axis)", 9, 0))
    return tuple(made)


def row(kernel: str, target: str, matrix: int, variant: dict[str, Any], count: int = 24) -> Row:
    scale = 40 + 13 * TARGETS.index(target) + len(kernel)
    loop = counts(scale, matrix) if matrix or "bwd" in kernel else None
    whole = counts(3 * scale, matrix)
    pipes = {"mufu": 3.0 * scale, "fp32": 2.5 * scale, "integer": 2.0 * scale, "issue": 5.0 * scale}
    if matrix:
        useful = 2 * 2**20
        ideal = useful / 2 / chip(target).rate("16-bit")
        cycles = {"tensor": ideal} | pipes
    else:
        useful, ideal = 0, 9.0 * scale
        cycles = {"tensor": 0.0} | pipes | {"dram": ideal}
    binding = max(cycles, key=lambda pipe: cycles[pipe])
    others = max(c for pipe, c in cycles.items() if c != ideal)
    made = Cost(
        cycles, binding, useful, 1.0, ideal / cycles[binding], ideal / (ideal + others),
        "tensor" if matrix else "bandwidth",
    )  # fmt: skip
    return Row(
        kernel, target, variant,
        warps=4, stages=3, registers=64 + scale, spills=128 if kernel == "ffn.spills" else 0,
        shared=(300 if kernel == "ffn.too_large" else 48) * 1024,
        shared_limit=chip(target).shared_limit,
        occupancy=Occupancy(3, 12, 0.19, "registers"),
        whole=whole, loop=loop, loop_lines=(110, 130) if loop else None, cost=made,
        lines=lines(whole, loop, count),
    )  # fmt: skip


def result() -> Result:
    """Kernels of every sort on four chips, one that does not compile, and hostile text."""
    why = f"k.py:12: <b>no</b> such op & more {HOSTILE}"
    rows = [Row("attention._ws_kernel", TARGETS[0], error=why)]
    for target in TARGETS:
        rows += [
            row("layer_norm._fwd_kernel", target, 0, {"BLOCK": 1024, "ROWS": 1}),
            row("layer_norm._bwd_kernel", target, 0, {"BLOCK": 1024}),
            row("attention._fwd_kernel", target, 64, {"BLOCK_M": 128, "D": 64, "CAUSAL": True}),
            row("attention._fwd_kernel", target, 96, {"BLOCK_M": 64, "D": 64, "CAUSAL": True}),
            row("attention._dkdv_kernel", target, 128, {"D": 64}),
            row("ffn.spills", target, 32, {}),
            row("ffn.too_large", target, 48, {}),
            row(f"evil.{HOSTILE}", target, 16, {"NAME": HOSTILE}, 8),
        ]
    everywhere = " ".join(TARGETS)
    traffic = [
        Traffic(kernel, everywhere, f"T={t}", t * t * 8, t * 128, t * 384, t * 128, t * t * flops)
        for kernel, flops in (
            ("attention._fwd_kernel", 128),
            ("attention._dkdv_kernel", 320),
            ("ffn.spills", 700),
            ("layer_norm._fwd_kernel", 0),
        )
        for t in (256, 512, 1024)
    ]
    ops = ("attention", "layer_norm", "ffn")
    return Result(
        versions={"fastgpt": "0.1.0", "triton": "3.7.1", "torch": "2.13.0"},
        rows=tuple(rows),
        traffic=tuple(traffic),
        checked=tuple(
            Checked(f"{op}._fwd_kernel", check, "clean" if op != "ffn" else "found", "T=128")
            for op in ops
            for check in ("bounds", "race", "poison")
        ),
        findings=(Finding("ffn._fwd_kernel", "race", "kernels/ffn.py:88", f"two {HOSTILE}"),),
        numbers=(
            Number("ffn", "f32", "(7, 64)", "y", math.nan, 1e-6, 2e-6, "reference"),
            Number("attention", "bf16", "(1, 67, 2, 64)", "dq", 3.1e-3, 2.2e-3, 5.0e-3, "kernel"),
            Number("attention", "f32", "(1, 67, 2, 64)", "dk", 9.1e-3, 2.2e-6, 5.0e-6, "kernel"),
        ),
        saved=(
            Saved("layer_norm", "8192 x 768", "fastgpt", 12_648_448),
            Saved("layer_norm", "8192 x 768", "pytorch", 25_231_360),
        ),
        host=(HostCost("layer_norm forward", 26.4, 1), HostCost("GPT block", 410.0, 9)),
        notes=("sm_75: fastgpt's kernels need compute capability 8.0",),
        seconds=41.0,
    )
