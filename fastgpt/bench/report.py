"""A run as tables in Markdown, put between two lines of a page."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fastgpt.bench.result import ABSENT, TIMED, Row, Run
from fastgpt.bench.stats import Fit, fit
from fastgpt.lab.files import write_whole

MARKS = "<!-- begin: fastgpt bench -->", "<!-- end: fastgpt bench -->"


def parts(page: Path) -> tuple[str, str]:
    """What stands before and after the tables.

    Raises:
        ValueError: the page has not the two lines, in their order.
        OSError: it cannot be read.
    """
    head, begin, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"bench: --markdown {page} must have the lines {' and '.join(MARKS)}")
    return head, tail


def put(run: Run, page: Path) -> None:
    head, tail = parts(page)
    text = "\n".join(tables(run))
    write_whole(page, f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{tail}")


def tables(run: Run) -> Iterator[str]:
    f = run.facts
    versions = (f"{n} {f[n]}" for n in ("torch", *_packages(run)))
    yield f"Measured on {f.get('machine')}, {f.get('threads')} threads, {', '.join(versions)}."
    for dtype, peak in run.peaks.items():
        if dtype in ("float32", "bfloat16"):
            yield (
                f"A product in {dtype}: {peak['gemm_flops'] / 1e9:,.0f} GFLOP/s;"
                f" a copy, read and written: {peak['copy_bytes'] / 1e9:.1f} GB/s."
            )
    if not run.complete:
        yield "This run was stopped before its end."
    for part, rows in groupby(run.rows, lambda row: row.part):
        each = list(rows)
        if part.startswith("scaling"):
            continue
        yield ""
        yield f"### {(part or 'measured').capitalize()}"
        yield ""
        if part == "kernels":
            yield from kernels(each)
        elif each[0].kernels is not None or each[-1].kernels is not None:
            yield from steps(each)
        elif part == "start":
            yield from start(each)
        elif all(row.what in ("step", "decode", "prefill") for row in each):
            yield from whole(each)
        else:
            yield from ops(each)
        yield from unmeasured(each)
    for title, lines in run.notes.items():
        yield ""
        yield f"### {title}"
        yield ""
        if title == "Tiles":
            yield from ("```python", *lines, "```")
        else:
            yield from (f"- {line}" for line in lines)
    growing = [row for row in run.rows if row.part.startswith("scaling")]
    if growing:
        yield ""
        yield "### Scaling"
        yield ""
        yield from scaling(growing)
        yield from unmeasured(growing)


def _packages(run: Run) -> list[str]:
    after = list(run.facts)
    return after[after.index("commit") + 1 :] if "commit" in after else []


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.state == TIMED and row.median]


def unmeasured(rows: Sequence[Row]) -> Iterator[str]:
    """Who is not in a table, and why, each once."""
    said = {
        f"- {row.provider}{'' if row.state == ABSENT else f', {row.case}'}, {row.dtype}:"
        f" {row.state}, {row.why}"
        for row in rows
        if row.state != TIMED
    }
    if said:
        yield ""
        yield from sorted(said)


def start(rows: Sequence[Row]) -> Iterator[str]:
    yield "| what | seconds |"
    yield "|---|---|"
    for row in timed(rows):
        yield f"| `{row.provider}` | {row.median:.2f} |"


def whole(rows: Sequence[Row]) -> Iterator[str]:
    """tokens/s and memory, and each provider's best against ours."""
    yield (
        "| | precision | who | tokens/s | ms | memory, MiB | time : ours | memory : ours |"
        " of copy |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for sizes, each in groupby(rows, lambda row: row.sizes):
        here = timed(list(each))
        for row in here:
            ours = next((r for r in here if r.dtype == row.dtype and r.provider == "fastgpt"), None)
            yield (
                f"| {_short(sizes)} | {row.dtype} | {row.provider} | {row.tokens_s or 0:,.1f}"
                f" | {1e3 * (row.median or 0):,.1f} | {_mib(row.resident_bytes)} |"
                f" {_ratio(row, ours)} |"
                f" {_of(row.resident_bytes, ours.resident_bytes if ours else None)} |"
                f" {'' if row.of_copy is None else f'{row.of_copy:.0%}'} |"
            )
    best = list(_best(rows))
    if best:
        yield ""
        yield "Each at its best precision:"
        yield ""
        yield from best


def _best(rows: Sequence[Row]) -> Iterator[str]:
    for sizes, each in groupby(rows, lambda row: row.sizes):
        fastest: dict[str, Row] = {}
        for row in timed(list(each)):
            if (row.tokens_s or 0) > (getattr(fastest.get(row.provider), "tokens_s", 0) or 0):
                fastest[row.provider] = row
        ours = fastest.pop("fastgpt", None)
        if ours is None or not ours.tokens_s:
            continue
        for row in fastest.values():
            if row.tokens_s:
                memory = _of(ours.resident_bytes, row.resident_bytes)
                more = f"{ours.tokens_s / row.tokens_s:.2f}"
                yield (
                    f"- {_short(sizes)}: fastgpt ({ours.dtype}) has {more} times the tokens/s of"
                    f" {row.provider} ({row.dtype})"
                    + (f" in {memory} of its memory" if memory else "")
                )


def steps(rows: Sequence[Row]) -> Iterator[str]:
    """Of a GPU."""
    yield "| who | ms | tokens/s | peak GiB | kernels | ms the GPU works |"
    yield "|---|---|---|---|---|---|"
    for row in timed(rows):
        peak = "" if row.resident_bytes is None else f"{row.resident_bytes / 2**30:.2f}"
        yield (
            f"| {row.provider} | {1e3 * (row.median or 0):.1f} | {row.tokens_s or 0:,.0f} | {peak}"
            f" | {row.kernels} | {1e3 * (row.busy or 0):.1f} |"
        )


def kernels(rows: Sequence[Row]) -> Iterator[str]:
    """Of a GPU, microseconds; backward's products are twice forward's."""
    yield "| what | who | forward | backward | TFLOP/s | host |"
    yield "|---|---|---|---|---|---|"
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in timed(rows):
        found.setdefault((row.case, row.provider), {})[row.mode] = row
    for (case, provider), by in found.items():
        forward, backward = by.get("forward"), by.get("backward")
        rates = [f"{r.tflops:.0f}" for r in (forward, backward) if r and r.tflops is not None]
        host = "" if forward is None or forward.host is None else f"{forward.host * 1e6:.0f}"
        yield (
            f"| {case} | {provider} | {_micro(forward)} |"
            f" {_micro(backward)} | {', '.join(rates)} | {host} |"
        )


def _micro(row: Row | None) -> str:
    return "" if row is None or row.median is None else f"{row.median * 1e6:.0f}"


def ops(rows: Sequence[Row]) -> Iterator[str]:
    yield "| what | pass | who | ms | time : ours | of the machine's | adds, MiB | keeps, MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in timed(rows):
        share = row.of_gemm if row.of_gemm is not None else row.of_copy
        of = ""
        if share is not None:
            of = f"{share:.0%} of {'product' if row.of_gemm is not None else 'copy'}"
        yield (
            f"| {row.case} | {row.mode} | {row.provider} | {1e3 * (row.median or 0):.3g} |"
            f" {'' if row.ratio is None else f'{row.ratio:.2f}'} | {of} |"
            f" {_mib(row.peak_bytes)} | {_mib(row.saved_bytes)} |"
        )


def scaling(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "Seconds and bytes are fitted by c n^p over the larger half of the sizes, least squares of"
        " logarithms. Memory is what operators allocate at once, weights and inputs aside."
    )
    yield ""
    yield "| what | along | who | from | to | time ~ | memory ~ | MiB at the end |"
    yield "|---|---|---|---|---|---|---|---|"
    for (what, part), each in groupby(rows, lambda row: (row.what, row.part)):
        here = timed(list(each))
        along = part.split()[-1]
        for provider in dict.fromkeys(row.provider for row in here):
            line = [row for row in here if row.provider == provider]
            sizes = [row.sizes[along] for row in line]
            time = fit(sizes, [row.median or 0.0 for row in line])
            memory = fit(sizes, [float(row.peak_bytes or 0) for row in line])
            yield (
                f"| {what} | {along} | {provider} | {sizes[0]} | {sizes[-1]} |"
                f" {_power(along, time)} | {_power(along, memory)} | {_mib(line[-1].peak_bytes)} |"
            )


def _power(name: str, found: Fit | None) -> str:
    return "" if found is None else f"{name}^{found.power:.2f}"


def _short(sizes: dict[str, int]) -> str:
    return ", ".join(f"{n} {v}" for n, v in sizes.items() if n in ("B", "T", "N"))


def _mib(size: int | None) -> str:
    return (
        "" if size is None else f"{size / 2**20:,.1f}" if size < 2**30 else f"{size / 2**20:,.0f}"
    )


def _of(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.2f}" if part and whole else ""


def _ratio(row: Row, ours: Row | None) -> str:
    return "" if row.ratio is None or ours is None else f"{row.ratio:.2f}"
