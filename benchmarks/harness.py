"""Time ways to compute one thing against each other: only those that agree, in turns, as ratios.

    python -m benchmarks.attention --backward

Runs are interleaved, so that a machine that slows down slows all of them; a figure is the median,
and what compares is the ratio to the first provider. On a GPU times are taken with its events, with
the level 2 cache flushed before; the GPU waits until the host has launched all, so that what the
host takes is not in them (`host_seconds` measures that).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastgpt


@dataclass(frozen=True)
class Case:
    """One computation at one size, and who offers it."""

    name: str
    providers: dict[str, Callable[..., Tensor]]
    inputs: dict[str, Tensor]
    flops: int

    def step(self, provider: str, backward: bool) -> Callable[[], Tensor]:
        """Forward, or forward and backward with a gradient made beforehand."""
        f = self.providers[provider]
        if not backward:
            return lambda: f(**self.inputs)
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.inputs.items()}
        dy = torch.randn_like(f(**leaves))

        def run() -> Tensor:
            y = f(**leaves)
            torch.autograd.grad(y, list(leaves.values()), dy)
            return y

        return run


def disagreement(case: Case, provider: str) -> float:
    """Largest difference to the first provider, relative to its largest value."""
    first = next(iter(case.providers))
    with torch.no_grad():
        want, got = (case.providers[p](**case.inputs).double() for p in (first, provider))
    return ((got - want).abs().max() / want.abs().max()).item()


FLUSHED = 256 << 20  # bytes, more than any level 2 cache
HEAD_START = 5_000_000  # cycles that a GPU waits: some 3 ms, in which the host launches


def seconds(step: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def host_seconds(step: Callable[[], Any], calls: int = 50) -> float:
    """What the host takes for a call, launches included and their work not: the least of calls."""
    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return min(times)


def compare(case: Case, device: str, backward: bool, rounds: int = 10) -> dict[str, float]:
    """Median seconds of every provider whose numbers agree with the first one's to 2 %."""
    steps = {}
    for provider in case.providers:
        off = disagreement(case, provider)
        if off > 2e-2:
            print(f"{case.name}: {provider} is not timed, its values are off by {off:.1%}")
            continue
        steps[provider] = case.step(provider, backward)
        steps[provider]()
    times: dict[str, list[float]] = {p: [] for p in steps}
    for _ in range(rounds):
        for provider, step in steps.items():
            times[provider].append(seconds(step, device))
    return {p: statistics.median(t) for p, t in times.items()}


def main(make: Callable[[str, torch.dtype], Sequence[Case]]) -> None:
    """The command line of one benchmark file; make gives its cases for a device and dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    what = "forward and backward" if args.backward else "forward"
    print(f"{name}, torch {torch.__version__}, {args.dtype}, {what}, medians of {args.rounds}")
    for case in make(args.device, getattr(torch, args.dtype)):
        result = compare(case, args.device, args.backward, args.rounds)
        first = next(iter(result.values()))
        flops = case.flops * (3 if args.backward else 1)
        for provider, s in result.items():
            rate = f"{flops / s / 1e9:9.1f} GFLOP/s" if flops else ""
            print(f"{case.name:40} {provider:12} {s * 1e3:10.3f} ms  x{first / s:5.2f} {rate}")
    for choice in fastgpt.explain():
        print(choice)
