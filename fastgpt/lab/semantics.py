"""Run a launch under ttsem: the compiled IR executed on the CPU, with every access seen.

For a process of its own (see `fastgpt.lab.child`): ttsem replaces Triton's driver. It executes a
launch on copies of its tensors' storage; the results are read from there, which covers tensors
behind host descriptors too (ttsem 0.1.0 itself writes back arguments that are tensors only).
"""

import linecache
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.lab.launch import DescriptorArg, Launch, descriptor, file_of, load_kernel

CHIP = 90  # what is compiled for; the IR that is executed is still that of any chip
MISSING = (
    "not run: needs Triton 3.7 or newer and ttsem, which "
    "pip install --no-deps --ignore-requires-python ttsem gives"
)
GUARD = 1 << 26  # bytes on both sides of a storage; pages that nothing touches take no memory

Bools = npt.NDArray[np.bool_]


def available() -> bool:
    """Whether ttsem is installed, and a Triton whose IR it reads."""
    oldest = [int(n) for n in import_module("triton").__version__.split(".")[:2]] >= [3, 7]
    return oldest and find_spec("ttsem") is not None


def teach() -> None:
    """Teach ttsem an instruction of NVIDIA's that fastgpt's kernels use and it does not know."""
    from ttsem import ops

    def reciprocal(x: Any) -> list[npt.NDArray[np.float32]]:
        with np.errstate(divide="ignore"):
            y = (1 / np.asarray(x, np.float32).astype(np.float64)).astype(np.float32)
        return [np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)]

    ops.PTX_FRAGMENTS[ops._norm_asm("rcp.approx.ftz.f32 $0, $1;")] = (reciprocal, "div")


@dataclass(frozen=True)
class Touched:
    """For every element of a tensor: whether it was written, and read before it was."""

    written: Bools
    read_first: Bools


@dataclass
class Run:
    """One run of a launch.

    Attributes:
        tensors: the tensors after it, by the names of their arguments.
        kernel: the function that was launched.
        ir: Triton's IR of the kernel, for further runs.
        stop: the kind of fault that ended it (ttsem's oob_read, oob_write, poison; "lanes" for
            two lanes of one store that disagree), its file:line, and what it was.
        races: file:line and what, for races between programs.
        races_unchecked: whether there were too many accesses to look for races.
        accesses: (kind, op, addresses, bytes of an element) of every access in order, kind one of
            "r" read, "w" write, "s" write of the bytes that were there, "a" atomic; None where
            there were too many.
        valueless: file:line of loads that masked off lanes without other=.
    """

    tensors: dict[str, Tensor]
    kernel: Any
    ir: str = ""
    stop: tuple[str, str, str] | None = None
    races: list[tuple[str, str]] = field(default_factory=list)
    races_unchecked: bool = False
    accesses: list[tuple[str, str, Any, int]] | None = None
    valueless: list[str] = field(default_factory=list)
    _seen: dict[int, tuple[Bools, Bools]] = field(default_factory=dict)

    def line(self, op: str) -> str:
        """file:line that an op of the IR comes from."""
        from ttsem import sanitize

        file, line, _ = sanitize._source_of(op, self.ir, self.kernel.fn.__code__.co_filename)
        return _at(self.kernel, file, line)

    def touched(self, name: str) -> Touched:
        """What became of a tensor's elements."""
        tensor = self.tensors[name]
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base not in self._seen:
            self._seen[base] = self._bytes(base, storage.nbytes())
        count = storage.nbytes() // tensor.itemsize
        at = torch.arange(count).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        first_bytes = at.reshape(-1).numpy() * tensor.itemsize
        written, read_first = self._seen[base]
        return Touched(written[first_bytes], read_first[first_bytes])

    def _bytes(self, base: int, size: int) -> tuple[Bools, Bools]:
        written, read_first = np.zeros(size, bool), np.zeros(size, bool)
        for kind, _, addresses, width in self.accesses or []:
            at = addresses[(addresses >= base) & (addresses < base + size)] - base
            for byte in range(width if at.size else 0):
                if kind in "ra":
                    read_first[at + byte] |= ~written[at + byte]
                if kind != "r":
                    written[at + byte] = True
        return written, read_first

    def _access(self, name: str, kinds: str, last: bool) -> str:
        storage = self.tensors[name].untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        found = self.accesses or []
        for kind, op, addresses, _ in reversed(found) if last else found:
            if kind in kinds and ((addresses >= start) & (addresses < end)).any():
                return self.line(op)
        return ""

    def first_read(self, name: str) -> str:
        """file:line of the first read of a tensor's storage."""
        return self._access(name, "ra", last=False)

    def last_store(self, name: str) -> str:
        """file:line of the last store to a tensor's storage."""
        return self._access(name, "wsa", last=True)


def run(
    launch: Launch,
    *,
    ir: str = "",
    order: str = "",
    poisoned: Sequence[str] = (),
    masked_garbage: bool = False,
) -> Run:
    """Run a launch on the arguments that it describes.

    Args:
        ir: of an earlier run; the kernel is compiled without.
        order: of the programs, "" or "reverse".
        poisoned: tensors whose every element is given other bits before.
        masked_garbage: whether masked-off lanes of a load without other= hold NaN, and integers
            something large, and not 0.

    Raises:
        ValueError: the launch has no grid, or ttsem cannot execute the kernel; says why.
    """
    from ttsem import harness, interp, memory, sanitize

    teach()
    if launch.grid is None:
        raise ValueError(f"lab: {launch.name} has no grid: it can be compiled, but not run")
    kernel = load_kernel(launch.kernel)
    args, tensors = _guarded(launch)
    for name in poisoned:
        tensors[name].copy_(_other(tensors[name]))
    made = Run(tensors, kernel, ir)
    executions: list[Any] = []
    valueless: dict[str, None] = {}

    def compiled(*given: Any, **options: Any) -> str:
        made.ir = made.ir or compile_(*given, **options)
        return made.ir

    def executed(record: Any, text: str, **options: Any) -> Any:
        executions.append(execute(record, text, **(options | {"trace_access": True})))
        return executions[-1]

    def loaded(self: Any, at: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if other is None and mask is not None and not np.all(mask):
            valueless.setdefault(self.current_op)
            other = _garbage(np.dtype(dtype)) if masked_garbage else None
        return load(self, at, mask, other, dtype)

    def ordered(programs: Any, _: str = "") -> Any:
        return grid_order(programs, order)

    compile_, execute, load = harness.ir_for_launch, harness.execute, memory.Memory.load
    grid_order = interp.grid_order
    with (
        _instead(harness, "ir_for_launch", compiled),
        _instead(harness, "execute", executed),
        _instead(memory.Memory, "load", loaded),
        _instead(interp, "grid_order", ordered),
        sanitize.session(CHIP, cuda_is_cpu=False, races="record") as session,
    ):
        try:
            kernel[launch.grid](**args, **launch.options)
        except sanitize.KernelFault as stop:
            made.stop = _told(stop.fault, kernel)
        except sanitize.Unjudged as stop:
            why = " ".join(str(stop).split()).partition(" loc(")[0]
            raise ValueError(f"ttsem cannot run it: {why}") from None
    made.races = [(_at(kernel, f.source_file, f.source_line), f.detail) for f in session.races]
    made.races_unchecked = session.races_unchecked > 0
    made.valueless = [at for op in valueless if (at := made.line(op))]
    for execution in executions:
        log = execution.memory.access_log
        if log is not None:
            made.accesses = [(kind, op, at, width) for _, kind, op, at, width, _ in log]
        _write_back(execution.memory.buffers(), tensors)
    return made


def _guarded(launch: Launch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The launch's arguments, each storage between guards: nothing else is near it."""
    args, drawn = launch.arguments()
    storages: dict[int, torch.UntypedStorage] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in drawn.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            space = np.empty(storage.nbytes() + 2 * GUARD, np.uint8)
            start = GUARD - space.ctypes.data % 64  # aligned as what torch allocates
            alone = torch.from_numpy(space[start : start + storage.nbytes()]).untyped_storage()
            alone.copy_(storage)
            storages[storage.data_ptr()] = alone
        tensors[name] = torch.empty(0, dtype=tensor.dtype).set_(
            storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    for name, value in launch.args.items():
        if isinstance(value, DescriptorArg):
            args[name] = descriptor(tensors[name], value.block)
        elif name in tensors:
            args[name] = tensors[name]
    return args, tensors


def _write_back(buffers: dict[int, Any], tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in buffers:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            raw = np.ascontiguousarray(buffers[storage.data_ptr()]).reshape(-1).view(np.uint8)
            flat.copy_(torch.from_numpy(raw.copy()))


def _other(tensor: Tensor) -> Tensor:
    """A tensor none of whose elements has the bits of tensor's."""
    if not tensor.is_floating_point():
        return ~tensor
    wide = tensor.double()
    return torch.where(wide.isnan(), -1.0, torch.nan).to(tensor.dtype)


def _garbage(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max  # all ones are a NaN where ttsem holds bfloat16 or float8 so


def _told(fault: Any, kernel: Any) -> tuple[str, str, str]:
    """A fault of ttsem's: its kind, file:line, and one line of words."""
    file, line = fault.source_file, fault.source_line
    where = _at(kernel, file, line)
    source = linecache.getline(file_of(kernel, file, line), line).strip() or fault.source_text
    if fault.kind in ("oob_read", "oob_write"):
        does = "reads" if fault.kind == "oob_read" else "writes"
        past, before = fault.elements_past_end, fault.elements_before_start
        how = f"{past} elements past the end" if past else f"{before} elements before the start"
        return fault.kind, where, f"{does} {how} of {fault.buffer}: {source}"
    if "two lanes of one store" in fault.detail:
        return "lanes", where, f"two lanes of one store write one address differently: {source}"
    return fault.kind, where, f"{fault.detail}: {source}"


def _at(kernel: Any, file: str, line: int) -> str:
    """file:line, the file as seen from here."""
    if not line:
        return ""
    path = Path(file_of(kernel, file, line))
    here = Path.cwd()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"


@contextmanager
def _instead(holder: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Inside, an attribute is something else."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
