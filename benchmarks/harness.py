"""Time ways to compute one thing against each other: only those that agree, in turns, as ratios.

    python -m benchmarks.attention --backward

Runs are interleaved, so that a machine that slows down slows all of them; a figure is the median,
and what compares is the ratio to the first provider. On a GPU times are taken with its events.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def seconds(step: Callable[[], Tensor], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


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
