"""What a kernel's instructions cost on a chip: an upper bound, in cycles of one multiprocessor.

Each pipe works through what one program's warps send it in one pass through the stretch of code,
    cycles = warp instructions x warps x lanes of a warp / lanes that the pipe takes a clock,
and the pipe that takes longest leaves, at best,
    ceiling = useful tensor cycles / longest pipe           every pipe overlaps every other
    serial  = useful tensor cycles / (tensor pipe + longest other pipe)       nothing overlaps
of the chip's matrix peak. The tensor pipe is busy with useful x redundancy; only the useful part
counts as done. Resident programs share the pipes, so occupancy cancels.

A kernel without products is measured against memory instead: "dram" cycles are the bytes of all its
global accesses, each lane's mask taken for true, at the multiprocessor's share of the bandwidth.
In a kernel with products these bytes say little, since L2 serves most of them, so there is no dram.

Which pipe takes what:
    mufu        special functions; AMD transcendentals
    fp32        float32 and packed float16; float64 too, at its own rate
    integer     integers, moves and conversions
    load/store  lanes of every memory access that names registers, spills, atomics and shuffles;
                a bulk copy (TMA) is started by one thread and costs its issue slot only
    shared      bytes to and from shared memory, by lanes; what tensor cores (wgmma, tcgen05) and
                bulk copies move there by themselves is not in any instruction, and not seen
    vector      AMD: the pipes above that are one and the same SIMD, added up
    issue       every instruction takes a slot; AMD issues one of each category at a time, so
                there it is the longest category. Barriers, branches and scalars cost nothing else
"""

from fastgpt.lab.chips import Chip
from fastgpt.lab.result import Cost, Counts, Occupancy

LIMITS = (
    "A static count knows no time. It does not see: latency and how well warps hide it, L2 and its "
    "hits, wave quantisation and tails, clocks under power limits, bank conflicts and uncoalesced "
    "accesses, launch cost, how well the schedule overlaps the pipes, which side a data-dependent "
    "branch takes, warps that run different code (warp specialisation is counted as if all ran "
    "all of it), operands that tensor cores and bulk copies read by themselves. Against five "
    "published speeds of Triton's attention, serial x peak lies between -33 % and +38 %, and the "
    "rank over chips is poor (Spearman -0.2, n = 5). So: weak as a prediction, strong as a gate "
    "on one kernel and one chip, and never a claim to be faster than somebody."
)

_LANES = ("shared_load", "shared_store", "global_load", "global_store", "global_async")
_SHARED = ("shared_load", "shared_store", "global_async")
_GLOBAL = ("global_load", "global_store", "global_async")
# AMD: a SIMD starts one of each of these at a time, from different waves.
_CATEGORIES = (
    ("matrix", "mufu", "fp32", "fp64", "convert", "integer", "other"),
    ("uniform",),
    ("control", "barrier"),
    ("shared_load", "shared_store", "shuffle"),
    ("global_load", "global_store", "global_async", "spill_load", "spill_store", "atomic"),
)


def cost(
    counts: Counts,
    chip: Chip,
    warps: int,
    useful_flops: int,
    redundancy: float = 1.0,
    dtype_class: str = "16-bit",
) -> Cost:
    """Cycles of every pipe, and the ceiling = useful / longest that they leave (see above).

    Args:
        counts: of the stretch, per warp; warps: of one program.
        useful_flops: 2 a multiply-add, of the products asked for, per pass and program; 0 without.
        redundancy: issued over useful matrix work, at least 1.
        dtype_class: of the products, a key of chip.products.

    Raises:
        ValueError: no warps, negative FLOPs, redundancy under 1, products the chip does not have.
    """
    if warps < 1 or useful_flops < 0 or redundancy < 1:
        raise ValueError(
            "cost: warps >= 1, useful_flops >= 0 and redundancy >= 1 are needed; "
            f"got {warps}, {useful_flops} and {redundancy}"
        )
    useful = useful_flops / 2 / chip.rate(dtype_class)
    cycles = {"tensor": useful * redundancy} | _pipes(counts, chip, warps)
    goal, bound = "tensor", "tensor"
    if not useful_flops:
        goal, bound = "dram", "bandwidth"
        lanes = warps * chip.warp_size
        useful = _bytes(counts, _GLOBAL) * lanes / chip.bytes_a_clock
        cycles["dram"] = useful
    binding = max(cycles, key=lambda pipe: cycles[pipe])
    own = {goal}
    if useful_flops and not counts.kinds.get("matrix"):
        own |= {"fp32", "vector"}  # these made the products: not to be waited for a second time
    busy = max(time for pipe, time in cycles.items() if pipe in own)
    other = max(time for pipe, time in cycles.items() if pipe not in own)
    return Cost(
        cycles=cycles,
        binding=binding,
        useful_flops=useful_flops,
        redundancy=redundancy,
        ceiling=useful / cycles[binding] if useful else 0.0,
        serial=useful / (busy + other) if useful else 0.0,
        bound=bound,
        products=dtype_class,
    )


def _pipes(counts: Counts, chip: Chip, warps: int) -> dict[str, float]:
    """Cycles of all pipes but the tensor cores and the memory."""
    lanes = warps * chip.warp_size

    def n(*kinds: str) -> int:
        return sum(counts.kinds.get(kind, 0) for kind in kinds)

    bulk = sum(counts.widths.get(kind, {}).get(0, 0) for kind in _LANES)
    accesses = n(*_LANES, "spill_load", "spill_store", "atomic", "shuffle") - bulk
    cycles = {
        "mufu": n("mufu") * lanes / chip.mufu,
        # float64 has no place in these kernels: what matters is that it shows
        "fp32": lanes * (n("fp32") / chip.fp32 + n("fp64") / chip.fp64),
        "integer": lanes * (n("integer") / chip.integer + n("convert") / chip.convert),
        "load/store": accesses * lanes / chip.load_store,
        "shared": _bytes(counts, _SHARED) * lanes / chip.shared_bandwidth,
    }
    if chip.one_pipe:
        cycles["vector"] = sum(cycles[pipe] for pipe in chip.one_pipe)
    issued = counts.instructions if chip.nvidia else max(n(*kinds) for kinds in _CATEGORIES)
    return cycles | {"issue": issued * warps / chip.issue}


def _bytes(counts: Counts, kinds: tuple[str, ...]) -> int:
    """Bytes that one lane moves."""
    return sum(counts.bytes_a_lane(kind) for kind in kinds)


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> Occupancy:
    """How many programs fit on one multiprocessor; 0 where one does not.

    A warp takes its registers, rounded up to the granule, from one partition's file; a program
    takes its shared memory and the reserve, rounded up. cuda_occupancy.h; LLVM's AMDGPUBaseInfo.

    Args:
        registers: a thread, AMD's accumulators included; shared: bytes a program asks for.
        warps: of one program.

    Raises:
        ValueError: no warps, negative registers or bytes.
    """
    if warps < 1 or registers < 0 or shared < 0:
        raise ValueError(
            "occupancy: warps >= 1, registers >= 0 and shared >= 0 are needed; "
            f"got {warps}, {registers} and {shared}"
        )
    a_thread = max(1, -(-registers // chip.register_granule)) * chip.register_granule
    fitting = chip.partitions * (chip.registers // a_thread)
    taken = -(-(shared + chip.shared_reserved) // chip.shared_granule) * chip.shared_granule
    # AMD's limit is that of barriers, which a work-group of one wave does not need.
    most = chip.programs if chip.nvidia or warps > 1 else chip.warps
    limits = {
        "warps": chip.warps // warps,
        "programs": most,
        "registers": fitting // warps if registers <= chip.max_registers else 0,
        "shared memory": most if not taken else chip.shared_total // taken,
    }
    if shared > chip.shared_limit:
        limits["shared memory"] = 0
    limited_by = min(limits, key=lambda limit: limits[limit])
    programs = limits[limited_by]
    return Occupancy(programs, programs * warps, programs * warps / chip.warps, limited_by)


def roofline(useful_flops: int, bytes: int, chip: Chip, cost: Cost) -> tuple[float, float, str]:
    """Intensity in FLOP/byte, attainable TFLOP/s and what bounds it.

    attainable = min(peak x ceiling, bandwidth x intensity); without products, where the ceiling is
    a share of the bandwidth, ceiling x bandwidth x intensity. (Williams, Waterman, Patterson 2009)

    Args:
        useful_flops, bytes: of one launch; bytes that reach memory, each once.

    Returns:
        (intensity, TFLOP/s, "dram" or the pipe that binds).
    """
    if bytes < 1:
        raise ValueError(f"roofline: bytes >= 1 are needed; got {bytes}")
    intensity = useful_flops / bytes
    slope = chip.bandwidth * intensity / 1000
    if cost.bound == "bandwidth":
        return intensity, slope * cost.ceiling, cost.binding
    flat = chip.peak(cost.products) * cost.ceiling
    return intensity, min(flat, slope), cost.binding if flat <= slope else "dram"


def per_kflop(counts: Counts, useful_flops: int, warps: int) -> dict[str, float]:
    """Warp instructions per 1000 useful FLOPs of a program: "instructions", then each kind."""
    if useful_flops < 1:
        raise ValueError(f"per_kflop: useful_flops >= 1 are needed; got {useful_flops}")
    numbers = {"instructions": counts.instructions} | counts.kinds
    return {kind: n * warps * 1000 / useful_flops for kind, n in numbers.items() if n}


def per_element(whole: int, in_loops: int, threads: int, program: float, one_pass: float) -> float:
    """Thread instructions an element of a kernel without products, as far as the code tells.

    What stands in loops is shared by the elements of one pass, all else by those of one program.
    Each instruction is taken to run once a pass or program, on whichever side of a branch it is.

    Args:
        whole: instructions of the kernel, a warp; in_loops: those of them that are in a loop.
        threads: of one program.
        program, one_pass: elements that a program, and one pass of its loops, works through.

    Raises:
        ValueError: there are loops, and one_pass is not given.
    """
    if in_loops and not one_pass:
        raise ValueError("elements: the kernel has loops, and loop is not given")
    once = (whole - in_loops) / program if program else 0.0
    return threads * (once + (in_loops / one_pass if in_loops else 0.0))


def budget(chip: Chip, bytes: float) -> float:
    """Thread instructions that a chip can issue while its memory moves so many bytes.

    A kernel that spends more an element than the budget of the element's bytes is bound by issuing
    instructions, not by memory.
    """
    return chip.issue * chip.warp_size / chip.bytes_a_clock * bytes
