"""Microseconds of Python from a call to its launches, ours and peers', with a driver that launches
nothing.

The calls take turns, on tensors of a few elements on the CPU; a figure is the least of all rounds,
since whatever disturbs a round only adds to it. Kernels are compiled before. Autograd is on: a call
is what a training step makes.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt import ops
from fastgpt.lab import host as lab_host
from fastgpt.lab.compile import present
from fastgpt.ops import backend

Call = Callable[[], Any]


def leaf(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def untuned(module: ModuleType) -> None:
    """Its autotuners have one configuration, so that a call tunes nothing."""
    for value in vars(module).values():
        while type(value).__name__ in ("Autotuner", "Heuristics"):
            if hasattr(value, "configs"):
                value.configs = value.configs[:1]
            value = value.fn


def layer_norms() -> Iterator[tuple[str, Call]]:
    x, w, b = leaf(16, 768), leaf(768), leaf(768)
    yield "fastgpt", lambda: ops.layer_norm(x, w, b)
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        yield "liger", lambda: LigerLayerNormFunction.apply(x, w, b, 1e-5)
    except ImportError:
        pass
    try:
        from fla.modules.norm import layernorm

        untuned(layernorm)
        yield "fla", lambda: layernorm.layer_norm(x, w, b)
    except ImportError:
        pass


def attentions(tutorials: Path | None) -> Iterator[tuple[str, Call]]:
    q = leaf(1, 128, 2, 64)
    yield "fastgpt", lambda: ops.attention(q, q, q)
    if tutorials:
        from benchmarks.peers.calls import without_calls

        module = without_calls(tutorials / "06-fused-attention.py")
        untuned(module)
        t = leaf(1, 2, 128, 64)
        yield "tutorial", lambda: module.attention(t, t, t, True, 0.125, False)


def measure(calls: Iterator[tuple[str, Call]], target: str, rounds: int = 300) -> dict[str, float]:
    """Microseconds of each call that runs."""
    found: dict[str, Call] = {}
    with present(target), backend.rehearsal(), backend.use("triton"):
        triton.runtime.driver.set_active(lab_host._HostDriver(target))
        for name, call in calls:
            try:
                for _ in range(3):
                    call()
                found[name] = call
            except Exception as error:
                print(
                    f"host cost of {name}: {type(error).__name__}: {error}"[:200], file=sys.stderr
                )
        least = dict.fromkeys(found, float("inf"))
        for _ in range(rounds):
            for name, call in found.items():
                start = time.perf_counter_ns()
                call()
                least[name] = min(least[name], (time.perf_counter_ns() - start) / 1000)
    return least


def costs(peers: Path | None, tutorials: Path | None, target: str = "sm_80") -> dict[str, Any]:
    """By op: microseconds by provider."""
    if peers:
        sys.path.append(str(peers))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "layer norm, forward": measure(layer_norms(), target),
            "attention, forward": measure(attentions(tutorials), target),
        }
    finally:
        torch.set_num_threads(threads)
