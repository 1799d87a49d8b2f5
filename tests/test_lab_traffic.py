"""Traffic counted in the interpreter, against closed forms; and what carries work to a process."""

import math
from typing import Any

import pytest

from fastgpt.lab import child, traffic
from fastgpt.lab.launch import DescriptorArg, Launch, TensorArg, load_kernel
from fastgpt.lab.result import Checked, Traffic

RIGHT = "tests/lab_kernels/right.py"


def vector(n: int, dtype: str = "f32") -> TensorArg:
    return TensorArg(dtype, (n,))


def copy(n: int, dtype: str = "f32", length: int = 0) -> Launch:
    x = vector(length or n, dtype)
    args = {"x_ptr": x, "y_ptr": x, "n": n, "BLOCK": 256}
    return Launch(f"{RIGHT}:copy", args, (-(-n // 256),))


def matmul(size: int) -> Launch:
    """size x size, in tiles of 32 x 64."""
    args = {name: TensorArg("bf16", (size, size)) for name in ("a_ptr", "b_ptr", "c_ptr")}
    sizes = dict.fromkeys("MNK", size) | {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}
    return Launch(f"{RIGHT}:matmul", args | sizes, (size // 32, size // 64), size=f"N={size}")


def with_descriptors() -> Launch:
    """M, N, K = 64, 96, 32 in tiles of 32 x 32 x 16; the last columns of c lie outside."""
    shapes = {"a_desc": (64, 32), "b_desc": (32, 88), "c_desc": (64, 88)}
    blocks = {"a_desc": (32, 16), "b_desc": (16, 32), "c_desc": (32, 32)}
    args = {n: DescriptorArg(TensorArg("f16", s), blocks[n]) for n, s in shapes.items()}
    sizes = {"K": 32, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    return Launch(f"{RIGHT}:matmul_descriptors", args | sizes, (2, 3))


def layer_norm(M: int, N: int, rows: int) -> Launch:
    """fastgpt's own, without residual and dropout."""
    wide, narrow, column = TensorArg("bf16", (M, N)), vector(N, "bf16"), vector(M)
    args: dict[str, Any] = dict.fromkeys(("x_ptr", "res_ptr", "y_ptr", "h_ptr"), wide)
    args |= {"w_ptr": narrow, "b_ptr": narrow, "mean_ptr": column, "rstd_ptr": column}
    args |= {"seed_ptr": vector(1, "i64"), "stride_x": N, "stride_r": N, "M": M, "N": N}
    args |= {"eps": 1e-5, "threshold": 0, "keep_scale": 1.0, "ROWS": rows, "HAS_BIAS": True}
    args |= {"BLOCK_N": 1 << (N - 1).bit_length(), "HAS_RESIDUAL": False, "DROPOUT": False}
    args |= {"PIECES": 1, "FULL": False, "CENTER": True, "xb_ptr": narrow, "HAS_X_BIAS": False}
    return Launch("fastgpt/kernels/layer_norm.py:_fwd_kernel", args, (-(-M // rows),))


HISTOGRAM = TensorArg("i32", (64,), values=tuple(i % 7 for i in range(64)))
LAUNCHES = {
    "copy": copy(1024),
    "tail": copy(1000),
    "half": copy(1000, "bf16"),
    "outside": copy(1300, length=1000),
    "row": Launch(
        f"{RIGHT}:add_row",
        {
            "x_ptr": TensorArg("f32", (64, 32)), "row_ptr": vector(32), "scale": 0.5,
            "y_ptr": TensorArg("f32", (64, 32)), "ROWS": 16, "COLS": 32,
        },
        (4,),
    ),
    "descriptors": with_descriptors(),
    "atomics": Launch(
        f"{RIGHT}:histogram",
        {"x_ptr": HISTOGRAM, "counts_ptr": vector(8, "i32"), "BLOCK": 32}, (2,),
    ),
    "choose": Launch(
        f"{RIGHT}:choose",
        {"a_ptr": vector(64), "b_ptr": vector(64), "y_ptr": vector(64), "BLOCK": 64}, (1,),
    ),
    "function": Launch(
        f"{RIGHT}:apply",
        {
            "x_ptr": vector(100), "y_ptr": vector(100), "n": 100, "BLOCK": 128,
            "ACT": load_kernel(f"{RIGHT}:double"),
        },
        (1,),
    ),
    "libdevice": Launch(
        f"{RIGHT}:tanh", {"x_ptr": vector(9), "y_ptr": vector(9), "n": 9, "BLOCK": 16}, (1,)
    ),
    "signature": Launch(f"{RIGHT}:tanh", {"x_ptr": vector(9), "y_ptr": vector(9), "n": 9}),
    "layer_norm": layer_norm(96, 80, 16),
    "gelu": Launch(f"{RIGHT}:nothing", {}, (1,)),
} | {f"matmul{size}": matmul(size) for size in (64, 128, 256)}  # fmt: skip


@pytest.fixture(scope="module")
def counted() -> dict[str, Traffic | Checked]:
    made, checked = traffic.measure(list(LAUNCHES.values()), "sm_90", timeout=60.0)
    left = iter(made)
    return {
        name: next(left) if outcome.outcome == "counted" else outcome
        for name, outcome in zip(LAUNCHES, checked, strict=True)
    }


def bytes_of(found: Traffic | Checked) -> tuple[int, int, int, int]:
    assert isinstance(found, Traffic), found
    return found.loaded, found.stored, found.least_loaded, found.least_stored


def test_a_copy_moves_each_byte_twice(counted: dict[str, Traffic]) -> None:
    assert bytes_of(counted["copy"]) == (4096,) * 4
    assert counted["copy"].moved == 2 * 4 * 1024
    assert counted["copy"].ratio == 1.0
    assert counted["copy"].target == "sm_90"


def test_masked_lanes_move_nothing(counted: dict[str, Traffic]) -> None:
    assert bytes_of(counted["tail"]) == (4000,) * 4
    assert bytes_of(counted["half"]) == (2000,) * 4
    assert counted["half"].size == "x_ptr bf16[1000] y_ptr bf16[1000]"


def test_a_broadcast_row_moves_once_for_each_program(counted: dict[str, Traffic]) -> None:
    tile = 4 * 64 * 32
    assert bytes_of(counted["row"]) == (tile + 4 * 4 * 32, tile, tile + 4 * 32, tile)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_matmul_reads_what_its_tiles_say(counted: dict[str, Traffic], size: int) -> None:
    found, square = counted[f"matmul{size}"], 2 * size * size
    reads = size // 64 * square + size // 32 * square
    assert bytes_of(found) == (reads, square, 2 * square, square)
    assert found.flops == 2 * size**3
    assert found.size == f"N={size}"


def test_growth_is_the_exponent(counted: dict[str, Traffic]) -> None:
    sizes = [64, 128, 256]
    moved, least = traffic.growth([counted[f"matmul{size}"] for size in sizes], sizes)
    # reads grow with the cube and writes with the square; least is three squares
    ends = [(n // 64 + n // 32 + 1) * n * n for n in (64, 256)]
    assert math.isclose(least, 2.0)
    assert math.isclose(moved, math.log(ends[1] / ends[0]) / math.log(4))
    with pytest.raises(ValueError, match=r"two of them different; got 1 measurements"):
        traffic.growth([counted["matmul64"]], [64])


def test_descriptors_count_what_lies_inside(counted: dict[str, Traffic]) -> None:
    a, b, c = 2 * 64 * 32, 2 * 32 * 88, 2 * 64 * 88
    assert bytes_of(counted["descriptors"]) == (3 * a + 2 * b, c, a + b, c)
    assert counted["descriptors"].flops == 2 * 64 * 96 * 32


def test_atomics_load_and_store_each_cell_once_an_access(counted: dict[str, Traffic]) -> None:
    cells = 4 * 7
    assert bytes_of(counted["atomics"]) == (256 + 2 * cells, 2 * cells, 256 + cells, cells)


def test_lanes_may_point_into_several_tensors(counted: dict[str, Traffic]) -> None:
    assert bytes_of(counted["choose"]) == (256,) * 4


def test_functions_and_libdevice_run(counted: dict[str, Traffic]) -> None:
    assert bytes_of(counted["function"]) == (400,) * 4
    assert bytes_of(counted["libdevice"]) == (36,) * 4


def test_layer_norm_reads_x_once_and_its_weights_once_a_program(
    counted: dict[str, Traffic],
) -> None:
    x, weights, stats = 2 * 96 * 80, 2 * 2 * 80, 2 * 4 * 96
    assert bytes_of(counted["layer_norm"]) == (x + 6 * weights, x + stats, x + weights, x + stats)
    assert counted["layer_norm"].ratio < 1.06


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("outside", "the kernel reads outside its tensors"),
        ("signature", "has no grid"),
        ("gelu", "has nothing named nothing"),
    ],
)
def test_what_cannot_be_counted_says_why(counted: dict[str, Checked], name: str, why: str) -> None:
    assert counted[name].outcome.startswith("not run: ")
    assert why in counted[name].outcome


def test_a_process_that_dies_takes_one_item() -> None:
    lines = ["1 + 1", "__import__('os').abort()", "1 / 0", "__import__('time').sleep(60)", "2 + 2"]
    found = child.apply("builtins:eval", [*lines, lambda: 0], timeout=1.0)
    assert found[0] == 2
    assert found[4] == 4
    whys = [
        "the process was ended by SIGABRT", "ZeroDivisionError: division by zero",
        "gave up after 1 s",
    ]  # fmt: skip
    assert [str(f) for f in found[1:4]] == whys
    assert "cannot be carried to another process" in str(found[5])
