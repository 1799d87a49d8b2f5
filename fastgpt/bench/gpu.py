"""What `fastgpt bench --suite gpu` finds out about the GPU at hand, in under twenty minutes.

Every kernel is checked; every op and a training step is timed beside whoever else is here; then, in
the time that is left, tiles are tried. The first GPU of its kind needs no more than this command:
its page has the tables of docs/gpu.md, and rows to paste into kernels/tiles.py.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench import models, result
from fastgpt.bench.ops import OPS
from fastgpt.bench.run import Planned, Wanted, bench
from fastgpt.bench.show import Shown
from fastgpt.bench.worker import first_line
from fastgpt.tune import check, measured_row, tune
from fastgpt.tune_ops import DTYPES, TASKS

STEP, KERNELS = "training step", "kernels"
CHECKS, TILES = "Correctness", "Tiles"
LIMIT = 18 * 60  # seconds, after which no more tiles are tried
SHAPE = {"L": 1, "H": 1, "C": 16, "V": 32}


def gpu(
    wanted: Wanted, out: Path, shown: Shown, small: bool = False,
    say: Callable[[str], Any] = print,
) -> bool:  # fmt: skip
    """Check, time, try tiles; write all. Whether it came to its end.

    Args:
        small: sizes that take no time, for tests.

    Raises:
        ValueError, ImportError, OSError: before anything is measured.
    """
    shown.check()
    began = time.monotonic()
    notes = {CHECKS: checks(small, say)}
    if not bench(wanted, out, shown, plan(small), notes, say):
        return False
    run = result.read(out)
    run.notes[TILES] = tiles(out.with_suffix(".tiles.json"), began + LIMIT, small, say)
    result.write(run, out)
    shown.write(run)
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    return True


def plan(small: bool = False) -> list[Planned]:
    """A training step, and every op forward and backward."""
    step = models.sizes("step", "cuda")
    if small:
        step |= {"B": 1, "T": 8} | SHAPE
    found = [Planned("step", "bfloat16", step, ("step",), 20, part=STEP)]
    for op, module in OPS.items():
        for sizes in module.sizes("cuda")[: 1 if small else None]:
            if small:
                sizes = {n: min(v, {"B": 1, "H": 4}.get(n, 16)) for n, v in sizes.items()}
            found.append(Planned(op, "bfloat16", sizes, ("forward", "backward"), 20, part=KERNELS))
    return [replace(p, rounds=1) for p in found] if small else found


def checks(small: bool, say: Callable[[str], Any]) -> list[str]:
    """A line for each op and dtype: right, or what is wrong."""
    lines = []
    for op, task in TASKS.items():
        sizes = f":{','.join(f'{n}={v}' for n, v in task.small.items())}" if small else ""
        for name, dtype in DTYPES.items():
            try:
                wrong = check(op + sizes, dtype, "cuda")
            except Exception as error:  # whatever a compiler, a driver or a launcher raises
                wrong = first_line(error)
            lines.append(f"{op}, {name}: {wrong or 'right'}")
            say(lines[-1])
        torch.cuda.empty_cache()
    return lines


def tiles(file: Path, until: float, small: bool, say: Callable[[str], Any]) -> list[str]:
    """A row for each choice that was tried, as kernels/tiles.py would have it."""
    rows = []
    for op, task in TASKS.items():
        if time.monotonic() > until:
            rows.append(f"# {op}: no time was left; fastgpt tune {op}")
            continue
        sizes = f":{','.join(f'{n}={v}' for n, v in task.small.items())}" if small else ""
        try:
            found = tune(
                [op + sizes], rounds=1 if small else 10, candidates=1 if small else 6, path=file,
                device="cuda", say=say,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            rows.append(f"# {op}: {first_line(error)}")
            continue
        # of several parts of one choice, the last has them all
        rows += [measured_row(one) for one in {(t.function, t.key): t for t in found}.values()]
        torch.cuda.empty_cache()
    return rows
