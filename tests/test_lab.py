"""The lab: kernels of anybody's, compiled for every chip with no GPU, from specs."""

from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from fastgpt import lab
from fastgpt.lab.chips import chip
from fastgpt.lab.cost import budget
from fastgpt.lab.launch import DescriptorArg, TensorArg
from fastgpt.lab.spec import evaluate, from_mapping, read
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA
from tests.lab_specs import COSTLY, RIGHT, copy_spec, run

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]


# Compiling


def test_a_kernel_of_ones_own_on_every_chip() -> None:
    result = run(copy_spec(), targets=lab.TARGETS)
    assert [row.target for row in result.rows] == list(lab.TARGETS)
    for row in result.rows:
        assert row.error is None, row.error
        assert row.spills == 0 and 0 < row.registers < 64 and row.shared == 0, row
        assert row.occupancy is not None and row.occupancy.share > 0.5
        assert row.cost is not None and row.cost.binding == "dram" and row.cost.ceiling == 1.0
        # 1024 elements of 2 bytes by 4 warps: 16 bytes a lane of 32, 8 where there are 64.
        lanes = 4 * lab.chip(row.target).warp_size
        assert row.whole.bytes_a_lane("global_load") == 2 * 1024 // lanes, row.target
        assert row.whole.bytes_a_lane("global_store") == 2 * 1024 // lanes, row.target
        assert {line.file for line in row.lines} == {str(RIGHT)}


def test_the_same_by_signature_alone() -> None:
    args = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32:16", "BLOCK": 1024}
    bare = run(copy_spec(args=args, grid=None)).rows[0]
    assert bare.error is None
    assert bare.whole == run(copy_spec()).rows[0].whole


def test_a_number_that_16_does_not_divide_costs_the_wide_mask_not_the_code() -> None:
    args = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "BLOCK": 1024}
    odd = run(copy_spec(args=args, grid=None)).rows[0]
    assert odd.whole.wide_share() == 0.0 and run(copy_spec()).rows[0].whole.wide_share() == 1.0


def test_seeded_bug_a_spilling_tile_breaks_the_gate() -> None:
    spec = lab.Spec(
        f"{COSTLY}:spilling",
        {"x_ptr": "bf16[R, C]", "y_ptr": "f32[R, C]", "N": 8, "ROWS": "R", "COLS": "C"},
        grid=[1],
        sizes={"R": 32, "C": 512},
        options={"num_warps": 1},
    )
    result = run(spec, copy_spec())
    row = result.rows[0]
    assert row.spills > 1000 and row.spill_instructions > 100, row
    (broken,) = lab.gate(result, "spills == 0 and smem <= limit")
    assert broken.startswith("costly.spilling sm_90: spills ")


def test_seeded_bug_a_scalar_load_breaks_the_gate() -> None:
    args = {"x_ptr": "bf16[S * N]", "y_ptr": "bf16[S * N]", "stride": "S", "BLOCK": 1024}
    spec = lab.Spec(f"{COSTLY}:strided", args, grid=[64], sizes={"N": 65536, "S": 3})
    result = run(spec, copy_spec())
    assert lab.gate(result, "wide >= 0.5") == ["costly.strided sm_90: wide 0.00"]


def test_what_a_row_does_not_have_breaks_no_rule_and_traffic_must_be_counted() -> None:
    result = run(copy_spec())
    assert result.rows[0].cost is not None and result.rows[0].cost.useful_flops == 0
    assert lab.gate(result, "per_kflop < 1 and spills == 0") == []
    assert lab.gate(result, "per_kflop < 1 and registers < 2") != []
    with pytest.raises(ValueError, match="traffic is counted --with traffic"):
        lab.gate(result, "traffic <= 1.1")


def test_a_kernel_that_does_not_compile_is_reported_with_its_line_beside_the_others() -> None:
    spec = lab.Spec(f"{COSTLY}:fails", {"x_ptr": "bf16[N]", "BLOCK": "N"}, sizes={"N": 128})
    result = run(spec, copy_spec(), targets=("sm_80", "gfx942"))
    line = next(
        n for n, text in enumerate(COSTLY.read_text().splitlines(), 1) if "FAULT inner" in text
    )
    for row in result.rows[:2]:
        assert row.error is not None and row.error.startswith(f"{COSTLY}:{line}: "), row.error
        assert "undefined" in row.error and "\n" not in row.error
    assert [row.error for row in result.rows[2:]] == [None, None]
    assert len(lab.gate(result, "True")) == 2


def test_a_compiler_that_crashes_takes_no_other_kernel_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAB_TEST_CRASH", "1")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its environment is older
    args = {"x_ptr": "bf16[N]", "y_ptr": "bf16[N]", "n": "N"}
    crashing = lab.Spec(f"{COSTLY}:tuned", args, grid=[1], sizes={"N": 128})
    seen: list[tuple[str, int, int]] = []
    result = lab.study(
        [lab.subject(crashing), lab.subject(copy_spec())],
        ["sm_90"],
        workers=2,
        progress=lambda *what: seen.append(what),
    )
    assert [row.error for row in result.rows] == ["the compiler crashed its process", None]
    assert [(done, of) for _, done, of in seen] == [(1, 2), (2, 2)]


def test_the_configurations_of_an_autotuner() -> None:
    spec = lab.Spec(f"{COSTLY}:tuned", {"x_ptr": "bf16[N]", "y_ptr": "bf16[N]", "n": "N"},
                    grid=["cdiv(N, BLOCK)"], sizes={"N": 1000})  # fmt: skip
    (first,) = run(spec).rows
    assert first.variant == {"BLOCK": 128, "EVEN": False} and first.warps == 1
    every = run(spec, configs="all").rows
    assert [(r.variant["BLOCK"], r.warps) for r in every] == [(128, 1), (256, 2), (512, 4)]


def test_rows_are_cached_by_source_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgpt.lab import analyse

    file = tmp_path / "mine.py"
    file.write_text(RIGHT.read_text())
    compiled: list[str] = []
    inner = analyse._analyse

    def counted(launch: Any, target: str) -> Any:
        compiled.append(launch.name)
        return inner(launch, target)

    monkeypatch.setattr(analyse, "_analyse", counted)
    spec = copy_spec(kernel=f"{file}:copy")
    first = run(spec)
    assert run(spec).rows == first.rows and compiled == ["mine.copy"]
    run(copy_spec(kernel=f"{file}:copy", options={"num_warps": 8}))
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "mine.py"
    file.write_text(RIGHT.read_text())
    monkeypatch.setattr("fastgpt.lab.analyse.write_whole", full)
    (row,) = run(copy_spec(kernel=f"{file}:copy")).rows
    assert row.error is None and row.registers > 0


# What a spec says


def test_specs_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "k.py").write_text(RIGHT.read_text())
    (tmp_path / "k.yaml").write_text(
        "kernel: k.py:matmul_descriptors\n"
        "sizes: {M: 256, K: 64}\n"
        "args:\n"
        "  a_desc: {descriptor: 'f16[M, K]', block: [64, 32]}\n"
        "  b_desc: {descriptor: 'f16[K, M]', block: [32, 64]}\n"
        "  c_desc: {descriptor: 'f16[M, M]', block: [64, 64]}\n"
        "  K: K\n  BLOCK_M: 64\n  BLOCK_N: 64\n  BLOCK_K: 32\n"
        "grid: [M // BLOCK_M, 'cdiv(M, BLOCK_N)']\n"
        "options: {num_warps: 4, num_stages: 2}\n"
    )
    (spec,) = read(tmp_path / "k.yaml")
    (launch,) = spec.launches()
    assert launch.grid == (4, 4) and launch.args["K"] == 64
    assert launch.args["a_desc"] == DescriptorArg(TensorArg("f16", (256, 64)), (64, 32))
    row = run(spec).rows[0]
    assert row.error is None and row.loop is not None and row.cost is not None
    assert row.cost.useful_flops == 2 * 64 * 64 * 32  # of one pass of the loop


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cdiv(N, 4) * 2", 6), ("2 ** 3 - 1", 7), ("next_power_of_2(N)", 16), ("-N // 2", -5),
        ("N in (9, 10) and not N > 9", True), ("1 < N <= 9", True), ("max(N, 20)", 20),
    ],
)  # fmt: skip
def test_expressions(text: str, value: object) -> None:
    assert evaluate(text, {"N": 9}) == value


@pytest.mark.parametrize(
    "text", ["__import__('os')", "N.real", "(lambda: 1)()", "[x for x in (1,)]", "N[0]", "1 +", "Q"]
)
def test_expressions_run_no_code(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expression "):
        evaluate(text, {"N": 9})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"args": {}}, "must have kernel and args"),
        ({"kernel": "a.py:k", "args": {}, "gird": [1]}, "got gird"),
        ({"kernel": "a.py:k", "args": {}, "grow": {"N": [1]}}, "grow has N"),
    ],
)
def test_a_spec_that_is_none(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_mapping(said, Path())


def test_instructions_an_element_are_held_against_the_budget() -> None:
    spec = replace(copy_spec(), elements={"launch": "N", "bytes": 4})
    result = run(spec, copy_spec())
    row, bare = result.rows
    assert row.per_element == row.whole.instructions * row.warps * 32 / 1024
    assert row.budget == budget(chip("sm_90"), 4)
    assert (bare.per_element, bare.budget) == (None, None)
    assert lab.gate(result, "per_element <= budget") == []  # what a row does not have breaks none
    assert len(lab.gate(result, "per_element <= 1")) == 1


def test_scores_of_attention_are_elements_of_its_main_loop() -> None:
    row = run("attention._fwd_kernel").rows[0]
    assert row.loop is not None and row.cost is not None and row.per_element is not None
    scores = row.cost.useful_flops / (2 * 2 * 64)  # two products of head dim 64
    assert row.per_element == pytest.approx(row.loop.instructions * row.warps * 32 / scores)


@pytest.mark.parametrize(
    ("elements", "error"),
    [
        ({"all": 1}, "elements has launch, loop, bytes; got all"),
        ({"bytes": 4}, "launch or loop above 0"),
        ({"launch": "Q"}, "known are .*; got 'Q'"),
    ],
)
def test_bad_elements_are_refused(elements: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        replace(copy_spec(), elements=elements).launches()
