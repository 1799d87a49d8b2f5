"""Compile exactly what a launcher would launch, for a chip that need not be there.

    with offline("sm_90") as kernels:
        attention_fwd(q, k, v, ...)          # CPU tensors; nothing runs
    print(kernels[0].resources())

Triton's own specialisation sees the real arguments (dtypes, divisible strides), so the binary is
the one that a GPU would be given. Nothing is said about its speed.
"""

import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from fastgpt.kernels.tuned import measured
from fastgpt.lab.chips import chip
from fastgpt.lab.launch import Launch, load_kernel, written_down


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
        return resources(self.binary)


def resources(binary: Any) -> Resources:
    """Registers and spills from the cubin or the amdgcn text, shared memory from Triton."""
    meta, asm = binary.metadata, binary.asm
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
            [tool("cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    m = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if m is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK; got {usage!r}")
    return Resources(int(m[1]), int(m[2]), meta.shared, meta.num_warps)


@functools.cache
def tool(name: str) -> str:
    """A program of NVIDIA's: that of the triton wheel, else a CUDA toolkit's.

    Raises:
        FileNotFoundError: there is neither.
    """
    wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(wheel) if wheel.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"{name}: must be in the triton wheel or, with a CUDA toolkit, on PATH; got neither"
        )
    return found


def gpu_target(target: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton names it.

    Raises:
        ValueError: target is none of the known.
    """
    warp = chip(target).warp_size
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), warp)
    return GPUTarget("hip", target, warp)


class Driver:
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

    @property
    def utils(self) -> Any:
        """What programs ask to choose their tiles."""
        there = chip(self.target)
        properties = {
            "max_shared_mem": there.shared_limit,
            "multiprocessor_count": there.multiprocessors,
            "warpSize": there.warp_size,
        }
        return SimpleNamespace(get_device_properties=lambda device: properties)


@contextmanager
def present(target: str) -> Iterator[None]:
    """Inside, a chip is there as far as code asks that wants to know which it is.

    Triton's active driver is of that chip, and so is what torch.cuda says, unless there is a GPU.
    """
    known, (major, minor) = chip(target), _capability(target)
    properties = SimpleNamespace(
        name=known.name,
        major=major,
        minor=minor,
        multi_processor_count=known.multiprocessors,
        warp_size=known.warp_size,
        shared_memory_per_block_optin=known.shared_limit,
        gcnArchName=target,
    )
    said: dict[str, Any] = {
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: known.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
    }
    if torch.cuda.is_available():
        said = {}
    config = triton.runtime.driver
    before, asked = config._active, {name: getattr(torch.cuda, name) for name in said}
    config.set_active(Driver(target))
    for name, answer in said.items():
        setattr(torch.cuda, name, answer)
    try:
        with measured({}):  # tiles that were measured on a GPU are for that one
            yield
    finally:
        for name, answer in asked.items():
            setattr(torch.cuda, name, answer)
        config._active = before


def _capability(target: str) -> tuple[int, int]:
    if target.startswith("sm_"):
        return divmod(int(target[3:]), 10)
    return int(target[3:-2]), int(target[-2], 16)


@contextmanager
def _instead(target: str, run: Callable[..., Any]) -> Iterator[None]:
    """A chip is present, and run takes every launch."""
    launch = JITFunction.run
    with present(target):
        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = launch


def _bound(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments and options by name, defaults too."""
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    return defaults | dict(zip(kernel.arg_names, args, strict=False)) | kwargs


@contextmanager
def offline(target: str) -> Iterator[list[Kernel]]:
    """Inside, a launch of a Triton kernel compiles it for target, records it and runs nothing."""
    kernels: list[Kernel] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = _bound(self, args, kwargs)
        names = [p.name for p in self.params if p.is_constexpr]
        constexprs = {n: bound[n] for n in names if n in bound}
        file = self.fn.__module__.rpartition(".")[2]
        kernels.append(Kernel(f"{file}.{self.fn.__name__}", target, constexprs, binary))
        return binary

    with _instead(target, run):
        yield kernels


def record(kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    """A real launch of a JITFunction, written down."""
    bound = _bound(kernel, args, kwargs)
    sizes = grid(bound) if callable(grid) else grid
    storages: dict[int, int] = {}
    constexprs = [p.name for p in kernel.params if p.is_constexpr and p.name in bound]
    file = Path(str(inspect.getsourcefile(kernel.fn))).resolve()
    return Launch(
        kernel=f"{file}:{kernel.fn.__qualname__}",
        args={
            p.name: written_down(p.name, bound[p.name], storages)
            for p in kernel.params
            if p.name in bound
        },
        grid=tuple(int(n) for n in sizes),
        options={k: v for k, v in bound.items() if k not in kernel.arg_names and k != "debug"},
        name=f"{file.stem}.{kernel.fn.__name__}",
        variant={n: written_down(n, bound[n], storages) for n in constexprs},
    )


@contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Inside, a launch of a Triton kernel is written down as on target, and nothing runs."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(record(self, args, grid, kwargs))

    with _instead(target, run):
        yield launches


class CompileError(ValueError):
    """A kernel does not compile for a target: where in the source, and why, in one line."""


def compile_launch(launch: Launch, target: str) -> Any:
    """The binary that target would be given.

    Raises:
        ValueError: the kernel cannot be loaded, or the launch does not fit its signature.
        CompileError: it does not compile.
    """
    compiled: list[Any] = []
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(real(self, *args, grid=grid, warmup=True, **kwargs))

    with _instead(target, run):
        kernel = load_kernel(launch.kernel)
        args, _ = launch.arguments(fill=False)
        said: list[str] = []
        try:
            with _standard_error(said):
                kernel.run(grid=launch.grid or (1,), warmup=True, **args, **launch.options)
        except (KeyError, TypeError) as error:
            if not isinstance(error, CompilationError):
                raise ValueError(f"lab: {launch.name} cannot be launched; {error}") from error
            raise
        except CompilationError as error:
            raise CompileError(_where(kernel, error)) from error
        except (RuntimeError, OutOfResources, PTXASError, subprocess.SubprocessError) as error:
            raise CompileError(_said(said, error)) from error
    return compiled[0]


@contextmanager
def _standard_error(lines: list[str]) -> Iterator[None]:
    """What the compiler's own C++ writes to standard error inside, as lines."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        keep = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(keep, 2)
            os.close(keep)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _where(kernel: Any, error: CompilationError) -> str:
    """file:line: why, of the innermost function that a compilation error names."""
    while isinstance(error.__cause__, CompilationError):
        error = error.__cause__
    owner = next(
        (
            f
            for f in (kernel, *kernel.fn.__globals__.values())
            if isinstance(f, JITFunction) and f.src == error.src
        ),
        kernel,
    )
    # The source that was compiled starts at the def; the function's own lines at its decorators.
    before = next(n for n, text in enumerate(owner.raw_src) if text.lstrip().startswith("def "))
    file = inspect.getsourcefile(owner.fn)
    line = owner.starting_line_number + before + getattr(error.node, "lineno", 1) - 1
    why = error.error_message or (error.__cause__ and str(error.__cause__)) or "does not compile"
    return f"{file}:{line}: {' '.join(str(why).split())}"


def _said(lines: list[str], error: Exception) -> str:
    """The first diagnostic that the compiler printed, else the error's own words."""
    for line in lines:
        if m := re.search(r'(?:loc\()?"?([^\s"(]+\.py)"?:(\d+):\d+\)?: (?:error: )?(.*)', line):
            return f"{m[1]}:{m[2]}: {m[3]}"
    fatal = [s for s in str(error).splitlines() if re.search("error|fatal|required", s, re.I)]
    return " ".join((fatal or str(error).splitlines() or [type(error).__name__])[0].split())
