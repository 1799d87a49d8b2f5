"""The tolerance law, on kernels right and wrong and on fastgpt's own ops."""

import math

import pytest
import torch

from fastgpt.lab import numbers, semantics
from fastgpt.lab.launch import Launch, TensorArg
from fastgpt.lab.result import Checked, Number

RIGHT, WRONG = "tests/lab_kernels/right.py", "tests/lab_kernels/wrong.py"
TANH_GELU, SIGMOID_GELU = 1.5957691216057308, 1.702  # 2 sqrt(2 / pi); another approximation's
needs_ttsem = pytest.mark.skipif(not semantics.available(), reason=semantics.MISSING)


def gelu(dtype: str, factor: float, reference: str = f"{RIGHT}:gelu_reference") -> Launch:
    x = TensorArg(dtype, (1000,))
    args = {"x_ptr": x, "y_ptr": x, "n": 1000, "FACTOR": factor, "BLOCK": 256}
    return Launch(f"{RIGHT}:gelu", args, (4,), reference=reference)


def sum_rows(reference: str) -> Launch:
    """x in bfloat16, sums in float32, means in bfloat16."""
    args = {
        "x_ptr": TensorArg("bf16", (10, 77)), "y_ptr": TensorArg("f32", (10,)),
        "m_ptr": TensorArg("bf16", (10,)), "N": 77, "BLOCK": 128,
    }  # fmt: skip
    return Launch(f"{RIGHT}:sum_rows", args, (10,), reference=f"{RIGHT}:{reference}")


def in_place() -> Launch:
    args = {"x_ptr": TensorArg("bf16", (100,)), "n": 100, "BLOCK": 128}
    reference = f"{RIGHT}:add_in_place_reference"
    return Launch(f"{RIGHT}:add_in_place", args, (1,), reference=reference)


def matmul() -> Launch:
    args = {name: TensorArg("bf16", (32, 32)) for name in ("a_ptr", "b_ptr", "c_ptr")}
    sizes = {"M": 32, "N": 32, "K": 32, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    return Launch(f"{RIGHT}:matmul", args | sizes, (2, 2), reference=f"{RIGHT}:matmul_reference")


LAUNCHES = {
    "right f32": gelu("f32", TANH_GELU),
    "right f16": gelu("f16", TANH_GELU),
    "right bf16": gelu("bf16", TANH_GELU),
    "wrong f32": gelu("f32", SIGMOID_GELU),
    "wrong f16": gelu("f16", SIGMOID_GELU),
    "wrong bf16": gelu("bf16", SIGMOID_GELU),
    "matmul": matmul(),
    "in place": in_place(),
    "several": sum_rows("sum_rows_reference"),
    "one of several": sum_rows("tanh_reference"),
    "of another kernel": sum_rows("matmul_reference"),
    "unknown": gelu("f32", TANH_GELU, f"{WRONG}:gelu_reference"),
    "shape": gelu("f32", TANH_GELU, f"{WRONG}:half_reference"),
    "outside": Launch(
        f"{RIGHT}:tanh",
        {"x_ptr": TensorArg("f32", (9,)), "y_ptr": TensorArg("f32", (9,)), "n": 16, "BLOCK": 16},
        (1,), reference=f"{RIGHT}:tanh_reference",
    ),
}  # fmt: skip
Compared = dict[str, tuple[list[Number], str]]


def by_launch(made: tuple[list[Number], list[Checked]]) -> Compared:
    """For every launch its numbers and outcome."""
    left, outcomes = list(made[0]), [c.outcome for c in made[1]]
    found: Compared = {}
    for name, outcome in zip(LAUNCHES, outcomes, strict=True):
        count = 0 if outcome.startswith("not run") else 2 if name == "several" else 1
        found[name], left = (left[:count], outcome), left[count:]
    assert not left
    return found


@pytest.fixture(scope="module")
def compared() -> Compared:
    return by_launch(numbers.launches(list(LAUNCHES.values()), timeout=60.0))


@needs_ttsem
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("right")])
def test_a_right_kernel_agrees(compared: Compared, name: str) -> None:
    (number,), outcome = compared[name]
    assert outcome == "clean"
    assert number.agrees
    assert (number.op, number.dtype, number.what) == ("right.gelu", name.split()[1], "y_ptr")
    assert number.path == "ttsem"
    assert 0.0 < number.kernel < 0.01


@needs_ttsem
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("wrong")])
def test_a_wrong_constant_does_not(compared: Compared, name: str) -> None:
    (number,), outcome = compared[name]
    assert outcome == "found"
    assert not number.agrees
    assert number.kernel > number.allowed >= 2 * number.pytorch


@needs_ttsem
def test_references_may_work_in_place_and_give_several(compared: Compared) -> None:
    assert compared["in place"][1] == compared["matmul"][1] == compared["several"][1] == "clean"
    named = {n.what: n for n in compared["several"][0]}
    assert {what: n.dtype for what, n in named.items()} == {"y_ptr": "f32", "m_ptr": "bf16"}
    assert named["y_ptr"].pytorch > 100 * named["y_ptr"].kernel  # its sums are rounded to bfloat16


@needs_ttsem
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one of several", "a dict of what is written is needed, which is y_ptr, m_ptr"),
        ("of another kernel", "its arguments must be the kernel's; got a_ptr, b_ptr"),
        ("unknown", "it must give tensors of the kernel's; got z_ptr"),
        ("shape", "y_ptr must be (1000,); got (500,)"),
        ("outside", "reads 7 elements past the end of x_ptr"),
    ],
)
def test_what_cannot_be_compared_says_why(compared: Compared, name: str, why: str) -> None:
    assert compared[name][0] == []
    assert compared[name][1].startswith("not run: ")
    assert why in compared[name][1]


def test_without_ttsem_the_interpreter_does_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantics, "available", lambda: False)
    found = by_launch(numbers.launches(list(LAUNCHES.values()), timeout=60.0))
    for name in ("right f32", "right f16"):
        assert found[name][1] == "clean"
        assert found[name][0][0].path == "interpreter"
    assert found["wrong f32"][1] == "found"
    assert found["right bf16"][1] == semantics.MISSING
    assert "reads outside its tensors" in found["outside"][1]


WHATS = {
    "attention": ["o", "dq", "dk", "dv"],
    "layer_norm": ["y", "h", "dx", "dresidual", "dweight", "dbias"],
    "ffn": ["y", "dx", "dw1", "db1", "dw2", "db2"],
    "rms_norm": ["y", "h", "dx", "dresidual", "dweight"],
    "embedding": ["h", "dwte", "dwpe"],
    "rotary": ["q", "k", "dq", "dk", "dq_weight", "dk_weight"],
    "quantized_linear": ["y", "dx", "dbias"],
    "cross_entropy": ["loss", "dlogits"],
    "linear_cross_entropy": ["loss", "dx", "dweight"],
}


@pytest.mark.parametrize(
    ("dtype", "where", "names"),
    [
        ("f32", "interpreter", list(WHATS)),
        pytest.param("bf16", "ttsem", ["layer_norm"], marks=needs_ttsem),
    ],
)
def test_fastgpts_ops_agree(dtype: str, where: str, names: list[str]) -> None:
    found, outcomes = numbers.ops(names, [dtype], shapes=1, seed=3, timeout=60.0)
    assert [(c.kernel, c.outcome) for c in outcomes] == [(op, "clean") for op in names]
    assert {op: [n.what for n in found if n.op == op] for op in names} == {
        op: WHATS[op] for op in names
    }
    assert {n.path for n in found} == {f"triton, {where}"}
    assert all(n.agrees and n.dtype == dtype for n in found)


def test_shapes_are_drawn_with_a_seed_and_not_twice() -> None:
    import random

    for op in numbers.OPS:
        first, again, other = (numbers._drawn(op, 4, random.Random(s)) for s in (0, 0, 1))
        assert first == again != other
        assert len(set(first)) == 4
        assert first[0][1] == 1
    with pytest.raises(ValueError, match=r"the ops are attention, layer_norm, ffn, .*; got gemm"):
        numbers.ops(["gemm"])


def test_the_law() -> None:
    truth = torch.tensor([1.0, 2.0, math.inf, math.nan], dtype=torch.float64)
    exact = truth.float()
    off, theirs, allowed = numbers.errors(exact, exact, truth)
    assert (off, theirs, allowed) == (0.0, 0.0, 1e-5)
    _, theirs, allowed = numbers.errors(exact, exact + torch.tensor([0.5, 0, 0, 0]), truth)
    assert (theirs, allowed) == (0.5, 1.0 + 1e-5)
    # a NaN, or an infinity, that is not there in truth agrees with nothing
    for value in (math.nan, math.inf):
        wrong = exact.clone()
        wrong[0] = value
        off, _, allowed = numbers.errors(wrong, exact, truth)
        assert not off <= allowed
