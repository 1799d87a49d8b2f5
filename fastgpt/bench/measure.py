"""Gate the providers of one computation by their values, and time the right ones in turns.

In each round every provider runs once, and the first of a round is another each time; so what
slows the machine down slows all of them, and ratios are of times taken one after the other.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastgpt.bench import timing
from fastgpt.bench.case import MODES, Work
from fastgpt.bench.result import ABSENT, FAILED, REFUSED, TIMED, Row
from fastgpt.bench.stats import median_interval, quartiles
from fastgpt.bench.worker import FAULTS, first_line

SHORT = 1e-3  # seconds: shorter calls are timed several at a time, where the clock is the host's
MOST_CALLS = 100
LONG = 0.5


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share."""

    device: str
    precision: str
    rounds: int
    peaks: dict[str, float]
    part: str = ""


class Rounds:
    """The rounds of one computation in one mode. `rows` may be asked at any time.

    Args:
        work: the computation.
        mode: of work.modes.
        providers: which to try; others of work are left out.
        too_large: for a provider, why it would not fit into memory, if so.
        setting: of the run.
    """

    def __init__(
        self, work: Work, mode: str, providers: Iterable[str], setting: Setting,
        too_large: Callable[[str], str | None] = lambda provider: None,
    ) -> None:  # fmt: skip
        self.work, self.mode, self.setting = work, mode, setting
        self.providers = [p for p in (*work.offers, *work.absent) if p in set(providers)]
        self._too_large = too_large
        self._rows: dict[str, Row] = {}
        self._calls: dict[str, int] = {}
        self._samples: dict[str, list[float]] = {}
        self._starts: dict[str, timing.Call] = {}
        self._first_call: dict[str, float] = {}

    def __len__(self) -> int:
        """Steps that `run` takes."""
        return 2 * len(self.providers) + self.setting.rounds

    def run(self) -> Iterator[str]:
        """Yields, before each step, what it is."""
        work, device = self.work, self.setting.device
        torch.compiler.reset()  # which after a few sizes would compile no more
        for provider in self.providers:
            yield f"{work.name} {self.mode}, {provider}"
            self._rows[provider] = self._row(provider, *self._gate(provider))
        # After all gates: a training step changes the weights that they compare.
        counts: dict[str, int] = {}
        for provider in [p for p, row in self._rows.items() if row.state == TIMED]:
            yield f"{work.name} {self.mode}, {provider}"
            counts = counts or work.counts(self.mode)
            try:
                self._first(provider, counts)
            except FAULTS as error:
                self._rows[provider] = self._row(provider, FAILED, first_line(error))
                self._calls.pop(provider, None)
            _clear(device)
        order = list(self._calls)
        self._samples = {p: [] for p in order}
        for n in range(self.setting.rounds):
            yield f"{work.name} {self.mode}, round {n + 1}"
            turn = n % len(order) if order else 0
            taken = {p: self._time(p) for p in order[turn:] + order[:turn]}
            for provider, seconds in taken.items():  # whole rounds only
                self._samples[provider].append(seconds)

    def rows(self) -> list[Row]:
        """What is known by now, providers without a timing included if something was said."""
        timed = [p for p, samples in self._samples.items() if samples]
        base = "fastgpt" if "fastgpt" in timed else next(iter(timed), "")
        found = []
        for provider in self.providers:
            row = self._rows.get(provider)
            if row is None or (row.state == TIMED and provider not in timed):
                continue
            if row.state == TIMED:
                row = self._timed(row, base)
            found.append(row)
        return found

    def _row(self, provider: str, state: str, why: str = "") -> Row:
        work, setting = self.work, self.setting
        return Row(
            work.what, work.sizes, setting.precision, self.mode, provider, state, why,
            part=setting.part,
        )  # fmt: skip

    def _gate(self, provider: str) -> tuple[str, str]:
        if provider in self.work.absent:
            return ABSENT, self.work.absent[provider]
        large = self._too_large(provider)
        if large:
            return FAILED, large
        try:
            self.work.ready(provider)
            self._first_call[provider] = timing.clock_seconds(
                lambda: self.work.first(provider, self.mode), self.setting.device
            )
            wrong = self.work.wrong(provider, self.mode)
        except FAULTS as error:
            return FAILED, first_line(error)
        return (REFUSED, wrong) if wrong else (TIMED, "")

    def _first(self, provider: str, counts: dict[str, int]) -> None:
        """What is measured once, and how many calls make a sample."""
        work, device = self.work, self.setting.device
        compiles = provider.endswith("compiled")
        if self.mode != "backward":
            self._starts[provider] = work.start(provider, self.mode)
        once = timing.clock_seconds(self._call(provider), device)
        if once < LONG:  # the first may still have made something
            once = timing.clock_seconds(self._call(provider), device)
        self._calls[provider] = 1
        if device != "cuda" and self.mode != "backward":
            self._calls[provider] = max(1, min(MOST_CALLS, int(SHORT / max(once, 1e-9))))
        peak, resident = work.memory(provider, self._call(provider))
        host = None
        if device == "cuda" and self.mode in ("forward", "both"):
            host = timing.host_seconds(self._call(provider))
        kernels: int | None = None
        busy: float | None = None
        if device == "cuda" and self._whole:
            kernels, busy = timing.launched(self._call(provider))
        saved = None
        if self.mode != "forward" and not compiles:
            saved = work.saved(provider)
        self._rows[provider] = replace(
            self._rows[provider],
            first_call=self._first_call[provider], host=host, peak_bytes=peak,
            resident_bytes=resident, saved_bytes=saved, flops=counts.get("flops"),
            bytes=counts.get("bytes"), tokens=counts.get("tokens"), kernels=kernels, busy=busy,
        )  # fmt: skip

    @property
    def _whole(self) -> bool:
        """A model, which is timed with its host."""
        return self.mode not in MODES

    def _call(self, provider: str) -> timing.Call:
        """Ready to be timed; a backward is good for one call, and has its forward behind it."""
        kept = self._starts.get(provider)
        return kept if kept is not None else self.work.start(provider, self.mode)

    def _time(self, provider: str) -> float:
        device, call, calls = self.setting.device, self._call(provider), self._calls[provider]

        def several() -> None:
            for _ in range(calls):
                call()

        step = call if calls == 1 else several
        return (timing.clock_seconds if self._whole else timing.seconds)(step, device) / calls

    def _timed(self, row: Row, base: str) -> Row:
        samples = self._samples[row.provider]
        low, median, high = quartiles(samples)
        pairs = [own / of for own, of in zip(samples, self._samples[base], strict=True)]
        sure = median_interval(pairs) or (None, None)
        rates: dict[str, Any] = {}
        peaks = self.setting.peaks
        if row.flops:
            rates["tflops"] = row.flops / median / 1e12
            if "gemm_flops" in peaks:
                rates["of_gemm"] = row.flops / median / peaks["gemm_flops"]
        if row.bytes:
            rates["gbytes"] = row.bytes / median / 1e9
            if "copy_bytes" in peaks:
                rates["of_copy"] = row.bytes / median / peaks["copy_bytes"]
        if row.tokens:
            rates["tokens_s"] = row.tokens / median
        return replace(
            row, samples=samples, median=median, low=low, high=high, base=base,
            ratio=statistics.median(pairs), ratio_low=sure[0], ratio_high=sure[1], **rates,
        )  # fmt: skip


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
