"""Kernels with one fault each, found in their line; and right ones, in which none is found."""

from pathlib import Path
from typing import Any

import pytest

from fastgpt.lab import sanitize, semantics
from fastgpt.lab.launch import DescriptorArg, Launch, TensorArg
from fastgpt.lab.sanitize import CHECKS

pytestmark = pytest.mark.skipif(not semantics.available(), reason=semantics.MISSING)

RIGHT, WRONG = "tests/lab_kernels/right.py", "tests/lab_kernels/wrong.py"


def vector(n: int, dtype: str = "f32", fill: str | None = None) -> TensorArg:
    return TensorArg(dtype, (n,), fill=fill)


def two(name: str, inputs: int, outputs: int, grid: int, **rest: Any) -> Launch:
    """A kernel from x to y."""
    args = {"x_ptr": vector(inputs), "y_ptr": vector(outputs)} | rest
    return Launch(name, args, (grid,))


def descriptor(rows: int, columns: int) -> DescriptorArg:
    return DescriptorArg(TensorArg("bf16", (rows, columns)), (32, 32))


FAULTS = {
    "dropped_mask": two(f"{WRONG}:dropped_mask", 1000, 1000, 4, n=1000, BLOCK=256),
    "dropped_store_mask": two(f"{WRONG}:dropped_store_mask", 1000, 1000, 4, n=1000, BLOCK=256),
    "add_to_one_cell": two(f"{WRONG}:add_to_one_cell", 64, 1, 2, BLOCK=32),
    "lanes_disagree": two(f"{WRONG}:lanes_disagree", 32, 32, 1, BLOCK=32),
    "forgets_the_tail": two(f"{WRONG}:forgets_the_tail", 1000, 1000, 4, n=1000, BLOCK=256),
    "sums_masked_lanes": two(f"{WRONG}:sums_masked_lanes", 100, 1, 1, n=100, BLOCK=128),
    "adds_to_its_output": Launch(
        f"{WRONG}:adds_to_its_output",
        {"x_ptr": vector(64), "y_ptr": vector(64, fill="nan"), "BLOCK": 32}, (2,),
    ),
    "float_atomics": two(f"{WRONG}:float_atomics", 128, 1, 4, BLOCK=32),
    "divides": Launch(f"{WRONG}:divides", {"y_ptr": vector(8, "i32"), "n": 0, "BLOCK": 8}, (1,)),
}  # fmt: skip
CLEAN = {
    "copy": two(f"{RIGHT}:copy", 1000, 1000, 4, n=1000, BLOCK=256),
    "slices": Launch(  # out of one storage into another part of it
        f"{RIGHT}:copy",
        {
            "x_ptr": TensorArg("bf16", (500,), storage=0),
            "y_ptr": TensorArg("bf16", (500,), storage=0, offset=512), "n": 500, "BLOCK": 256,
        },
        (2,),
    ),
    "nan": Launch(
        f"{RIGHT}:copy",
        {"x_ptr": vector(300), "y_ptr": vector(300, fill="nan"), "n": 300, "BLOCK": 256}, (2,),
    ),
    "descriptors": Launch(
        f"{RIGHT}:matmul_descriptors",
        {
            "a_desc": descriptor(64, 32), "b_desc": descriptor(32, 80),
            "c_desc": descriptor(64, 80), "K": 32, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32,
        },
        (2, 3),
    ),
    "integer_atomics": Launch(
        f"{RIGHT}:histogram",
        {
            "x_ptr": TensorArg("i32", (64,), values=tuple(i % 7 for i in range(64))),
            "counts_ptr": vector(8, "i32"), "BLOCK": 32,
        },
        (2,),
    ),
    "in_place": Launch(f"{RIGHT}:add_in_place", {"x_ptr": vector(99), "n": 99, "BLOCK": 64}, (2,)),
    "large": two(f"{WRONG}:reads_much", 1 << 15, 1 << 15, 140, BLOCK=1 << 15),
    "missing": two(f"{RIGHT}:nothing", 1, 1, 1),
}  # fmt: skip
LAUNCHES = FAULTS | CLEAN
Found = dict[str, tuple[dict[str, str], list[tuple[str, str, str]]]]


@pytest.fixture(scope="module")
def examined() -> Found:
    """For every launch the outcome of each check, and (check, where, what) of its findings."""
    found: Found = {}
    outcomes, findings = sanitize.check(list(LAUNCHES.values()), timeout=60.0)
    for i, (name, launch) in enumerate(LAUNCHES.items()):
        mine = outcomes[i * len(CHECKS) : (i + 1) * len(CHECKS)]
        assert [c.check for c in mine] == list(CHECKS)
        assert {c.kernel for c in mine} == {launch.name}
        found[name] = ({c.check: c.outcome for c in mine}, [])
    for one in findings:
        name = one.kernel.removeprefix("wrong.")
        found[name][1].append((one.check, one.where, one.what))
    return found


@pytest.mark.parametrize(
    ("kernel", "check", "what"),
    [
        ("dropped_mask", "bounds", "reads 24 elements past the end of x_ptr"),
        ("dropped_store_mask", "bounds", "writes 24 elements past the end of y_ptr"),
        ("add_to_one_cell", "race", "both touch element 0 of `y_ptr`"),
        ("lanes_disagree", "race", "two lanes of one store write one address differently"),
        ("forgets_the_tail", "poison", "232 of 1000 elements of y_ptr never written"),
        ("sums_masked_lanes", "uninitialised", "1 of 1 elements of y_ptr depend on lanes that"),
        ("adds_to_its_output", "uninitialised", "reads 64 of 64 elements of y_ptr that nothing"),
        ("float_atomics", "twice", "1 of 1 elements of y_ptr have other bits"),
        ("divides", "poison", "integer division by zero"),
    ],
)
def test_a_fault_is_found_in_its_line(examined: Found, kernel: str, check: str, what: str) -> None:
    outcomes, findings = examined[kernel]
    ((found, where, said),) = findings
    assert found == check
    assert what in said
    assert "\n" not in said
    assert outcomes[check] == "found"
    assert all(o == "clean" or o.startswith("not run: ") for c, o in outcomes.items() if c != check)
    marked = [
        n for n, line in enumerate(Path(WRONG).read_text().splitlines(), 1)
        if line.endswith(f"FAULT {kernel}")
    ]  # fmt: skip
    assert where == (f"{WRONG}:{marked[0]}" if marked else "")


@pytest.mark.parametrize("name", ["copy", "slices", "nan", "descriptors"])
def test_a_right_kernel_is_clean(examined: Found, name: str) -> None:
    assert examined[name] == (dict.fromkeys(CHECKS, "clean"), [])


@pytest.mark.parametrize(
    ("name", "tensor"), [("integer_atomics", "counts_ptr"), ("in_place", "x_ptr")]
)
def test_what_is_changed_in_place_keeps_its_input(examined: Found, name: str, tensor: str) -> None:
    outcomes, findings = examined[name]
    assert findings == []
    assert (
        outcomes.pop("poison") == f"not run: {tensor}, taken as in place, being read before written"
    )
    assert set(outcomes.values()) == {"clean"}


def test_too_many_accesses_are_said(examined: Found) -> None:
    outcomes, findings = examined["large"]
    assert findings == []
    unchecked = {c for c, o in outcomes.items() if o == sanitize.TOO_LARGE}
    assert unchecked == {"race", "uninitialised", "poison"}
    assert outcomes["bounds"] == outcomes["twice"] == "clean"


def test_a_kernel_that_is_not_there_is_said(examined: Found) -> None:
    assert all("has nothing named nothing" in o for o in examined["missing"][0].values())


def test_without_ttsem_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantics, "available", lambda: False)
    outcomes, findings = sanitize.check([CLEAN["copy"]])
    assert findings == []
    assert [c.outcome for c in outcomes] == [semantics.MISSING] * len(CHECKS)
