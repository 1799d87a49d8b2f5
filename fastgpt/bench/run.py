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

from fastgpt.bench import models, result, show, start, timing
from fastgpt.bench.case import MODES, Case, Work
from fastgpt.bench.measure import Rounds, Setting
from fastgpt.bench.ops import OPS
from fastgpt.bench.worker import FAULTS, first_line

DTYPES = {n: getattr(torch, n) for n in ("float32", "float16", "bfloat16")}
MACHINE = DTYPES | {"autocast": torch.bfloat16, "int8": torch.bfloat16}  # whose peaks are shown


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
    """One computation in one precision, not yet made.

    Attributes:
        dtype: of DTYPES; of a model of `players.WEIGHTS`.
        providers: None is all that the run may try.
        alone: see `models.Model`.
        part: of a suite.
    """

    what: str
    dtype: str
    sizes: dict[str, int]
    modes: tuple[str, ...] = MODES[:1]
    rounds: int = 20
    providers: tuple[str, ...] | None = None
    part: str = ""
    alone: bool | None = None

    @property
    def module(self) -> ModuleType | None:
        return OPS.get(self.what)


def plan(wanted: Wanted) -> list[Planned]:
    """What will be timed, in this order.

    Raises:
        ValueError: no such op; or none of them has a size that is swept, or takes a precision.
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
        takers = [w for w in defaults if takes(w, dtype)]
        if not takers:
            raise ValueError(
                f"bench: --dtype {dtype} is for {'decode' if dtype == 'int8' else 'step'};"
                f" got {', '.join(defaults)}"
            )
        for what in takers:
            each = defaults[what]
            swept = {n: values for n, values in wanted.sweep if n in each[0]}
            if swept:
                product = itertools.product(*swept.values())
                each = [each[0] | dict(zip(swept, values, strict=True)) for values in product]
            found += [Planned(what, dtype, sizes, wanted.modes, wanted.rounds) for sizes in each]
    return found


def takes(what: str, dtype: str) -> bool:
    """Whether something can be computed in a precision."""
    return models.takes(what, dtype) if what in models.MODELS else dtype in DTYPES


def _sizes(what: str, device: str) -> list[dict[str, int]]:
    if what in models.MODELS:
        return [models.sizes(what, device)]
    return list(OPS[what].sizes(device))


def make(planned: Planned, device: str, nanogpt: Path | None = None) -> Work:
    """The computation on a device; its inputs are the same each time."""
    torch.manual_seed(0)
    if planned.what == start.START:
        return start.Starts()
    if planned.module is None:
        return models.Model(
            planned.what, device, planned.dtype, planned.sizes, nanogpt, planned.alone
        )
    made: Case = planned.module.case(device, DTYPES[planned.dtype], **planned.sizes)
    return made


def fake(planned: Planned, device: str = "cpu") -> tuple[FakeTensorMode, Case]:
    """An op's case that takes no memory."""
    assert planned.module is not None
    mode = FakeTensorMode()
    with mode:
        return mode, planned.module.case(device, DTYPES[planned.dtype], **planned.sizes)


def providers_of(wanted: Wanted, planned: Sequence[Planned]) -> tuple[set[str], list[str]]:
    """The providers that are asked for, and a line for each that nothing of what is planned has.

    Names are taken in any case, - for a space.

    Raises:
        ValueError: none is known.
    """
    known: dict[str, str] = {}
    for one in {p.what: p for p in planned}.values():
        if one.what == start.START:
            known |= {_plain(name): name for name in start.PROVIDERS}
            continue
        usual = Planned(one.what, one.dtype, _sizes(one.what, wanted.device)[0])
        work = fake(usual)[1] if one.module else make(usual, wanted.device, wanted.nanogpt)
        known |= {_plain(name): name for name in (*work.offers, *work.absent)}
    if wanted.providers is None:
        return set(known.values()), []
    unknown = [
        f"bench: --providers must be of {', '.join(sorted(known))}; got {name!r}"
        for name in wanted.providers
        if _plain(name) not in known
    ]
    if len(unknown) == len(wanted.providers):
        raise ValueError(unknown[0])
    return {known[_plain(n)] for n in wanted.providers if _plain(n) in known}, unknown


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
        return _too_large(need, timing.free_bytes(device))

    return asked


class Session:
    """A run under way. `rows` holds what is measured; it can be stopped at any time."""

    def __init__(
        self, wanted: Wanted, planned: Sequence[Planned] | None = None,
        notes: dict[str, list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.wanted = wanted
        self.planned = plan(wanted) if planned is None else list(planned)
        self.providers, self.unknown = providers_of(wanted, self.planned)
        self.facts = result.facts(wanted.device)
        self.peaks: dict[str, dict[str, float]] = {}
        self.rows: list[result.Row] = []
        self.notes = notes or {}

    def result(self, complete: bool) -> result.Run:
        return result.Run(self.facts, self.peaks, self.rows, complete, self.notes)

    def run(self, say: Callable[[str], None], done: Callable[[], None]) -> None:
        """Measure all; done is called after each computation, in each mode.

        Args:
            say: is told what comes next, `steps` times at most.
        """
        device = self.wanted.device
        for dtype in dict.fromkeys(p.dtype for p in self.planned if p.dtype in MACHINE):
            say(f"this machine's peaks, {dtype}")
            self.peaks[dtype] = timing.peaks(device, MACHINE[dtype])
        for planned in self.planned:
            setting = Setting(
                device,
                planned.dtype,
                planned.rounds,
                self.peaks.get(planned.dtype, {}),
                planned.part,
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
        count = len({p.dtype for p in self.planned})
        for planned in self.planned:
            modes = 1 if planned.module is None else len(planned.modes)
            count += modes * (2 * len(self._providers(planned)) + planned.rounds)
        return count

    def _providers(self, planned: Planned) -> set[str]:
        asked = planned.providers
        return self.providers if asked is None else self.providers & set(asked)

    def _each(self, planned: Planned, setting: Setting) -> Iterator[Rounds]:
        """The rounds of one computation, by mode."""
        device, providers = self.wanted.device, self._providers(planned)
        try:
            if planned.module is None:
                yield from self._whole(make(planned, device, self.wanted.nanogpt), setting, planned)
                return
            asked = {m: too_large(planned, device, m) for m in planned.modes}
            inputs = fake(planned)[1]
            nothing_fits = inputs.input_bytes > timing.free_bytes(device)
            work = inputs if nothing_fits else make(planned, device)
        except FAULTS as error:
            for mode in planned.modes:
                self.rows.append(
                    result.Row(
                        planned.what, planned.sizes, planned.dtype, mode, "every provider",
                        result.FAILED, first_line(error), part=planned.part,
                    )
                )  # fmt: skip
            return
        for mode in planned.modes:
            if mode in work.modes:
                yield Rounds(work, mode, providers, setting, asked[mode])

    def _whole(self, work: Work, setting: Setting, planned: Planned) -> Iterator[Rounds]:
        """Of a model: its processes end with its rounds."""
        need = work.bytes_needed() if isinstance(work, models.Model) else 0

        def large(provider: str) -> str | None:
            there = timing.free_bytes(self.wanted.device)
            return _too_large(need, there)

        try:
            yield Rounds(work, work.modes[0], self._providers(planned), setting, large)
        finally:
            if isinstance(work, models.Model):
                work.close()


def _too_large(need: int, free: int) -> str | None:
    if need <= free:
        return None
    return f"needs at least {need / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"


def bench(
    wanted: Wanted, out: Path, shown: show.Shown, planned: Sequence[Planned] | None = None,
    notes: dict[str, list[str]] | None = None, say: Callable[[str], Any] = print,
) -> bool:  # fmt: skip
    """Measure, print and write; whether it came to its end and was not stopped.

    Args:
        planned: what to measure, if not what is wanted.
        notes: what is known besides, for the file.

    Raises:
        ValueError, ImportError, OSError: before anything is measured.
    """
    shown.check()
    if not out.parent.is_dir():
        raise ValueError(f"bench: --out must lie in a folder that is there; got {out}")
    session = Session(wanted, planned, notes or {})
    for line in session.unknown:
        say(line)
    for key, value in session.facts.items():
        say(f"{key:14} {value}")
    say("medians (quartiles); ratios of times in one round, and where their median is, 95 % sure")
    bar = _Bar(session.steps)
    complete, told = False, 0
    absent: set[tuple[str, str]] = set()

    def done() -> None:
        nonlocal told
        new = session.rows[told:]
        for line in result.table([r for r in new if (r.provider, r.why) not in absent]):
            bar.write(line, say)
        absent.update((r.provider, r.why) for r in new if r.state == result.ABSENT)
        told = len(session.rows)
        result.write(session.result(False), out)

    try:
        session.run(bar.step, done)
        complete = True
    except KeyboardInterrupt:
        done()
    finally:
        bar.close()
    for dtype, peaks in session.peaks.items():
        say(
            f"peaks, {dtype}: product {peaks['gemm_flops'] / 1e12:.3g} TFLOP/s,"
            f" copy {peaks['copy_bytes'] / 1e9:.3g} GB/s"
        )
    found = session.result(complete)
    written = [out, result.write(found, out), *shown.write(found)]
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
