"""The cost model against hand-computed cases, published peaks and NVIDIA's occupancy calculator."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.lab.chips import TARGETS, Chip, chip
from fastgpt.lab.cost import budget, cost, occupancy, per_element, per_kflop, roofline
from fastgpt.lab.result import KINDS, MEMORY, Cost, Counts

# TFLOP/s, dense, as the vendors publish them: data sheets and white papers. 8-bit: int8 up to
# sm_86 and on gfx90a and gfx1100, else float8.
PUBLISHED: dict[str, dict[str, float]] = {
    "sm_75": {"16-bit": 65, "8-bit": 130, "fp32": 8.1},
    "sm_80": {"16-bit": 312, "8-bit": 624, "tf32": 156, "fp32": 19.5},
    "sm_86": {"16-bit": 125, "8-bit": 250, "tf32": 62.5, "fp32": 31.2},
    "sm_89": {"16-bit": 165.2, "8-bit": 330.3, "tf32": 82.6, "fp32": 82.6},
    "sm_90": {"16-bit": 989.4, "8-bit": 1978.9, "tf32": 494.7},
    "sm_100": {"16-bit": 2250, "8-bit": 4500, "tf32": 1125},
    "sm_120": {"16-bit": 209.5, "8-bit": 419, "tf32": 104.8, "fp32": 104.8},
    "gfx90a": {"16-bit": 191.5, "8-bit": 191.5, "fp32": 47.9},
    "gfx942": {"16-bit": 1307.4, "8-bit": 2614.9, "tf32": 653.7, "fp32": 163.4},
    "gfx950": {"16-bit": 2516.6, "8-bit": 5033.2, "fp32": 157.3},
    "gfx1100": {"16-bit": 122.8, "8-bit": 122.8, "fp32": 61.4},
}


def counts(widths: dict[str, dict[int, int]] | None = None, **kinds: int) -> Counts:
    widths = widths or {}
    return Counts(kinds | {kind: sum(n.values()) for kind, n in widths.items()}, widths=widths)


@pytest.mark.parametrize("target", TARGETS)
def test_rates_reproduce_published_peaks(target: str) -> None:
    for dtype_class, published in PUBLISHED[target].items():
        assert chip(target).peak(dtype_class) == pytest.approx(published, rel=0.02), dtype_class
    # the others' float32 peak is quoted at another clock, see below
    missing = set(chip(target).products) - set(PUBLISHED[target])
    assert missing == ({"fp32"} if target in ("sm_90", "sm_100") else set())


def test_h100_float32_is_published_at_its_boost_clock() -> None:
    assert chip("sm_90").peak("fp32") / 1.83 * 1.98 == pytest.approx(66.9, rel=0.02)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target: one of sm_75, .* is known; got 'sm_42'"):
        chip("sm_42")
    with pytest.raises(ValueError, match=r"sm_75 has 16-bit, 8-bit, fp32; got 'tf32'"):
        cost(Counts(), chip("sm_75"), 4, 2, 1.0, "tf32")


@pytest.mark.parametrize("target", TARGETS)
def test_limits_hang_together(target: str) -> None:
    c = chip(target)
    assert c.shared_limit + c.shared_reserved == c.shared_total
    assert c.warps % c.partitions == 0
    assert c.max_registers <= c.registers
    least = occupancy(c, c.max_registers, c.shared_limit, 4)
    assert least.programs == 1
    assert occupancy(c, 1, 0, c.warps // c.programs).programs == c.programs
    assert hash(c) == hash(chip(target))


# CUDA 13's cuda_occupancy.h gives these; registers 255 take 256, and a program's 1 KB comes on top.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "limited_by"),
    [
        ("sm_80", 254, 48 * 1024, 4, 2, "registers"),
        ("sm_80", 32, 0, 8, 8, "warps"),
        ("sm_80", 33, 0, 8, 6, "registers"),
        ("sm_80", 32, 0, 1, 32, "programs"),
        ("sm_80", 64, 40 * 1024, 4, 4, "shared memory"),  # 4 x 41 KB are all of 164
        ("sm_80", 64, 40 * 1024 + 1, 4, 3, "shared memory"),
        ("sm_80", 64, 163 * 1024, 4, 1, "shared memory"),
        ("sm_80", 64, 163 * 1024 + 1, 4, 0, "shared memory"),
        ("sm_80", 168, 0, 5, 2, "registers"),  # 12 warps, 3 in each partition
        ("sm_75", 64, 32 * 1024, 4, 2, "shared memory"),  # nothing is reserved here
        ("sm_89", 32, 0, 1, 24, "programs"),
        ("sm_90", 168, 0, 12, 1, "registers"),
        ("sm_120", 40, 0, 4, 12, "warps"),
    ],
)
def test_occupancy_of_nvidia(
    target: str, registers: int, shared: int, warps: int, programs: int, limited_by: str
) -> None:
    got = occupancy(chip(target), registers, shared, warps)
    assert (got.programs, got.limited_by) == (programs, limited_by)
    assert got.warps == programs * warps
    assert got.share == got.warps / chip(target).warps


# Waves a SIMD as LLVM prints them ("; Occupancy:"), times SIMDs, in whole programs.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs", "limited_by"),
    [
        ("gfx942", 64, 0, 4, 8, "warps"),  # 512 / 64 = 8 waves
        ("gfx942", 65, 0, 4, 7, "registers"),  # 512 / 72
        ("gfx942", 155, 0, 8, 1, "registers"),  # 3 waves on 4 SIMDs are one and a half programs
        ("gfx942", 257, 0, 4, 1, "registers"),
        ("gfx942", 64, 32 * 1024, 4, 2, "shared memory"),
        ("gfx942", 64, 0, 1, 32, "warps"),  # a lone wave needs no barrier
        ("gfx942", 32, 0, 2, 16, "warps"),
        ("gfx950", 64, 64 * 1024, 4, 2, "shared memory"),  # in granules of 1280 bytes
        ("gfx1100", 256, 0, 4, 2, "registers"),  # 1536 / 264 = 5 waves on each of 2 SIMDs
        ("gfx1100", 96, 0, 4, 8, "warps"),
    ],
)
def test_occupancy_of_amd(
    target: str, registers: int, shared: int, warps: int, programs: int, limited_by: str
) -> None:
    got = occupancy(chip(target), registers, shared, warps)
    assert (got.programs, got.limited_by) == (programs, limited_by)


def test_a_known_share_of_occupancy() -> None:
    assert occupancy(chip("sm_80"), 254, 48 * 1024, 4).share == 0.125
    assert occupancy(chip("sm_80"), 32, 0, 8).share == 1.0


# One instruction of each kind, 4 warps: lanes / lanes a clock. None: only an issue slot.
@pytest.mark.parametrize(
    ("target", "kind", "pipe", "cycles"),
    [
        ("sm_80", "mufu", "mufu", 4 * 32 / 16),
        ("sm_80", "fp32", "fp32", 4 * 32 / 64),
        ("sm_90", "fp32", "fp32", 4 * 32 / 128),
        ("sm_75", "fp64", "fp32", 4 * 32 / 2),
        ("sm_80", "integer", "integer", 4 * 32 / 64),
        ("sm_120", "integer", "integer", 4 * 32 / 128),
        ("sm_80", "convert", "integer", 4 * 32 / 64),
        ("sm_75", "convert", "integer", 4 * 32 / 16),
        ("sm_80", "shuffle", "load/store", 4 * 32 / 32),
        ("sm_80", "atomic", "load/store", 4 * 32 / 32),
        ("sm_75", "spill_load", "load/store", 4 * 32 / 16),
        ("sm_80", "barrier", None, 0),
        ("sm_80", "control", None, 0),
        ("sm_80", "uniform", None, 0),
        ("gfx942", "fp32", "vector", 4 * 64 / 64),
        ("gfx942", "mufu", "vector", 4 * 64 / 16),
        ("gfx942", "convert", "vector", 4 * 64 / 64),
        ("gfx1100", "fp32", "vector", 4 * 32 / 64),
        ("gfx1100", "mufu", "mufu", 4 * 32 / 16),
    ],
)
def test_what_an_instruction_costs(target: str, kind: str, pipe: str | None, cycles: float) -> None:
    got = cost(Counts(kinds={kind: 1}), chip(target), 4, 0).cycles
    assert got["issue"] == 4 / chip(target).issue
    if pipe:
        assert got[pipe] == cycles
    busy = {p for p, time in got.items() if time} - {"issue", "vector"}
    assert len(busy) == (1 if pipe else 0)


def test_a_shared_pipe_adds_up() -> None:
    mix = counts(fp32=8, integer=4, convert=2, mufu=3)
    assert cost(mix, chip("gfx942"), 4, 0).cycles["vector"] == 4 * (8 + 4 + 2 + 3 * 4)
    # RDNA's transcendentals have a unit beside the vector pipe
    assert cost(mix, chip("gfx1100"), 4, 0).cycles["vector"] == 4 / 2 * (8 + 4 + 2)
    assert "vector" not in cost(mix, chip("sm_90"), 4, 0).cycles


def test_amd_issues_each_category_for_itself() -> None:
    mix = counts(fp32=3, integer=2, uniform=9, barrier=1, shared_load=4, global_load=6)
    assert cost(mix, chip("gfx942"), 8, 0).cycles["issue"] == 9 * 8
    assert cost(mix, chip("gfx1100"), 8, 0).cycles["issue"] == 9 * 8 / 2
    assert cost(mix, chip("sm_80"), 8, 0).cycles["issue"] == 25 * 8 / 4


def test_memory_is_counted_in_lanes_and_in_bytes() -> None:
    moves = counts({"shared_load": {16: 3}, "shared_store": {4: 2}, "global_async": {16: 1, 0: 5}})
    got = cost(moves, chip("sm_90"), 8, 0).cycles
    assert got["load/store"] == (3 + 2 + 1) * 8 * 32 / 32  # 5 bulk copies: one thread each
    assert got["shared"] == (3 * 16 + 2 * 4 + 16) * 8 * 32 / 128
    assert got["issue"] == 11 * 8 / 4
    assert cost(moves, chip("gfx950"), 8, 0).cycles["shared"] == (48 + 8 + 16) * 8 * 64 / 256


@pytest.mark.parametrize(
    ("target", "ratio"), [("sm_80", 0.5), ("sm_90", 1.0), ("sm_100", 2.0)]
)  # fmt: skip
def test_exponentials_of_attention_with_head_dim_64(target: str, ratio: float) -> None:
    """Each score takes 2 x 64 multiply-adds in two products, and one exponential.

    reference: 0.50 on A100, 1.00 on H100, 2.01 (from rounded peaks) on B200; FA4 and FA3 papers.
    """
    c, warps, (M, N, D) = chip(target), 4, (128, 64, 64)
    exps = M * N // (warps * 32)
    got = cost(counts(mufu=exps, matrix=1), c, warps, 4 * M * N * D)
    assert got.cycles["mufu"] / got.cycles["tensor"] == ratio
    assert got.ceiling == min(1.0, 1 / ratio)
    assert got.serial == 1 / (1 + ratio)
    assert got.binding == ("mufu" if ratio > 1 else "tensor")
    seconds = 1 / got.ceiling / (c.peak("16-bit") * 1e12)
    if target == "sm_100":
        assert 1e-12 / seconds == pytest.approx(1121, rel=0.001)  # TFLOP/s, MUFU-bound


def test_redundant_products_occupy_but_do_not_count() -> None:
    once = cost(counts(mufu=1, matrix=8), chip("sm_80"), 4, 2 * 1024 * 100)
    twice = cost(counts(mufu=1, matrix=8), chip("sm_80"), 4, 2 * 1024 * 100, 2.0)
    assert (once.cycles["tensor"], once.ceiling, once.serial) == (100, 1.0, 100 / 109)
    assert (twice.cycles["tensor"], twice.ceiling, twice.serial) == (200, 0.5, 100 / 209)
    assert (twice.bound, twice.useful_flops, twice.redundancy) == ("tensor", 204800, 2.0)


def test_products_of_ordinary_instructions_wait_for_themselves_once() -> None:
    fma = 1000  # a warp's, of 32 multiply-adds each
    got = cost(counts(fp32=fma), chip("sm_80"), 4, 2 * fma * 32 * 4, dtype_class="fp32")
    assert got.cycles["tensor"] == got.cycles["fp32"] == 2000
    assert (got.ceiling, got.serial) == (1.0, 2000 / 3000)  # and issue, 1000


def test_a_kernel_without_products_is_held_against_the_memory() -> None:
    c = chip("sm_80")
    moves = {"global_load": {16: 2}, "global_store": {16: 1}}
    light, heavy = counts(moves, fp32=4), counts(moves, fp32=400)
    dram = 48 * 4 * 32 / (2039 / (108 * 1.41))
    got = cost(light, c, 4, 0)
    assert got.cycles["dram"] == pytest.approx(dram)
    assert (got.binding, got.ceiling, got.bound) == ("dram", 1.0, "bandwidth")
    assert got.serial == pytest.approx(dram / (dram + 12))  # load/store: 3 x 128 / 32
    got = cost(heavy, c, 4, 0)
    assert got.binding == "fp32"
    assert got.ceiling == pytest.approx(dram / 800)
    assert "dram" not in cost(light, c, 4, 1000).cycles


def test_nothing_costs_nothing() -> None:
    got = cost(Counts(), chip("sm_90"), 4, 0)
    assert set(got.cycles.values()) == {0.0}
    assert (got.ceiling, got.serial) == (0.0, 0.0)


def mixes(*, memory: bool) -> st.SearchStrategy[dict[str, int]]:
    names = KINDS if memory else [k for k in KINDS if not k.startswith("global")]
    return st.dictionaries(st.sampled_from(names), st.integers(0, 1000))


@given(
    target=st.sampled_from(TARGETS),
    base=mixes(memory=True),
    extra=mixes(memory=True),
    width=st.sampled_from([0, 1, 4, 16]),
    warps=st.sampled_from([1, 2, 4, 8, 16]),
    flops=st.integers(1, 10**9),
)
def test_an_instruction_more_never_raises_the_ceiling(
    target: str, base: dict[str, int], extra: dict[str, int], width: int, warps: int, flops: int
) -> None:
    both = {k: base.get(k, 0) + extra.get(k, 0) for k in base | extra}
    less, more = (
        cost(Counts(kinds=k, widths={m: {width: k.get(m, 0)} for m in MEMORY}), c, warps, flops)
        for c in [chip(target)]
        for k in (base, both)
    )
    assert 0 < more.ceiling <= less.ceiling <= 1
    assert more.serial <= less.ceiling
    if not extra.get("matrix") or base.get("matrix"):
        assert more.serial <= less.serial
    assert all(more.cycles[pipe] >= less.cycles[pipe] for pipe in less.cycles)


@given(
    target=st.sampled_from(TARGETS),
    base=mixes(memory=False),
    extra=mixes(memory=False),
    loads=st.integers(1, 100),
)
def test_nor_that_of_a_kernel_without_products(
    target: str, base: dict[str, int], extra: dict[str, int], loads: int
) -> None:
    both = {k: base.get(k, 0) + extra.get(k, 0) for k in base | extra}
    widths = {"global_load": {16: loads}}
    less, more = (
        cost(Counts(kinds=k | {"global_load": loads}, widths=widths), chip(target), 4, 0)
        for k in (base, both)
    )
    assert 0 < more.ceiling <= less.ceiling <= 1
    assert more.serial <= less.serial


@given(
    target=st.sampled_from(TARGETS),
    registers=st.integers(0, 600),
    shared=st.integers(0, 300_000),
    warps=st.integers(1, 64),
)
def test_what_fits_fits(target: str, registers: int, shared: int, warps: int) -> None:
    c = chip(target)
    got = occupancy(c, registers, shared, warps)
    assert got.warps <= c.warps
    assert got.programs * shared <= c.shared_total
    assert got.programs * warps * registers <= c.partitions * c.registers
    assert occupancy(c, registers + 1, shared + 1, warps).programs <= got.programs


def test_roofline() -> None:
    c = chip("sm_80")
    half = Cost({}, "issue", 1, 1.0, 0.5, 0.3, "tensor")
    intensity, speed, bound = roofline(10**9, 10**6, c, half)
    assert (intensity, speed, bound) == (1000, c.peak("16-bit") / 2, "issue")
    intensity, speed, bound = roofline(10**7, 10**6, c, half)
    assert (intensity, bound) == (10, "dram")
    assert speed == pytest.approx(20.39)
    stream = Cost({}, "fp32", 0, 1.0, 0.8, 0.4, "bandwidth")
    intensity, speed, bound = roofline(10**7, 10**6, c, stream)
    assert (intensity, bound) == (10, "fp32")
    assert speed == pytest.approx(0.8 * 20.39)


def test_instructions_per_kflop() -> None:
    mix = counts(fp32=30, mufu=10, integer=0)
    assert per_kflop(mix, 16_000, 4) == {"instructions": 10, "fp32": 7.5, "mufu": 2.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: cost(Counts(), c, 0, 1), "got 0, 1 and 1.0"),
        (lambda c: cost(Counts(), c, 4, 1, 0.5), "got 4, 1 and 0.5"),
        (lambda c: occupancy(c, -1, 0, 4), "got 4, -1 and 0"),
        (lambda c: roofline(1, 0, c, cost(Counts(), c, 4, 1)), "got 0"),
        (lambda c: per_kflop(Counts(), 0, 4), "got 0"),
    ],
)
def test_nonsense_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(chip("sm_90"))


def test_a_chip_cannot_be_changed() -> None:
    c: Chip = chip("sm_90")
    with pytest.raises(AttributeError):
        c.warps = 1  # type: ignore[misc]


def test_instructions_an_element() -> None:
    # 2 warps, 768 elements a program: 120 instructions of 64 threads
    assert per_element(120, 0, 64, 768, 0) == 10.0
    # 20 of them once a program of 7680, 100 in a loop over 1000 at a time
    assert per_element(120, 100, 64, 7680, 1000) == pytest.approx(64 * (20 / 7680 + 0.1))
    with pytest.raises(ValueError, match="the kernel has loops, and loop is not given"):
        per_element(120, 100, 64, 7680, 0)


@pytest.mark.parametrize(
    ("target", "bytes", "instructions"),
    [("sm_80", 4, 38), ("sm_90", 4, 37), ("sm_100", 4, 18), ("sm_100", 6, 26), ("gfx942", 4, 31)],
)
def test_the_budget_that_memory_gives(target: str, bytes: float, instructions: int) -> None:
    """Four warp instructions a clock, or one of 64 lanes, over the multiprocessor's bytes."""
    assert round(budget(chip(target), bytes)) == instructions
