"""The chips that kernels are compiled for: speeds and limits of one product per target.

    chip("sm_90").peak("16-bit")     # 989 TFLOP/s

Peaks are computed: multiprocessors x clock x 2 x multiply-adds a clock; a test holds them within
2 % of the published ones. Clocks are therefore those at which the vendor quotes its dense matrix
peak (H100's float32 peak is quoted at 1.98 GHz, its matrix peaks at 1.83).

Sources, NVIDIA. Warps, programs, registers, shared memory: CUDA C++ programming guide, technical
specifications per compute capability, and cuda_occupancy.h of CUDA 13. Float32, float64, integer,
special function and shuffle results a clock: its table of arithmetic throughput. Multiprocessors,
clocks, bandwidth, tensor rates: data sheets and the Turing (T4), A100, GA102, Ada, H100, Blackwell
and RTX Blackwell white papers. B200's clock is its 2.25 PFLOP/s over 148 x 4096 x 2.
Conversions: Nsight Compute's description of the ALU pipe, which packs float32 into 16 bits from
Ampere on; before that, and for int <-> float still, the special function unit does it at 16.

Sources, AMD. Compute units, clocks, bandwidth, peaks: data sheets and CDNA 2, 3, 4 and RDNA 3 white
papers. Registers, their granule, waves and work-groups: LLVM's AMDGPUBaseInfo. A SIMD takes a
wave64 in 4 cycles (CDNA) or a wave32 in 1 (RDNA 3), transcendentals at a quarter of that. Bytes of
CDNA 4's shared memory a clock: its announcement, of reads.

How far checked: limits of occupancy against cuda_occupancy.h and LLVM's own occupancy comments,
peaks against the published ones; the other rates are as commonly quoted from these documents.
Assumed, not sourced, the kinder figure where in doubt: that B200 does integers and load/store like
H100, that CDNA 4 has twice the transcendentals of CDNA 3, and that an AMD compute unit takes 32
lanes of memory instructions a clock. Results are of ordinary instructions: packed and dual-issued
ones (v_pk_fma_f32, v_dual_*) count once and do two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chip:
    """One product. Rates are lanes, that is results, a clock of one multiprocessor (compute unit).

    Attributes:
        target: as the compiler names it; name: the product.
        clock_ghz: where the dense matrix peak is quoted; bandwidth: of its memory, GB/s.
        products: multiply-adds a clock: "16-bit" with float32 accumulation, "8-bit", "tf32", and
            "fp32" without TF32, on the matrix pipe of CDNA and the vector pipe of the others.
        load_store: of memory instructions and shuffles; shared_bandwidth: bytes a clock.
        issue: warp instructions a clock; on AMD of each category.
        one_pipe: pipes that are one and the same hardware, so that their times add up.
        partitions: SIMDs or schedulers, each with its own register file.
        registers: 32-bit registers a lane of one partition; max_registers: the most of one thread.
        register_granule: threads get multiples of it.
        shared_total: bytes of one multiprocessor; shared_limit: the most that one program may ask.
        shared_reserved: bytes that every program takes beyond what it asked for.
        warps, programs: the most that are resident on one multiprocessor.
    """

    target: str
    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth: float
    products: Mapping[str, int] = field(hash=False)
    fp32: int
    shared_total: int
    shared_limit: int
    warps: int
    programs: int
    integer: int = 64
    convert: int = 64
    mufu: int = 16
    fp64: int = 2
    load_store: int = 32
    shared_bandwidth: int = 128
    warp_size: int = 32
    issue: int = 4
    one_pipe: tuple[str, ...] = ()
    partitions: int = 4
    registers: int = 512
    max_registers: int = 255
    register_granule: int = 8
    shared_granule: int = 128
    shared_reserved: int = 1024

    @property
    def nvidia(self) -> bool:
        return self.target.startswith("sm_")

    @property
    def bytes_a_clock(self) -> float:
        """One multiprocessor's share of the memory bandwidth, bytes a clock."""
        return self.bandwidth / (self.multiprocessors * self.clock_ghz)

    def rate(self, dtype_class: str) -> int:
        """Multiply-adds a clock of one multiprocessor.

        Raises:
            ValueError: this chip has no such products.
        """
        if dtype_class not in self.products:
            known = ", ".join(self.products)
            raise ValueError(f"dtype_class: {self.target} has {known}; got {dtype_class!r}")
        return self.products[dtype_class]

    def peak(self, dtype_class: str) -> float:
        """TFLOP/s of dense products: multiprocessors x clock x 2 x multiply-adds a clock."""
        return self.multiprocessors * self.clock_ghz * 2 * self.rate(dtype_class) / 1000


KB = 1024
_ALL = (
    # Turing moves 64 bytes a clock to and from shared memory (GA102 white paper), 16 lanes of 4.
    Chip(
        "sm_75", "T4", 40, 1.59, 320, {"16-bit": 512, "8-bit": 1024, "fp32": 64}, fp32=64,
        shared_total=64 * KB, shared_limit=64 * KB, warps=32, programs=16, convert=16,
        load_store=16, shared_bandwidth=64, shared_granule=256, shared_reserved=0,
    ),
    Chip(
        "sm_80", "A100 SXM 80GB", 108, 1.41, 2039,
        {"16-bit": 1024, "8-bit": 2048, "tf32": 512, "fp32": 64}, fp32=64,
        shared_total=164 * KB, shared_limit=163 * KB, warps=64, programs=32, fp64=32,
    ),
    # Not the RTX 3090: GeForce halves the rate of products that accumulate in float32.
    Chip(
        "sm_86", "A10", 72, 1.695, 600,
        {"16-bit": 512, "8-bit": 1024, "tf32": 256, "fp32": 128}, fp32=128,
        shared_total=100 * KB, shared_limit=99 * KB, warps=48, programs=16,
    ),
    # GeForce: 16-bit and float8 accumulate in float32 at half rate; an L40S has twice as much.
    Chip(
        "sm_89", "RTX 4090", 128, 2.52, 1008,
        {"16-bit": 256, "8-bit": 512, "tf32": 128, "fp32": 128}, fp32=128,
        shared_total=100 * KB, shared_limit=99 * KB, warps=48, programs=24,
    ),
    Chip(
        "sm_90", "H100 SXM5", 132, 1.83, 3350,
        {"16-bit": 2048, "8-bit": 4096, "tf32": 1024, "fp32": 128}, fp32=128,
        shared_total=228 * KB, shared_limit=227 * KB, warps=64, programs=32, fp64=64,
    ),
    # B300 (sm_103) doubles the special function unit to 32; B200 has H100's 16.
    Chip(
        "sm_100", "B200", 148, 1.85, 8000,
        {"16-bit": 4096, "8-bit": 8192, "tf32": 2048, "fp32": 128}, fp32=128,
        shared_total=228 * KB, shared_limit=227 * KB, warps=64, programs=32, fp64=64,
    ),
    Chip(
        "sm_120", "RTX 5090", 170, 2.407, 1792,
        {"16-bit": 256, "8-bit": 512, "tf32": 128, "fp32": 128}, fp32=128,
        shared_total=100 * KB, shared_limit=99 * KB, warps=48, programs=24, integer=128,
    ),
    Chip(
        "gfx90a", "MI250X, one of two dies", 110, 1.7, 1638.4,
        {"16-bit": 512, "8-bit": 512, "fp32": 128}, fp32=64,
        shared_total=64 * KB, shared_limit=64 * KB, warps=32, programs=16, fp64=64,
        warp_size=64, issue=1, one_pipe=("mufu", "fp32", "integer"), max_registers=512,
        shared_granule=512, shared_reserved=0,
    ),
    Chip(
        "gfx942", "MI300X", 304, 2.1, 5300,
        {"16-bit": 1024, "8-bit": 2048, "tf32": 512, "fp32": 128}, fp32=64,
        shared_total=64 * KB, shared_limit=64 * KB, warps=32, programs=16, fp64=64,
        warp_size=64, issue=1, one_pipe=("mufu", "fp32", "integer"), max_registers=512,
        shared_granule=512, shared_reserved=0,
    ),
    Chip(
        "gfx950", "MI355X", 256, 2.4, 8000,
        {"16-bit": 2048, "8-bit": 4096, "fp32": 128}, fp32=64,
        shared_total=160 * KB, shared_limit=160 * KB, warps=32, programs=16, fp64=64, mufu=32,
        warp_size=64, issue=1, one_pipe=("mufu", "fp32", "integer"), max_registers=512,
        shared_bandwidth=256, shared_granule=1280, shared_reserved=0,
    ),
    # Compute-unit mode: a work-group stays on one compute unit and its 64 KB. Published float32
    # and matrix peaks count dual issue.
    Chip(
        "gfx1100", "RX 7900 XTX", 96, 2.5, 960,
        {"16-bit": 256, "8-bit": 256, "fp32": 128}, fp32=64,
        shared_total=64 * KB, shared_limit=64 * KB, warps=32, programs=16, fp64=4,
        issue=2, one_pipe=("fp32", "integer"), partitions=2, registers=1536,
        max_registers=256, register_granule=24, shared_granule=512, shared_reserved=0,
    ),
)  # fmt: skip
CHIPS = {c.target: c for c in _ALL}
TARGETS = tuple(CHIPS)
"""Chips that the lab compiles for when it is not told which."""


def chip(target: str) -> Chip:
    """The product that stands for a target.

    Raises:
        ValueError: target is none of TARGETS.
    """
    if target not in CHIPS:
        raise ValueError(f"target: one of {', '.join(TARGETS)} is known; got {target!r}")
    return CHIPS[target]
