"""Compile exactly what a launcher would launch, for a chip that need not be there.

    with offline("sm_90") as kernels:
        attention_fwd(q, k, v, ...)          # CPU tensors; nothing runs
    print(kernels[0].resources())

Triton's own specialisation sees the real arguments (dtypes, divisible strides), so the binary is
the one that a GPU would be given. Nothing is said about its speed.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Shared memory that one program may use, bytes. NVIDIA: CUDA C programming guide, table of
# technical specifications per compute capability; AMD: CDNA3 and CDNA4 ISA guides (LDS).
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
TARGETS = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers a thread, spilled bytes a thread, shared memory bytes."""

    registers: int
    spills: int
    shared: int
    warps: int


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its name as file.function, chip, constexprs and binary."""

    name: str
    target: str
    constexprs: dict[str, Any]
    binary: Any

    def __str__(self) -> str:
        flags = " ".join(f"{k}={v}" for k, v in self.constexprs.items())
        meta = self.binary.metadata
        return f"{self.name} {self.target} {flags} warps={meta.num_warps} stages={meta.num_stages}"

    def resources(self) -> Resources:
        """Registers and spills from the cubin or the amdgcn text, shared memory from Triton."""
        meta, asm = self.binary.metadata, self.binary.asm
        if "amdgcn" in asm:
            text = asm["amdgcn"]
            found = {
                key: int(m[1]) if (m := re.search(rf"\.{key}:\s+(\d+)", text)) else 0
                for key in ("vgpr_count", "vgpr_spill_count")
            }
            spills = 4 * found["vgpr_spill_count"]  # scalar spills stay in registers
            return Resources(found["vgpr_count"], spills, meta.shared, meta.num_warps)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [_cuobjdump(), "--dump-resource-usage", file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        m = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if m is None:
            raise RuntimeError(f"cuobjdump: expected a line with REG and STACK; got {usage!r}")
        return Resources(int(m[1]), int(m[2]), meta.shared, meta.num_warps)


@functools.cache
def _cuobjdump() -> str:
    """The cuobjdump that comes in the triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def gpu_target(target: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton names it.

    Raises:
        ValueError: target is none of TARGETS.
    """
    if target not in TARGETS:
        raise ValueError(f"target: one of {', '.join(TARGETS)} is known; got {target!r}")
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


class _Driver:
    """A Triton driver for a device that is not there: it answers what compilation asks."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.target)

    def get_current_device(self) -> str:
        return self.target  # the key of Triton's per-device caches: each chip has its own

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def offline(target: str) -> Iterator[list[Kernel]]:
    """Inside, a launch of a Triton kernel compiles it for target, records it and runs nothing."""
    kernels: list[Kernel] = []
    launch = JITFunction.run
    config = triton.runtime.driver

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        names = [p.name for p in self.params if p.is_constexpr]
        constexprs = {n: bound[n] for n in names if n in bound}
        file = self.fn.__module__.rpartition(".")[2]
        kernels.append(Kernel(f"{file}.{self.fn.__name__}", target, constexprs, binary))
        return binary

    before = config._active
    config.set_active(_Driver(target))
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        config._active = before
