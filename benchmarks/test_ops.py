"""The ops under pytest-benchmark, for trends: pytest benchmarks --benchmark-json=out.json"""

from typing import Any

import pytest
import torch

from fastgpt.bench.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = {
    op: module.case(DEVICE, torch.float32, **module.sizes(DEVICE)[0]) for op, module in OPS.items()
}


@pytest.mark.parametrize(
    "op, provider, backward",
    [
        pytest.param(op, p, backward, id=f"{op}-{p}-{'both' if backward else 'forward'}")
        for op, case in SMALLEST.items()
        for p in case.providers
        for backward in ([False, True] if case.has_backward else [False])
    ],
)
def test_speed(benchmark: Any, op: str, provider: str, backward: bool) -> None:
    step = SMALLEST[op].start(provider, "both" if backward else "forward")

    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {'forward and backward' if backward else 'forward'}"
    benchmark(run)
