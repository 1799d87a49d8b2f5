"""All that was asked for, one computation after the other, into one file."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.bench import models, result, timing
from fastgpt.bench.case import MODES, Case, Work
from fastgpt.bench.measure import FAULTS, Rounds, Setting, first_line
from fastgpt.bench.ops import OPS

DTYPES = {n: getattr(torch, n) for n in ("float32", "float16", "bfloat16")}


@dataclass(frozen=True)
class Wanted:
    """What to time.

    Attributes:
        what: ops and models.
        sweep: values of sizes; others are those of the first size that an op is timed at. Without,
            an op is timed at all of its sizes.
        modes: of MODES; a model has one of its own.
        providers: None is all.
        nanogpt: where nanoGPT's model.py is.
    """

    what: tuple[str, ...]
    device: str
    dtypes: tuple[str, ...]
    modes: tuple[str, ...] = MODES[:1]
    sweep: tuple[tuple[str, tuple[int, ...]], ...] = ()
    providers: tuple[str, ...] | None = None
    rounds: int = 20
    nanogpt: Path | None = None


@dataclass(frozen=True)
class Planned:
    """One computation in one dtype, not yet made."""

    what: str
    dtype: str
    sizes: dict[str, int]

    @property
    def module(self) -> ModuleType | None:
        return OPS.get(self.what)


def plan(wanted: Wanted) -> list[Planned]:
    """What will be timed, in this order.

    Raises:
        ValueError: no such op, or none of them has a size that is swept.
    """
    known = (*OPS, *models.MODELS)
    for what in wanted.what:
        if what not in known:
            raise ValueError(f"bench: OP must be one of {', '.join(known)}; got {what!r}")
    defaults = {w: _sizes(w, wanted.device) for w in dict.fromkeys(wanted.what)}
    names = {name for each in defaults.values() for name in each[0]}
    for name, _ in wanted.sweep:
        if name not in names:
            raise ValueError(
                f"bench: --sweep takes the sizes {', '.join(sorted(names))} of"
                f" {', '.join(defaults)}; got {name!r}"
            )
    found = []
    for dtype in wanted.dtypes:
        for what, each in defaults.items():
            swept = {n: values for n, values in wanted.sweep if n in each[0]}
            if swept:
                product = itertools.product(*swept.values())
                each = [each[0] | dict(zip(swept, values, strict=True)) for values in product]
            found += [Planned(what, dtype, sizes) for sizes in each]
    return found


def _sizes(what: str, device: str) -> list[dict[str, int]]:
    if what in models.MODELS:
        return [models.sizes(what, device)]
    return list(OPS[what].sizes(device))


def make(planned: Planned, device: str, nanogpt: Path | None = None) -> Work:
    """The computation on a device; its inputs are the same each time."""
    torch.manual_seed(0)
    dtype = DTYPES[planned.dtype]
    if planned.module is None:
        return models.Model(planned.what, device, dtype, planned.sizes, nanogpt)
    made: Case = planned.module.case(device, dtype, **planned.sizes)
    return made


def fake(planned: Planned, device: str = "cpu") -> tuple[FakeTensorMode, Case]:
    """An op's case that takes no memory."""
    assert planned.module is not None
    mode = FakeTensorMode()
    with mode:
        return mode, planned.module.case(device, DTYPES[planned.dtype], **planned.sizes)


def providers_of(wanted: Wanted, planned: Sequence[Planned]) -> set[str]:
    """The providers that are asked for; names are taken in any case, - for a space.

    Raises:
        ValueError: one that none of what is planned has.
    """
    known: dict[str, str] = {}
    for one in {p.what: p for p in planned}.values():
        usual = Planned(one.what, one.dtype, _sizes(one.what, wanted.device)[0])
        work = fake(usual)[1] if one.module else make(usual, wanted.device, wanted.nanogpt)
        known |= {_plain(name): name for name in (*work.offers, *work.absent)}
    if wanted.providers is None:
        return set(known.values())
    for name in wanted.providers:
        if _plain(name) not in known:
            raise ValueError(
                f"bench: --providers must be of {', '.join(sorted(known))}; got {name!r}"
            )
    return {known[_plain(name)] for name in wanted.providers}


def _plain(name: str) -> str:
    return name.lower().replace(" ", "-")


def too_large(planned: Planned, device: str, mode: str) -> Callable[[str], str | None]:
    """For a provider of an op: that its tensors would not fit into the memory that is free.

    On a CPU they are counted in a run on fake tensors, but not those of compiled code; on a GPU,
    where running out is an error that can be caught, only the inputs and their gradients are.
    """
    fakes, case = fake(planned)
    given = case.input_bytes * (1 if mode == "forward" else 3)

    def asked(provider: str) -> str | None:
        need = given
        if device == "cpu" and not provider.endswith("compiled"):
            with fakes:
                try:
                    peak = timing.peak_bytes(lambda: case.start(provider, mode)(), "cpu")
                    need = case.input_bytes + peak
                except FAULTS:  # an operator that fake tensors lack
                    pass
        free = timing.free_bytes(device)
        if need <= free:
            return None
        return f"needs at least {need / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"

    return asked


class Session:
    """A run under way. `rows` holds what is measured; it can be stopped at any time."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.planned = plan(wanted)
        self.providers = providers_of(wanted, self.planned)
        self.facts = result.facts(wanted.device)
        self.peaks: dict[str, dict[str, float]] = {}
        self.rows: list[result.Row] = []

    def result(self, complete: bool) -> result.Run:
        return result.Run(self.facts, self.peaks, self.rows, complete)

    def run(self, say: Callable[[str], None], done: Callable[[], None]) -> None:
        """Measure all; done is called after each computation, in each mode.

        Args:
            say: is told what comes next, `steps` times at most.
        """
        device = self.wanted.device
        for dtype in self.wanted.dtypes:
            say(f"this machine's peaks, {dtype}")
            self.peaks[dtype] = timing.peaks(device, DTYPES[dtype])
        for planned in self.planned:
            setting = Setting(
                device, DTYPES[planned.dtype], self.wanted.rounds, self.peaks[planned.dtype]
            )
            for rounds in self._each(planned, setting):
                before = len(self.rows)
                try:
                    for what in rounds.run():
                        say(what)
                finally:
                    self.rows[before:] = rounds.rows()
                done()

    @property
    def steps(self) -> int:
        """About how many times `run` says something."""
        count = len(self.wanted.dtypes)
        for planned in self.planned:
            modes = 1 if planned.module is None else len(self.wanted.modes)
            count += modes * (2 * len(self.providers) + self.wanted.rounds)
        return count

    def _each(self, planned: Planned, setting: Setting) -> Iterator[Rounds]:
        """The rounds of one computation, by mode."""
        device = self.wanted.device
        try:
            if planned.module is None:
                model = make(planned, device, self.wanted.nanogpt)
                assert isinstance(model, models.Model)
                free = timing.free_bytes

                def large(provider: str) -> str | None:
                    need, there = model.bytes_needed, free(device)
                    if need <= there:
                        return None
                    return (
                        f"needs at least {need / 2**30:.1f} GiB; {there / 2**30:.1f} GiB are free"
                    )

                yield Rounds(model, planned.what, self.providers, setting, large)
                model.close()
                return
            asked = {m: too_large(planned, device, m) for m in self.wanted.modes}
            inputs = fake(planned)[1]
            nothing_fits = inputs.input_bytes > timing.free_bytes(device)
            work = inputs if nothing_fits else make(planned, device)
        except FAULTS as error:
            for mode in self.wanted.modes:
                self.rows.append(
                    result.Row(
                        planned.what, planned.sizes, planned.dtype, mode, "every provider",
                        result.FAILED, first_line(error),
                    )
                )  # fmt: skip
            return
        for mode in self.wanted.modes:
            if mode in work.modes:
                yield Rounds(work, mode, self.providers, setting, asked[mode])


def bench(wanted: Wanted, out: Path, png: Path | None, say: Callable[[str], Any] = print) -> bool:
    """Measure, print and write; whether it came to its end and was not stopped.

    Raises:
        ValueError, ImportError, OSError: before anything is measured.
    """
    if png is not None:
        from fastgpt.bench import plot

        plot.needs_matplotlib()
    if not out.parent.is_dir():
        raise ValueError(f"bench: --out must lie in a folder that is there; got {out}")
    session = Session(wanted)
    for key, value in session.facts.items():
        say(f"{key:14} {value}")
    say("medians (quartiles); ratios of times in one round, and where their median is, 95 % sure")
    bar = _Bar(session.steps)
    complete, shown = False, 0
    absent: set[str] = set()

    def done() -> None:
        nonlocal shown
        new = session.rows[shown:]
        for line in result.table([r for r in new if r.provider not in absent]):
            bar.write(line, say)
        absent.update(r.provider for r in new if r.state == result.ABSENT)
        shown = len(session.rows)
        result.write(session.result(False), out)

    try:
        session.run(bar.step, done)
        complete = True
    except KeyboardInterrupt:
        done()
    finally:
        bar.close()
    for dtype, found in session.peaks.items():
        say(
            f"peaks, {dtype}: product {found['gemm_flops'] / 1e12:.3g} TFLOP/s,"
            f" copy {found['copy_bytes'] / 1e9:.3g} GB/s"
        )
    written = [out, result.write(session.result(complete), out)]
    if png is not None:
        plot.draw(session.rows, png)
        written.append(png)
    end = "" if complete else "stopped; what was measured is in "
    say(f"{end}{', '.join(map(str, written))}")
    return complete


class _Bar:
    """A progress bar on a terminal's standard error, if tqdm is there."""

    def __init__(self, steps: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm  # type: ignore[import-untyped]
            except ImportError:
                return
            self._bar = tqdm(total=steps, leave=False, file=sys.stderr, smoothing=0)

    def step(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=False)
            self._bar.update()

    def write(self, line: str, say: Callable[[str], Any]) -> None:
        if self._bar is None:
            say(line)
        else:
            with self._bar.external_write_mode(file=sys.stdout):
                say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def default_name() -> Path:
    return Path(time.strftime("bench-%Y%m%d-%H%M%S.json"))
