"""A plan as text for the terminal."""

from collections.abc import Sequence

from fastgpt.plan.best import MATTERS, Plan
from fastgpt.plan.measure import parameters
from fastgpt.plan.published import SLOWER
from fastgpt.plan.roofline import Estimate

HEADS = ("layout", "micro-batches", "GiB", "step s", "MFU <=", "tokens/s", "exposed", "binds")


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under heads: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in [heads, *rows]) for n in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def readable(x: float) -> str:
    """Three digits, and no powers of ten where there are more before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def row(e: Estimate) -> tuple[str, ...]:
    """An estimate under HEADS."""
    return (
        str(e.layout), str(e.accumulate), f"{e.bytes / 2**30:.1f}", f"{e.step:.4g}",
        f"{e.mfu:.1%}", f"{e.tokens_per_second:,.0f}", f"{e.network / e.step:.1%}", e.binds,
    )  # fmt: skip


def head(name: str, plan: Plan) -> str:
    """The model, the batch and the cluster."""
    c, best = plan.cluster, plan.best
    return (
        f"{name}: {parameters(plan.config) / 1e9:.4g} B parameters;"
        f" {best.tokens / 1e6:.3g} M tokens a step, {plan.T} a sequence\n"
        f"{c.name}: {c.gpus_per_node} a node; {c.peak_tflops:g} TFLOP/s, {c.bandwidth_gbs:g} GB/s,"
        f" {c.memory_gib:g} GiB; links of {c.intra_gbs:g} and {c.inter_gbs:g} GB/s"
    )


def report(name: str, plan: Plan, budget: float, top: int) -> str:
    """The best layout in full, and the next ones in a table."""
    best = plan.best
    shown = plan.rows[:top]
    return "\n".join((
        head(name, plan), "",
        f"best of {len(plan.rows)} layouts that fit {plan.gpus}: {best.layout}",
        *(f"  {line}" for line in details(best, budget)),
        f"  binds: {plan.binds}{_wished(plan)}", "",
        columns(HEADS, [row(e) for e in shown]), "", caution(),
    ))  # fmt: skip


def details(e: Estimate, budget: float) -> list[str]:
    """Memory, traffic and time of one layout."""
    used = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in e.memory.items())
    lines = [
        f"memory: {e.bytes / 2**30:.1f} of {e.cluster.usable / 2**30:.1f} GiB: {used}",
        *(
            f"sends: {flow.axis} {flow.kind}, {flow.bytes / 1e9:.3g} GB over the {flow.link}-node"
            f" link in {flow.seconds:.3g} s"
            for flow in e.flows
        ),
        f"step: at least {e.step:.4g} s: "
        + ", ".join(f"{part} {seconds:.3g}" for part, seconds in e.parts.items() if seconds),
        f"MFU: at most {e.mfu:.1%}; {e.tokens_per_second:,.0f} tokens/s;"
        f" {readable(budget / 1e9)} B tokens in {readable(e.days(budget))} days",
    ]
    if e.layout.pp > 1:
        lines.append("a pipeline on paper: fastgpt trains without one")
    return lines


def _wished(plan: Plan) -> str:
    if plan.wish is None or "memory" not in plan.binds.split(", "):
        return ""
    faster = plan.wish.tokens_per_second / plan.best.tokens_per_second
    assert faster > MATTERS
    return (
        f"; with {plan.wish.bytes / 2**30:.0f} GiB {plan.wish.layout} would be"
        f" {faster - 1:.0%} faster"
    )


def growth(name: str, plans: Sequence[Plan], budget: float) -> str:
    """The best layout for each number of devices."""
    heads = ("best layout", "devices", *HEADS[2:6], "days", "binds")
    rows = []
    for plan in plans:
        _, _, *numbers, _, _ = row(plan.best)
        days = readable(plan.best.days(budget))
        rows.append((str(plan.best.layout), str(plan.gpus), *numbers, days, plan.binds))
    return "\n".join((
        head(name, plans[0]), f"days are for {readable(budget / 1e9)} B tokens", "",
        columns(heads, rows), "", caution(),
    ))  # fmt: skip


def caution() -> str:
    """What the numbers are."""
    low, middle, high = SLOWER
    return (
        "Steps are bounds from below, MFU from above: published runs took"
        f" {low:g} to {high:g} times as long, {middle:g} in the median (docs/plan.md)."
    )
