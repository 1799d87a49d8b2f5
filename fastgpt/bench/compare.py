"""What moved between two runs beyond their noise."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastgpt.bench.result import TIMED, Row, Run
from fastgpt.bench.stats import ratio_interval

LEAST = 0.05
SAME = (
    "machine", "threads", "torch", "triton", "transformers", "liger-kernel", "ctranslate2",
    "llama-cpp-python", "cuda",
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """A row that differs; ratio is after over before.

    Attributes:
        worse: slower, larger, or no longer timed.
    """

    row: Row
    worse: bool
    said: str


def compare(before: Run, after: Run, least: float = LEAST) -> list[Moved]:
    """Times whose ratio is not 1 with 95 % certainty and by `least`, memory that differs by it.

    Args:
        before, after: rows are compared that both have.
        least: the smallest relative change that counts: between two runs a machine drifts by more
            than it does within one.
    """
    earlier = {row.key: row for row in before.rows}
    found = []
    for row in after.rows:
        old = earlier.get(row.key)
        if old is None:
            continue
        if old.state != row.state:
            if TIMED in (old.state, row.state):
                why = f": {row.why}" if row.why else ""
                said = f"was {old.state}, is {row.state}{why}"
                found.append(Moved(row, row.state != TIMED, said))
            continue
        if row.state == TIMED:
            found += _times(old, row, least)
            found += _bytes(old, row, least)
    return found


def _times(old: Row, new: Row, least: float) -> Iterator[Moved]:
    if not (old.median and new.median):
        return
    low, high = ratio_interval(old.samples, new.samples)
    ratio = new.median / old.median
    if low <= 1 <= high or 1 / (1 + least) <= ratio <= 1 + least:
        return
    speed = "slower" if ratio > 1 else "faster"
    said = (
        f"{speed}: {old.median * 1e3:.4g} ms -> {new.median * 1e3:.4g} ms,"
        f" x {ratio:.3f} [{low:.3f}, {high:.3f}]"
    )
    yield Moved(new, ratio > 1, said)


def _bytes(old: Row, new: Row, least: float) -> Iterator[Moved]:
    for name in ("peak_bytes", "resident_bytes", "saved_bytes"):
        a, b = getattr(old, name), getattr(new, name)
        if a and b is not None and abs(b - a) > least * a:
            what = name.replace("_", " ")
            said = f"{what}: {a / 2**20:.1f} MiB -> {b / 2**20:.1f} MiB, x {b / a:.3f}"
            yield Moved(new, b > a, said)


def differences(before: Run, after: Run) -> Iterator[str]:
    """What else is not the same, which may be the cause."""
    for name in SAME:
        a, b = (run.facts.get(name, "none") for run in (before, after))
        if a != b:
            yield f"not the same {name}: {a} -> {b}"
    for dtype in sorted(before.peaks.keys() & after.peaks.keys()):
        for name, what in (("gemm_flops", "product"), ("copy_bytes", "copy")):
            ratio = after.peaks[dtype][name] / before.peaks[dtype][name]
            if abs(ratio - 1) > LEAST:
                yield f"the machine's own {what} in {dtype}: x {ratio:.3f}"
    for run, which in ((before, "first"), (after, "second")):
        if not run.complete:
            yield f"the {which} run was stopped before its end"


def report(before: Run, after: Run, moved: list[Moved]) -> Iterator[str]:
    keys = [{row.key for row in run.rows} for run in (before, after)]
    yield f"{before.facts.get('commit', 'none')} -> {after.facts.get('commit', 'none')}"
    yield from differences(before, after)
    both = len(keys[0] & keys[1])
    others = len(keys[0] ^ keys[1])
    for one in moved:
        row = one.row
        yield f"{row.case}, {row.dtype}, {row.mode}, {row.provider}: {one.said}"
    yield (
        f"{both} rows in both, {others} in one of them;"
        f" {sum(m.worse for m in moved)} worse, {sum(not m.worse for m in moved)} better"
    )
