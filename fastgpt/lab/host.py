"""Microseconds of Python between a call and its launches, with a driver that launches nothing.

Kernels are compiled for a chip as always; then calls are timed up to where Triton would hand over
to the driver. Not in it: the driver's own launch, packing arguments in C, allocation on a GPU (the
tensors are on the CPU). The vendor's products in ffn run on the CPU, on tensors of a few elements.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt import ops
from fastgpt.lab.compile import Driver, present
from fastgpt.lab.launch import Launch, load_kernel
from fastgpt.lab.result import HostCost
from fastgpt.ops import backend

launches = 0


class _Launcher:
    """Takes a launch and counts it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        global launches
        launches += 1


class _Utils:
    """What Triton asks of a device when it loads a kernel."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "warpSize": 32}

    def load_binary(self, name: str, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1 << 20


class _HostDriver(Driver):
    """A driver to the end of the launch path."""

    launcher_cls = _Launcher
    utils = _Utils()


def measure(what: str, call: Callable[[], Any], target: str = "sm_90", runs: int = 200) -> HostCost:
    """The median over runs of one call's time, in microseconds.

    Args:
        call: launches kernels on CPU tensors; is run a few times first, which compiles them.
    """
    global launches
    config = triton.runtime.driver
    before, threads = config._active, torch.get_num_threads()
    config.set_active(_HostDriver(target))
    torch.set_num_threads(1)  # another would be waited for wherever the vendor's product runs
    try:
        for _ in range(3):
            launches = 0
            call()
        count, times = launches, []
        for _ in range(runs):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
    finally:
        torch.set_num_threads(threads)
        config._active = before
    return HostCost(what, statistics.median(times) / 1000.0, count)


def of_launch(launch: Launch, target: str = "sm_90") -> HostCost:
    """One kernel[grid](...) of somebody's own."""
    with present(target):
        kernel = load_kernel(launch.kernel)
    args, _ = launch.arguments(fill=False)
    run, grid, options = kernel.run, launch.grid or (1,), launch.options
    return measure(launch.name, lambda: run(grid=grid, warmup=False, **args, **options), target)


def of_op(name: str, target: str = "sm_90") -> list[HostCost]:
    """An op of fastgpt, forward, and with backward if it has one; and the launchers alone."""

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, requires_grad=True)

    x, w, w1, w2 = leaf(1, 32, 2, 16), leaf(16), leaf(32, 16), leaf(16, 32)
    ids, table = torch.zeros(1, 32, dtype=torch.int64), torch.zeros(32, 8)
    byte, step, row = torch.zeros(32, 16, dtype=torch.int8), torch.zeros(32), leaf(1, 16)
    p, m, v, g = (torch.zeros(16) for _ in range(4))
    group = ops.AdamWGroup([p], [g], [m], [v], [torch.zeros(())])
    q = x.detach()
    held = torch.zeros(1, dtype=torch.int32)
    calls: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "attention": (lambda: ops.attention(x, x, x), x),
        "attention_decode": (lambda: ops.attention_decode(q, q, q, held, q, q, splits=2), None),
        "layer_norm": (lambda: ops.layer_norm(x, w, w), x),
        "rms_norm": (lambda: ops.rms_norm(x, w), x),
        "ffn": (lambda: ops.ffn(x, w1, None, w2, None), x),
        "quantized_linear": (lambda: ops.quantized_linear(row, byte, step), row),
        "embedding": (lambda: ops.embedding(ids, w1, w1), w1),
        "rotary": (lambda: ops.rotary(x, x, table, table, q_weight=w, k_weight=w)[0], x),
        "cross_entropy": (lambda: ops.cross_entropy(w1[None], ids), w1),
        "linear_cross_entropy": (lambda: ops.linear_cross_entropy(w1[None], w1, ids), w1),
        "adamw": (lambda: ops.adamw([group], torch.zeros(4)), None),
    }
    call, by = calls[name]
    one = None if by is None else torch.ones_like(call())

    def both() -> None:
        torch.autograd.grad(call(), [x for x in (by,) if x is not None], one)

    with backend.rehearsal(), backend.use("triton"):
        costs = [measure(f"{name}, forward", call, target)]
        if by is not None:
            costs.append(measure(f"{name}, forward and backward", both, target))
        return costs
