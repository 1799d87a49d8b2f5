"""Measure tiles on the GPU at hand, and keep the fastest for this user.

    fastgpt tune                      # all ops at GPT-2's sizes
    fastgpt tune attention:D=128      # one op, other sizes

An op is run forward and backward, and every tile that its launchers ask for is varied: blocks and
warps halved and doubled, one stage more or less. A candidate counts only if it compiles, spills no
more than the table's tile, and gives values and gradients that err at most twice as much as
PyTorch's at that dtype, against float64. The rest are timed in turns, on a GPU by its events, with
the level 2 cache flushed before; a figure is a median. The fastest are written to the cache that
kernels look into from then on (fastgpt/ops/tuning.py).
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import backend, tuning
from fastgpt.tune_ops import TASKS, Sizes, Task

WINS = 0.98  # a candidate replaces the table's tile if it takes less than this part of its time
FACTOR, ATOL = 2.0, 1e-5
FLUSHED = 256 << 20  # bytes, more than any level 2 cache
Key = tuple[str, str]


@dataclass(frozen=True)
class Tuned:
    """What came of one tile: the fastest, its time and the table's, and how many were tried.

    Attributes:
        function, key: who chooses the tile, for which arguments.
        part: the kernel, where a choice is of several tiles.
        tile: the fastest.
        choice: what the function is to answer: the tile, or all of them with it.
        seconds, default_seconds: of the op, forward and backward, with it and with the table's.
        timed: candidates that were right, the table's too.
        rejected: the others, each with why.
    """

    function: str
    key: str
    part: str
    tile: Any
    choice: Any
    seconds: float
    default_seconds: float
    timed: int
    rejected: tuple[str, ...]

    def __str__(self) -> str:
        name = f"{self.function}({self.key}){'.' + self.part if self.part else ''}"
        gain = self.default_seconds / self.seconds
        return (
            f"{name}: {_short(self.tile)}, {self.seconds * 1e3:.4f} ms, x{gain:.2f};"
            f" {self.timed} timed, {len(self.rejected)} rejected"
        )


def tune(
    ops: Sequence[str] = (),
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    rounds: int = 20,
    candidates: int = 24,
    path: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Tuned]:
    """Time tiles of the ops' kernels and write the fastest to the user's cache.

    Args:
        ops: "attention" or, with other sizes, "attention:D=128,T=2048"; all of them without.
        dtype: of the tensors; bfloat16 on a GPU, float32 in the interpreter.
        device: "cuda"; or "cpu", with TRITON_INTERPRET=1, at tiny sizes: what it measures is the
            interpreter, is marked so, and never used on a GPU.
        rounds: how often each candidate is timed.
        candidates: the most that are tried for each tile, those nearest to the table's first.
        path: of the cache; without, FASTGPT_CACHE or the user's cache folder.
        say: is given each result as a line.

    Returns:
        What came of each tile.

    Raises:
        ValueError: there is no GPU, no such op or size, or the cache there is not ours.
        OSError: the cache cannot be written.
    """
    device = device or "cuda"
    gpu = _gpu(device)
    backend.look_for_measured_tiles()
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    for name, number in (("rounds", rounds), ("candidates", candidates)):
        if number < 1:
            raise ValueError(f"tune: {name} must be at least 1; got {number}")
    jobs = [_parse(said, device) for said in ops or TASKS]
    file = (Path(path) if path is not None else backend.TILES).expanduser()
    tuning.read(file)  # before minutes of work
    found: list[Tuned] = []
    for name, task, sizes in jobs:
        label = ", ".join(f"{k}={v}" for k, v in sizes.items())
        say(f"{name} {label}, {str(dtype).removeprefix('torch.')} on {gpu}")
        for one in _tune_op(name, task, sizes, dtype, device, rounds, candidates):
            found.append(one)
            say(f"  {one}")
            for why in one.rejected:
                say(f"    rejected {why}")
    _write(file, gpu, found)
    say(f"{len({(t.function, t.key) for t in found})} tiles in {file}")
    return found


def check(said: str, dtype: torch.dtype, device: str) -> str | None:
    """Whether an op's kernels are right here with the table's tiles, by the rule for candidates.

    Args:
        said: "attention" or, with other sizes, "attention:D=128,T=2048".

    Returns:
        What is off by more than PyTorch allows, None if nothing is.

    Raises:
        ValueError: no such op or size.
    """
    _, task, sizes = _parse(said, device)
    torch.manual_seed(0)
    judge = _Judge(task, sizes, dtype, device)
    return judge.wrong(judge.run())


def _gpu(device: str) -> str:
    """The name that tiles measured there go by."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "tune: needs a GPU; got none (with TRITON_INTERPRET=1, --device cpu times the"
                " interpreter)"
            )
        return torch.cuda.get_device_name()
    if device != "cpu":
        raise ValueError(f"tune: the device must be cuda or cpu; got {device!r}")
    if not backend.INTERPRET:
        raise ValueError(
            "tune: on the cpu kernels run in Triton's interpreter only; TRITON_INTERPRET must be 1"
        )
    return "cpu, Triton's interpreter"


def _parse(said: str, device: str) -> tuple[str, Task, Sizes]:
    name, _, rest = said.partition(":")
    if name not in TASKS:
        raise ValueError(f"tune: the op must be one of {', '.join(TASKS)}; got {name!r}")
    task = TASKS[name]
    sizes = dict(task.sizes if device == "cuda" else task.small)
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in sizes or not value.isdecimal() or int(value) < 1:
            raise ValueError(
                f"tune: {name} takes {', '.join(sizes)}, as NAME=NUMBER of at least 1; got {pair!r}"
            )
        sizes[key] = int(value)
    return name, task, sizes


def _tune_op(
    name: str, task: Task, sizes: Sizes, dtype: torch.dtype, device: str, rounds: int,
    candidates: int,
) -> Iterator[Tuned]:  # fmt: skip
    """One tile after the other, each with the best of those before it."""
    from fastgpt.kernels import tuned

    torch.manual_seed(0)
    try:
        judge = _Judge(task, sizes, dtype, device)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"tune: {name} and its float64 reference must fit the GPU's memory; give smaller sizes"
        ) from None
    with tuned.measured({}), tuned.listening() as heard:
        judge.run()
    best: dict[Key, Any] = {}
    asked = {(a.function, a.key): a.tile for a in heard if is_dataclass(a.tile)}
    for (function, key), tile in asked.items():
        parts = [f.name for f in fields(tile) if is_dataclass(getattr(tile, f.name))]
        for part in parts or [""]:
            now = best.get((function, key), tile)
            start = getattr(now, part) if part else now
            tried = {
                one: best | {(function, key): replace(now, **{part: one}) if part else one}
                for one in (start, *itertools.islice(near(start), candidates))
            }
            right, rejected = _right(judge, tried, start)
            if start not in right:
                raise ValueError(
                    f"tune: {name} is wrong with the table's own {function}({key}),"
                    f" {rejected[0]}; nothing was written"
                )
            times = _times(judge, {one: tried[one] for one in right}, device, rounds)
            fastest = min(times, key=lambda one: times[one])
            if times[fastest] > WINS * times[start]:
                fastest = start
            best = tried[fastest]
            yield Tuned(
                function, key, part, fastest, best[function, key], times[fastest], times[start],
                len(right), tuple(rejected),
            )  # fmt: skip


def near(tile: Any) -> Iterator[Any]:
    """Tiles that differ from one by halves and doubles, the least different first."""
    steps: dict[str, tuple[int, ...]] = {}
    for f in fields(tile):
        value = getattr(tile, f.name)
        if f.name == "num_stages":
            steps[f.name] = tuple(n for n in (value - 1, value, value + 1) if n >= 1)
        elif f.name == "num_warps":
            steps[f.name] = tuple(n for n in (value // 2, value, value * 2) if 1 <= n <= 16)
        elif isinstance(value, bool):
            steps[f.name] = (True, False) if value else (False,)
        elif isinstance(value, int):
            steps[f.name] = tuple(n for n in (value // 2, value, value * 2) if n >= 1)
    every = (
        replace(tile, **dict(zip(steps, values, strict=True)))
        for values in itertools.product(*steps.values())
    )

    def changes(one: Any) -> int:
        return sum(getattr(one, name) != getattr(tile, name) for name in steps)

    yield from sorted((one for one in every if one != tile), key=changes)


class _Judge:
    """Runs an op forward and backward, and says how far off it is."""

    def __init__(self, task: Task, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
        self.call, self.names = task.call, list(task.shapes(sizes))
        self.inputs = task.inputs(sizes, dtype, device)
        wide = {n: t.double() if n in self.names else t for n, t in self.inputs.items()}
        for name in self.names:
            self.inputs[name].requires_grad_()
            wide[name].requires_grad_()
        self.dy: Tensor | None = None
        with backend.use("reference"):
            theirs = self.results(self.inputs)
            self.gold = self.results(wide)
        self.allowed = [
            FACTOR * _off(t, gold) + ATOL * gold.abs().max().item()
            for t, gold in zip(theirs, self.gold, strict=True)
        ]

    def results(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The op's value, and its gradients by the inputs if it has any."""
        y = self.call(**inputs)
        if not y.requires_grad:
            return [y]
        if self.dy is None:
            self.dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, [inputs[n] for n in self.names], self.dy.to(y.dtype))
        return [y.detach(), *grads]

    def run(self) -> list[Tensor]:
        with backend.use("triton"):
            return self.results(self.inputs)

    def wrong(self, got: list[Tensor]) -> str | None:
        """What is off by more than is allowed, if anything."""
        for n, (t, gold, allowed) in enumerate(zip(got, self.gold, self.allowed, strict=True)):
            off = _off(t, gold)
            if not off <= allowed:
                what = f"the gradient of {self.names[n - 1]}" if n else "the value"
                return f"wrong: {what} is off by {off:.1e}, PyTorch allows {allowed:.1e}"
        return None


def _off(t: Tensor, gold: Tensor) -> float:
    return (t.double() - gold).abs().max().item() if gold.numel() else 0.0


def _right(judge: _Judge, tried: dict[Any, Any], start: Any) -> tuple[list[Any], list[str]]:
    """The candidates that compile, spill no more than start and are right; why the others not."""
    from fastgpt.kernels import tuned

    right, rejected = [], []
    allowed = None
    for one, tiles in tried.items():
        try:
            with tuned.measured(tiles), _spills() as spills:
                why = judge.wrong(judge.run())
            spilled = max(spills, default=0)
            if why is None and allowed is not None and spilled > allowed:
                why = f"spills {spilled} registers, the table's tile {allowed}"
            if one == start:
                allowed = spilled
        except Exception as error:  # whatever a compiler, a driver or a launcher raises
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if why is None:
            right.append(one)
        else:
            rejected.append(f"{_short(one)}: {why}")
    return right, rejected


@contextmanager
def _spills() -> Iterator[list[int]]:
    """Inside, how many registers each kernel that is launched spills."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    spills: list[int] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        binary = launch(self, *args, **kwargs)
        spills.append(getattr(binary, "n_spills", None) or 0)
        return binary

    JITFunction.run = run
    try:
        yield spills
    finally:
        JITFunction.run = launch


def _times(judge: _Judge, tried: dict[Any, Any], device: str, rounds: int) -> dict[Any, float]:
    """Median seconds of each candidate, run in turns."""
    from fastgpt.kernels import tuned

    times: dict[Any, list[float]] = {one: [] for one in tried}
    flush = torch.empty(FLUSHED if device == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(rounds):
        for one, tiles in tried.items():
            with tuned.measured(tiles):
                times[one].append(_seconds(judge.run, flush))
    return {one: statistics.median(t) for one, t in times.items()}


def _seconds(step: Callable[[], Any], flush: Tensor) -> float:
    if not flush.is_cuda:
        before = time.perf_counter()
        step()
        return time.perf_counter() - before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(2_000_000)  # the host has launched all before the device begins
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _write(file: Path, gpu: str, found: list[Tuned]) -> None:
    """Put what was found into the cache, beside what is there."""
    import json

    from fastgpt.kernels import tuned
    from fastgpt.lab.files import write_whole

    sets = tuning.read(file)
    own = tuning.versions(gpu)
    basis = f"measured on {gpu}, Triton {own['triton']}"
    here = next((s for s in sets if {n: s[n] for n in own} == own), None)
    if here is None:
        here = {**own, "tiles": []}
        sets.append(here)
    rows = {(row["function"], row["key"]): row for row in here["tiles"]}
    for one in found:  # of several parts of one choice, the last has them all
        rows[one.function, one.key] = {
            "function": one.function,
            "key": one.key,
            "tile": tuning.encode(_with_basis(one.choice, basis)),
            "seconds": one.seconds,
            "default_seconds": one.default_seconds,
        }
    here["tiles"] = [rows[at] for at in sorted(rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"fastgpt tiles": tuning.FORMAT, "sets": sets}, indent=1) + "\n")
    if torch.cuda.is_available():
        tuned.use_measured(tuning.measured_for(sets, torch.cuda.get_device_name()))


def measured_row(one: Tuned) -> str:
    """As a table of kernels/tiles.py would have it, with what speaks for it."""
    import triton

    basis = f"measured on {_gpu('cuda')}, Triton {triton.__version__}"
    gain = one.default_seconds / one.seconds
    return f"{one.function}({one.key}): {_with_basis(one.choice, basis)!r},  # x {gain:.2f}"


def _with_basis(tile: Any, basis: str) -> Any:
    """A tile, or several in one, that says what speaks for it."""
    parts = {
        f.name: _with_basis(getattr(tile, f.name), basis)
        for f in fields(tile)
        if is_dataclass(getattr(tile, f.name))
    }
    return replace(tile, **parts) if parts else replace(tile, basis=basis)


def _short(tile: Any) -> str:
    """A tile's numbers, those that a launch depends on."""
    numbers = [f"{f.name}={getattr(tile, f.name)}" for f in fields(tile) if f.name != "basis"]
    return " ".join(numbers)
