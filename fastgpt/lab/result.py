"""What the lab finds out: plain data, one class a section, written as JSON, CSV, text or a page."""

from dataclasses import asdict, dataclass, field, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# What can be asked for besides what is compiled, in the order it runs: what is timed comes first.
SECTIONS = ("host", "memory", "traffic", "sanitize", "numbers")

# What an instruction is for: every one is of exactly one kind.
KINDS = (
    "matrix",  # HMMA, HGMMA, tcgen05, MFMA, WMMA
    "mufu",  # exp2, rsqrt, reciprocal, ...: the special function unit; AMD's transcendentals
    "fp32",  # and packed fp16 arithmetic, which runs on the same pipe
    "fp64",
    "convert",  # between formats
    "integer",  # address arithmetic, comparisons, selects, moves, logic
    "uniform",  # once a warp: NVIDIA's uniform datapath, AMD's scalar unit
    "global_load",
    "global_store",
    "global_async",  # global to shared memory without registers: LDGSTS, TMA
    "shared_load",
    "shared_store",
    "shuffle",  # between the lanes of a warp
    "spill_load",  # local memory, AMD's scratch
    "spill_store",
    "atomic",
    "barrier",  # and waits, fences, mbarriers
    "control",  # branches, predicates of the whole warp, exit
    "other",
)
MEMORY = ("global_load", "global_store", "global_async", "shared_load", "shared_store")


@dataclass(frozen=True)
class Counts:
    """Instructions of a stretch of code, as one warp issues them, each once.

    Attributes:
        kinds: how many of each of KINDS.
        matrix: how many of each matrix opcode, "HMMA.16816.F32.BF16".
        widths: for each of MEMORY, how many move so many bytes a lane; a bulk copy (TMA) is 0.
        matrix_flops: floating point operations, 2 a multiply-add, that one warp's matrix
            instructions issue; 0 where the opcode does not tell the shape (tcgen05).
    """

    kinds: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    widths: dict[str, dict[int, int]] = field(default_factory=dict)
    matrix_flops: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    def bytes_a_lane(self, kind: str) -> int:
        """Bytes that one lane moves by instructions of a kind of MEMORY."""
        return sum(width * count for width, count in self.widths.get(kind, {}).items())

    def wide_share(self) -> float | None:
        """Share of the global accesses that move 16 bytes a lane or more; bulk copies are such.

        None without any access.
        """
        found = [self.widths.get(k, {}) for k in ("global_load", "global_store", "global_async")]
        total = sum(n for widths in found for n in widths.values())
        wide = sum(n for widths in found for width, n in widths.items() if width >= 16 or not width)
        return wide / total if total else None


@dataclass(frozen=True)
class Line:
    """A source line and the instructions it became, in the kernel and in its main loop."""

    file: str
    line: int
    text: str
    whole: int
    loop: int


@dataclass(frozen=True)
class Cost:
    """Cycles of one multiprocessor for one program's pass through a stretch of code.

    The stretch is the main loop's body, or the whole kernel where there is no loop.

    Attributes:
        cycles: for each pipe: tensor, mufu, fp32, integer, load/store, shared, issue, dram.
        binding: the pipe that takes longest.
        useful_flops: of the matrix products asked for, per pass and program.
        redundancy: issued over useful matrix work; 2.0 means that every product is made twice.
        ceiling: share of the chip's peak (tensor where there are products, else bandwidth) that
            the binding pipe leaves with perfect overlap.
        serial: the same with no overlap at all.
        bound: what ceiling is a share of: "tensor" or "bandwidth".
        products: the class of products, as the chips' peaks name it: "16-bit", "fp32", ...
    """

    cycles: dict[str, float]
    binding: str
    useful_flops: int
    redundancy: float
    ceiling: float
    serial: float
    bound: str
    products: str = "16-bit"


@dataclass(frozen=True)
class Occupancy:
    """Programs and warps that fit on one multiprocessor, and what stops one more."""

    programs: int
    warps: int
    share: float
    limited_by: str


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one target; with error set, why there is nothing else.

    Attributes:
        kernel: "layer_norm._fwd_kernel", or what the user called it.
        target: "sm_90", "gfx942", ...
        variant: the constexprs and launch options that tell it from other rows.
        registers: a thread; spills: bytes a thread; spill_instructions: static count.
        shared: bytes a program; shared_limit: the most that this chip gives one.
        loop: counts of the main loop's body, None without a loop.
        loop_lines: first and last source line of the main loop.
        per_element: thread instructions an element; budget: how many of them can be issued while
            memory streams the element. See `cost.per_element`, `cost.budget`.
    """

    kernel: str
    target: str
    variant: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spills: int = 0
    spill_instructions: int = 0
    shared: int = 0
    shared_limit: int = 0
    occupancy: Occupancy | None = None
    whole: Counts = field(default_factory=Counts)
    loop: Counts | None = None
    loop_lines: tuple[int, int] | None = None
    cost: Cost | None = None
    lines: tuple[Line, ...] = ()
    per_element: float | None = None
    budget: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """Bytes that one launch moves, counted in the interpreter.

    Attributes:
        size: what was launched, "T=256 D=64".
        loaded, stored: bytes of all accesses whose mask was true.
        least: distinct bytes loaded plus distinct bytes stored.
        ratio: (loaded + stored) / least.
        flops: of the products (tl.dot), 2 a multiply-add; 0 without any.
    """

    kernel: str
    target: str
    size: str
    loaded: int
    stored: int
    least_loaded: int
    least_stored: int
    flops: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    @property
    def least(self) -> int:
        return self.least_loaded + self.least_stored

    @property
    def ratio(self) -> float:
        return self.moved / self.least if self.least else 1.0


@dataclass(frozen=True)
class Finding:
    """A fault that running the kernel showed.

    Attributes:
        check: "bounds", "race", "uninitialised", "poison", "twice".
        where: file:line of the kernel, or "".
        what: one line in words.
    """

    kernel: str
    check: str
    where: str
    what: str


@dataclass(frozen=True)
class Checked:
    """That a check ran on a kernel, and what came of it: "clean", "found" or why it did not run."""

    kernel: str
    check: str
    outcome: str
    size: str = ""


@dataclass(frozen=True)
class Number:
    """Error of an op against float64 at one drawn shape, and the tolerance law's verdict."""

    op: str
    dtype: str
    shape: str
    what: str
    kernel: float
    pytorch: float
    allowed: float
    path: str = ""

    @property
    def agrees(self) -> bool:
        return self.kernel <= self.allowed


@dataclass(frozen=True)
class Saved:
    """Bytes that an op or a model keeps for its backward pass."""

    what: str
    shape: str
    provider: str
    bytes: int


@dataclass(frozen=True)
class HostCost:
    """Microseconds of Python from a call to its launches; the driver launches nothing."""

    what: str
    microseconds: float
    launches: int


@dataclass(frozen=True)
class Result:
    """Everything one run of the lab found."""

    versions: dict[str, str]
    rows: tuple[Row, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    checked: tuple[Checked, ...] = ()
    findings: tuple[Finding, ...] = ()
    numbers: tuple[Number, ...] = ()
    saved: tuple[Saved, ...] = ()
    host: tuple[HostCost, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def to_json(value: Any) -> Any:
    """A result, or a part of one, in what JSON has."""
    return asdict(value)


def from_json(kind: Any, value: Any) -> Any:
    """What `to_json` made of a value of a class of this module, back.

    Raises:
        KeyError, TypeError, ValueError: it is nothing of the kind.
    """
    origin, of = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    if origin in (Union, UnionType):
        if value is None:
            return None
        return from_json(next(k for k in of if k is not type(None)), value)
    if origin is tuple:
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(from_json(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        return {of[0](k): from_json(of[1], v) for k, v in value.items()}
    return value
