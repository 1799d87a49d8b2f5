"""Bytes that a launch moves, and how they grow with its size: counted, not modelled.

A launch runs in Triton's interpreter, one program after the other, and every access is seen with
its addresses and its mask. An access is one execution of a tl.load, tl.store or atomic, or of a
tensor descriptor's load or store, by one program:

    moved by an access = (distinct elements whose mask is true) * bytes of an element

Lanes that read one element move it once, for the hardware coalesces them: a row that is broadcast
over a tile counts as a row, a scalar as a scalar. What two accesses move is added up, even where
the second would hit a cache: `moved` is what the kernel asks of the memory system, `least` (every
distinct byte once) what a perfect cache would leave of it. An atomic loads and stores. Lanes that
are masked off move nothing, and `other=` is not memory.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastgpt.lab import child, interpret
from fastgpt.lab.launch import Launch
from fastgpt.lab.result import Checked, Traffic

WAYS = {"loaded": "reads", "stored": "writes"}
Array = npt.NDArray[Any]


def measure(
    launches: Sequence[Launch], target: str = "", timeout: float | None = None
) -> tuple[list[Traffic], list[Checked]]:
    """Count what every launch moves.

    Args:
        target: the chip whose tiles the launches have; a word for the report.
        timeout: seconds that one launch may take.

    Returns:
        The traffic of those that ran, and for each launch "counted" or why it was not.
    """
    made: list[Traffic] = []
    checked = []
    results = child.apply("fastgpt.lab.traffic:count", launches, interpret=True, timeout=timeout)
    for launch, result in zip(launches, results, strict=True):
        outcome = "counted"
        if isinstance(result, child.Failure):
            outcome = f"not run: {result}"
        else:
            made.append(replace(result, target=target))
        checked.append(Checked(launch.name, "traffic", outcome, size(launch)))
    return made, checked


def size(launch: Launch) -> str:
    """What is launched, in short: its size, or else its variant, or the shapes of its tensors."""
    if launch.size:
        return launch.size
    if launch.variant:
        return " ".join(f"{name}={value}" for name, value in launch.variant.items())
    return " ".join(f"{name} {tensor}" for name, tensor in launch.tensors().items())


def growth(traffic: Sequence[Traffic], sizes: Sequence[float]) -> tuple[float, float]:
    """The exponents e of moved = c * size**e and least = c * size**e, by least squares of logs.

    Args:
        traffic: of one kernel at several sizes.
        sizes: what grows, one for each of them.

    Raises:
        ValueError: there are fewer than two different sizes, or not one for each.
    """
    if len(traffic) != len(sizes) or len(set(sizes)) < 2:
        raise ValueError(
            "growth: one size for each measurement is needed and two of them different;"
            f" got {len(traffic)} measurements, sizes {list(sizes)}"
        )
    x = np.log(np.asarray(sizes, dtype=float))
    moved = np.log([float(t.moved) for t in traffic])
    least = np.log([float(t.least) for t in traffic])
    return float(np.polyfit(x, moved, 1)[0]), float(np.polyfit(x, least, 1)[0])


def count(launch: Launch) -> Traffic:
    """Run a launch in a process with TRITON_INTERPRET=1, and count.

    Raises:
        ValueError: the launch has no grid, or the kernel failed or left its tensors.
    """
    args, tensors = interpret.without_bfloat16(launch).arguments()
    with metered(tensors.values()) as meter:
        interpret.run(launch, args)
    least = {way: sum(s.distinct(way) for s in meter.storages) for way in WAYS}
    moved = meter.moved
    return Traffic(
        launch.name, "", size(launch), moved["loaded"], moved["stored"], least["loaded"],
        least["stored"], meter.flops,
    )  # fmt: skip


@dataclass
class _Storage:
    """The bytes of one storage, and which of them were loaded and stored: maps made if needed."""

    start: int
    bytes: int
    seen: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def mark(self, way: str, at: Array, width: int) -> None:
        if at.size and way not in self.seen:
            self.seen[way] = np.zeros(self.bytes, dtype=bool)
        for byte in range(width if at.size else 0):
            self.seen[way][at + byte] = True

    def distinct(self, way: str) -> int:
        return int(np.count_nonzero(self.seen[way])) if way in self.seen else 0


@dataclass
class _Meter:
    """Adds up the accesses of a launch and the work of its products."""

    storages: list[_Storage]
    moved: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    flops: int = 0

    def access(self, way: str, pointers: Array, mask: Array, width: int) -> None:
        """One access: a program's, with a pointer and a mask for every lane."""
        at = np.asarray(pointers).reshape(-1)[np.asarray(mask, dtype=bool).reshape(-1)]
        if at.size == 0:
            return
        at = at.astype(np.int64)
        if not (at[1:] > at[:-1]).all():
            at = np.unique(at)
        self.moved[way] += at.size * width
        for storage in self.storages:
            inside = (at >= storage.start) & (at + width <= storage.start + storage.bytes)
            storage.mark(way, at[inside] - storage.start, width)
            at = at[~inside]
            if at.size == 0:
                return
        raise ValueError(f"the kernel {WAYS[way]} outside its tensors; see the bounds check")


class _Library:
    """Triton's native interpreter library, with every access to memory shown to a meter.

    The builder's methods differ between Triton's versions; these four functions do not, and all
    that touches memory comes through them.
    """

    def __init__(self, native: Any, meter: _Meter) -> None:
        self._native = native
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        self._meter.access("loaded", pointers, mask, np.dtype(dtype).itemsize)
        made: Array = self._native.load(pointers, mask, other, dtype)
        return made

    def store(self, pointers: Array, value: Array, mask: Array) -> None:
        self._meter.access("stored", pointers, mask, value.dtype.itemsize)
        self._native.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: Array, value: Array, mask: Array, order: Any) -> Array:
        for way in ("loaded", "stored"):
            self._meter.access(way, pointers, mask, value.dtype.itemsize)
        made: Array = self._native.atomic_rmw(op, pointers, value, mask, order)
        return made

    def atomic_cas(self, pointers: Array, compare: Array, value: Array, order: Any) -> Array:
        for way in ("loaded", "stored"):
            self._meter.access(way, pointers, np.ones_like(pointers, bool), value.dtype.itemsize)
        made: Array = self._native.atomic_cas(pointers, compare, value, order)
        return made


@contextmanager
def metered(tensors: Iterable[Tensor]) -> Iterator[_Meter]:
    """Inside, what the interpreter does to tensors is metered, and an access beside them raises."""
    from triton.runtime import interpreter

    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    meter = _Meter([_Storage(*place) for place in stores.items()])
    builder: Any = interpreter.InterpreterBuilder
    native: Any = interpreter._interpreter  # type: ignore[attr-defined]
    product = builder.create_dot

    def counted(self: Any, a: Any, *rest: Any) -> Any:
        made = product(self, a, *rest)
        meter.flops += 2 * math.prod(made.data.shape) * a.data.shape[-1]
        return made

    interpreter._interpreter, builder.create_dot = _Library(native, meter), counted
    try:
        yield meter
    finally:
        interpreter._interpreter, builder.create_dot = native, product
