"""The goals' table as text and as Markdown."""

from collections.abc import Sequence

from benchmarks.static.kernels import Line

MARKS = {True: "✓", False: "✗", None: "–"}


def shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def cell(line: Line) -> str:
    """ "17.1 : 19.5 ✗", ours and theirs."""
    figures = shown(line.ours) + (f" : {shown(line.theirs)}" if line.theirs is not None else "")
    return f"{figures} {MARKS[line.met]}"


def matrix(lines: Sequence[Line], targets: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A row a thing, size and goal; a column a chip."""
    heads = ["what", "size", "goal", *targets, "peers"]
    rows = []
    for key in dict.fromkeys((line.what, line.at, line.goal) for line in lines):
        here = {line.target: line for line in lines if (line.what, line.at, line.goal) == key}
        who = "; ".join(dict.fromkeys(line.who for line in here.values() if line.who))
        cells = [cell(here[t]) if t in here else "" for t in targets]
        rows.append([*key, *cells, who])
    return heads, rows


def summary(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Of each goal, how many are met of how many, and how many have nobody to be held against."""
    rows = []
    for goal in dict.fromkeys(line.goal for line in lines):
        met = [line.met for line in lines if line.goal == goal]
        rows.append([goal, str(met.count(True)), str(len(met) - met.count(None)),
                     str(met.count(None) or "")])  # fmt: skip
    return ["goal", "met", "of", "without a peer"], rows


def misses(lines: Sequence[Line]) -> list[str]:
    """What is not met, by how much and what binds, one line a thing and goal."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        if line.met is False:
            key = line.goal, line.what, line.at
            said.setdefault(key, []).append(f"{line.target} {line.short}")
    return [f"{what} {at}, {goal}: {', '.join(on)}" for (goal, what, at), on in said.items()]


Table = tuple[list[str], list[list[str]]]


def plain(lines: Sequence[Line]) -> Table:
    """Goals that have no chip, a row each."""
    rows = [
        [line.goal, line.what, line.at, shown(line.ours), shown(line.theirs), line.who,
         MARKS[line.met], line.short]
        for line in lines
    ]  # fmt: skip
    return ["goal", "what", "size", "ours", "theirs", "whose", "met", "by how much"], rows


def page(
    lines: Sequence[Line],
    compiled: Sequence[Line],
    compared: Sequence[Line],
    others: Sequence[Line],
    targets: Sequence[str],
    missing: dict[str, str],
) -> list[tuple[str, Table | list[str]]]:
    """Titles, and what stands under each: a table, or lines."""
    made: list[tuple[str, Table | list[str]]] = [("Goals met", summary(lines))]
    for family in ("attention", "layer norm", "rms norm", "embedding", "cross-entropy", "GEMM"):
        here = [line for line in compared if line.what.startswith(family)]
        if here:
            made.append((family[0].upper() + family[1:], matrix(here, targets)))
    if others:
        made.append(("Traffic, launches, memory, host", plain(others)))
    broken = [line for line in compiled if not line.met]
    made.append(
        (
            "Kernels that spill, do not fit or do not compile",
            [f"{b.what} {b.at} {b.target}: {b.short}" for b in broken] or ["none"],
        )
    )
    made.append(("Not met, by how much, and what binds", misses(compared) or ["none"]))
    if missing:
        made.append(("Not compared", [f"{who}: {why}" for who, why in missing.items()]))
    return made
