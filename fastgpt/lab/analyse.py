"""From launches and targets to rows: compile, disassemble, count, cost; side by side, cached."""

import hashlib
import json
import linecache
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import triton

from fastgpt.lab import chips, isa, revision
from fastgpt.lab.compile import compile_launch, present, resources
from fastgpt.lab.cost import budget, cost, occupancy, per_element
from fastgpt.lab.files import write_whole
from fastgpt.lab.launch import Launch, TensorArg, file_of, load_kernel
from fastgpt.lab.result import Line, Row, from_json, to_json

Job = tuple[Launch, str]


def analyse(launch: Launch, target: str) -> Row:
    """One kernel on one target. What keeps it from compiling is the row's error.

    Raises:
        ValueError: the target is not known.
    """
    chips.chip(target)
    try:
        with present(target):
            path = _cache_path(launch, target)
        row = _cached(path)
        if row is None:
            row = _analyse(launch, target)
            _store(path, row)
        return row
    except Exception as error:  # whatever a compiler, a tool or a kernel's module raises
        why = " ".join(str(error).split())
        if not isinstance(error, (ValueError, FileNotFoundError)):
            why = f"{type(error).__name__}: {why}"
        return Row(launch.name, target, shown(launch.variant), error=why)


def _analyse(launch: Launch, target: str) -> Row:
    chip = chips.chip(target)
    binary = compile_launch(launch, target)
    used, asm = resources(binary), binary.asm
    code = isa.disassemble(asm, target)
    loop = code.main_loop()
    whole = code.counts()
    inside = code.counts(loop.instructions) if loop else None
    with present(target):
        lines = _here(code.lines(loop), load_kernel(launch.kernel))
    body = inside or whole
    flops, redundancy = isa.loop_flops(asm, code, loop, used.warps)
    shares = _shares(launch, asm, code, used.warps * chip.warp_size, flops)
    notes = []
    if isa.warp_specialised(asm):
        notes.append("warp specialised: counts add up the parts, costs are no guide")
    in_loop = [line.line for line in lines if line.loop]
    return Row(
        kernel=launch.name,
        target=target,
        variant=shown(launch.variant),
        warps=used.warps,
        stages=getattr(binary.metadata, "num_stages", 0),
        registers=used.registers,
        spills=used.spills,
        spill_instructions=whole.kinds.get("spill_load", 0) + whole.kinds.get("spill_store", 0),
        shared=used.shared,
        shared_limit=chip.shared_limit,
        occupancy=occupancy(chip, used.registers, used.shared, used.warps),
        whole=whole,
        loop=inside,
        loop_lines=(min(in_loop), max(in_loop)) if in_loop else None,
        cost=cost(body, chip, used.warps, flops, redundancy, _products_of(body.matrix, flops)),
        lines=lines,
        per_element=shares,
        budget=(budget(chip, launch.elements.bytes) or None) if launch.elements else None,
        notes=tuple(notes),
    )


def _shares(
    launch: Launch, asm: Any, code: isa.Disassembly, threads: int, flops: int
) -> float | None:
    """Thread instructions an element, where the launch tells what it works through.

    Of a kernel with products only its main loop counts, and as many passes of it as the compiler
    unrolled.
    """
    if launch.elements is None:
        return None
    loop, said = code.main_loop(), launch.elements
    if flops and loop:
        asked = isa.asked_flops(asm, code, loop)
        if not said.loop or not asked:
            return None
        return len(loop.instructions) * threads / (said.loop * flops / asked)
    in_loops = set().union(*(one.instructions for one in code.loops))
    program = said.launch / math.prod(launch.grid or (1,))
    return per_element(len(code.instructions), len(in_loops), threads, program, said.loop)


def _here(lines: Iterable[Line], kernel: Any) -> tuple[Line, ...]:
    """Lines with the files of this checkout."""
    moved = []
    for line in lines:
        file = file_of(kernel, line.file, line.line)
        moved.append(replace(line, file=file, text=linecache.getline(file, line.line).strip()))
    return tuple(moved)


def _products_of(matrix: dict[str, int], flops: int) -> str:
    """The class of products that a stretch of code makes, as the chips' peaks name it."""
    names = " ".join(matrix)
    if (not matrix and flops) or re.search(r"_f32_\d+x\d+x\d+_?f32", names):
        return "fp32"
    if re.search(r"TF32|xf32|1684|\.TF", names):
        return "tf32"
    if re.search(r"E4M3|E5M2|fp8|bf8|\.S8|\.U8|i8|QGMMA|UTCQMMA|IMMA", names):
        return "8-bit"
    return "16-bit"


def shown(variant: dict[str, Any]) -> dict[str, Any]:
    """A variant in values that JSON has."""
    plain = (bool, int, float, str, type(None))
    return {
        k: v if isinstance(v, plain) else getattr(v, "name", None) or str(v)
        for k, v in variant.items()
    }


# Modules of the lab that no row depends on: they say what to compile, or show what came out.
_ASIDE = frozenset(
    "agreement cases cells charts child cli host interpret memory numbers page record revision "
    "sanitize table traffic workbench".split()
)


def _fingerprint() -> str:
    """Of everything that a row depends on besides the kernel."""
    files = sorted(f for f in Path(__file__).parent.glob("*.py") if f.stem not in _ASIDE)
    sources = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(sources + triton.__version__.encode()).hexdigest()


def _cache_path(launch: Launch, target: str) -> Path:
    """Where the row is kept: by source, arguments, options and target, beside Triton's own cache.

    Raises:
        ValueError: the kernel cannot be loaded.
    """
    kernel = load_kernel(launch.kernel)
    said = [_fingerprint(), target, launch.kernel, kernel.cache_key, launch.name]
    said += [f"{k}={v}" for k, v in sorted(launch.options.items())]
    for name, value in launch.args.items():
        if isinstance(value, TensorArg):
            value = (value.dtype, value.shape, value.strides, value.offset)
        said.append(f"{name}={value}")
    said.append(f"{launch.elements} {launch.grid if launch.elements else None}")
    key = hashlib.sha256("\n".join(said).encode()).hexdigest()
    return Path(triton.knobs.cache.dir) / "fastgpt-lab" / f"{key}.json"


def _cached(path: Path) -> Row | None:
    try:
        row: Row = from_json(Row, json.loads(path.read_text()))
        return row
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, row: Row) -> None:
    """Keep a row for the next run. A full or read-only disk costs that run time, not this a row."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(to_json(row)))


def rows(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[int, int, Row], None] | None = None,
    kernels: str | None = None,
) -> list[Row]:
    """Analyse every job in a pool of processes; results in the order of the jobs.

    A compiler that crashes takes its process along: the jobs that were under way are tried again,
    each in a process of its own, and the one that crashes becomes a row with an error.

    Args:
        workers: processes, by default one a core; 0 analyses in this process.
        progress: called with how many are done, of how many, and the row.
        kernels: a folder to take for `fastgpt.kernels`.
    """
    done: dict[int, Row] = {}

    def finish(at: int, row: Row) -> None:
        done[at] = row
        if progress:
            progress(len(done), len(jobs), row)

    if workers == 0 or len(jobs) == 0:
        for at, job in enumerate(jobs):
            finish(at, analyse(*job))
        return [done[at] for at in range(len(jobs))]
    workers = workers or len(os.sched_getaffinity(0))
    for at, row in _in_pool(list(enumerate(jobs)), workers, kernels):
        finish(at, row)
    for at in [n for n in range(len(jobs)) if n not in done]:
        launch, target = jobs[at]
        crashed = Row(
            launch.name, target, shown(launch.variant), error="the compiler crashed its process"
        )
        finish(at, next((row for _, row in _in_pool([(at, jobs[at])], 1, kernels)), crashed))
    return [done[at] for at in range(len(jobs))]


def _in_pool(
    jobs: list[tuple[int, Job]], workers: int, kernels: str | None
) -> Iterator[tuple[int, Row]]:
    """Rows as they come; ends early if a process dies."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgpt.lab.analyse"])
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (kernels,)) as pool:
        with _no_main():
            waiting: dict[Future[Row], int] = {pool.submit(analyse, *job): at for at, job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _no_main() -> Iterator[None]:
    """A process that starts inside does not import the main program, which may have no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(kernels: str | None) -> None:
    """In a new process of the pool."""
    if kernels:
        revision.take(kernels)
