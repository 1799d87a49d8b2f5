"""The ops under pytest-benchmark, for trends: pytest benchmarks --benchmark-json=out.json"""

from typing import Any

import pytest
import torch

from benchmarks import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    ffn,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
)

MODULES = (
    attention,
    layer_norm,
    rms_norm,
    ffn,
    embedding,
    adamw,
    rotary,
    cross_entropy,
    linear_cross_entropy,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = {
    module.__name__.split(".")[1]: module.cases(DEVICE, torch.float32)[0] for module in MODULES
}
FORWARD_ONLY = ("adamw",)  # steps that have no gradient


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    "op, provider", [(op, p) for op, case in SMALLEST.items() for p in case.providers]
)
def test_speed(benchmark: Any, op: str, provider: str, backward: bool) -> None:
    if backward and op in FORWARD_ONLY:
        pytest.skip(f"{op} has no backward")
    step = SMALLEST[op].step(provider, backward)

    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {'forward and backward' if backward else 'forward'}"
    benchmark(run)
