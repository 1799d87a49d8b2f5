"""Seconds and bytes of one call, and what the machine itself can do.

On a GPU times are its events', with the level 2 cache flushed before; the GPU waits until the host
has launched all, so that what the host takes is not in them (`host_seconds` measures that).
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]
FLUSHED = 256 << 20  # bytes, more than any level 2 cache
HEAD_START = 5_000_000  # cycles that a GPU waits: some 3 ms, in which the host launches


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Call, device: str) -> float:
    """Of one call; on a GPU what the GPU takes."""
    if device != "cuda":
        return clock_seconds(step, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def clock_seconds(step: Call, device: str) -> float:
    """Of one call, by the clock, with all that the host does."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def host_seconds(step: Call, calls: int = 50) -> float:
    """What the host takes for a call, launches included and their work not: the least of calls."""
    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return min(times)


def launched(step: Call) -> tuple[int, float]:
    """Kernels that a call runs on the GPU, by torch's profiler, and the seconds they take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [e for e in seen.events() or () if "CUDA" in str(e.device_type)]
    ran = [e for e in events if e.name[:3] != "Mem"]
    return len(ran), sum(e.device_time for e in ran) / 1e6


class Peak(TorchDispatchMode):
    """Follows the bytes of all tensors that operators make inside; `most` is the highest sum.

    It sees what goes through PyTorch's dispatcher: no scratch memory inside an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in before and key not in self._live:
                self._live.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterable[Tensor]:
    """Those with a storage: oneDNN's have none that can be asked."""
    return (t for t in tree_leaves(tree) if isinstance(t, Tensor) and not t.is_mkldnn)


def peak_bytes(step: Call, device: str) -> int:
    """Memory that a call adds at its highest, to what lay there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - int(before)
    peak = Peak()
    with peak:
        step()
    return peak.most


def free_bytes(device: str) -> int:
    """Memory that can still be had."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as lines:
            said = dict(line.split(":") for line in lines)
        return int(said["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches now: FLOP/s of a square product, bytes/s of a copy, best of 7."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros((256 << 20) if device == "cuda" else (128 << 20), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)

    def best(step: Call) -> float:
        step()
        return min(seconds(step, device) for _ in range(7))

    return {
        "gemm_flops": 2 * n**3 / best(lambda: a @ b),
        "copy_bytes": 2 * source.numel() / best(lambda: target.copy_(source)),
    }
