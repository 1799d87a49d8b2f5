"""The lab: kernels of anybody's, on every chip, with no GPU; and each kind of bad input."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fastgpt import cli, lab
from fastgpt.lab import cases, memory, semantics
from fastgpt.lab.launch import DescriptorArg, TensorArg
from fastgpt.lab.result import Result, from_json, to_json
from fastgpt.lab.spec import evaluate, from_mapping, read
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]

FOLDER = ROOT / "tests" / "lab_kernels"
RIGHT, COSTLY = FOLDER / "right.py", FOLDER / "costly.py"


def copy_spec(dtype: str = "bf16", **changes: Any) -> lab.Spec:
    said: dict[str, Any] = {
        "kernel": f"{RIGHT}:copy",
        "args": {"x_ptr": f"{dtype}[N]", "y_ptr": f"{dtype}[N]", "n": "N", "BLOCK": 1024},
        "grid": ["cdiv(N, BLOCK)"],
        "sizes": {"N": 65536},
        "options": {"num_warps": 4},
    }
    return lab.Spec(**(said | changes))


def run(*specs: lab.Spec, targets: tuple[str, ...] = ("sm_90",), **how: Any) -> Result:
    subjects = [lab.subject(spec) for spec in specs]
    found: Result = lab.study(subjects, targets, workers=0, **how)
    return found


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command says."""
    assert cli.main(["lab", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1, said
    return said.err.strip()


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


# The command line


def test_the_command_writes_tables_json_csv_and_holds_a_gate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        f"{RIGHT}:copy", "--args", "x_ptr=bf16[N]", "y_ptr=bf16[N]", "n=N", "BLOCK=1024",
        "--sizes", "N=4096", "--grid", "cdiv(N, BLOCK)", "--options", "num_warps=4",
        "--target", "sm_80", "gfx942", "--workers", "0",
    ]  # fmt: skip
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    assert cli.main(["lab", *words, *files, "--gate", "spills == 0 and smem <= limit"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^right\.copy  BLOCK=1024$", out, re.M) and "the gate holds" in out
    assert re.search(r"^sm_80 +4 +\d+ +0 +0 ", out, re.M)
    result = from_json(Result, json.loads((tmp_path / "a.json").read_text()))
    assert [row.target for row in result.rows] == ["sm_80", "gfx942"]
    assert from_json(Result, json.loads(json.dumps(to_json(result)))) == result
    table = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [(line["target"], line["spills"]) for line in table] == [("sm_80", "0"), ("gfx942", "0")]

    assert cli.main(["lab", *words, "--gate", "registers < 2"]) == 1
    said = capsys.readouterr()
    assert said.err.count("gate: right.copy") == 2 and "the gate is broken" in said.out

    assert cli.main(["lab", *words, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import triton\n\nraise RuntimeError('no such luck')\n")
    words = tmp_path / "words.yaml"
    words.write_text("just words")
    own = ["--args", "x_ptr=bf16[64]", "y_ptr=bf16[64]", "n=64", "BLOCK=64"]

    def said(*args: str) -> str:
        return one_line(capsys, *args)

    assert "sm_42" in said("layer_norm", "--target", "sm_42")
    assert "attention, ffn" in said("softmax") and "'softmax'" in said("softmax")
    assert "takes B, T, H, D" in said("attention:Q=3")
    assert "must be int" in said("attention:D=wide")
    assert "must be at least 1" in said("attention:D=0")
    assert "are _fwd_kernel, _delta_kernel" in said("attention._bwd_kernel")
    assert "is not a file" in said("nowhere.yaml")
    assert "is not a file" in said("nowhere.py:kernel", *own)
    assert "it has no kernel" in said(str(empty))
    assert "no @triton.jit function" in said(f"{empty}:kernel", *own)
    assert "its kernels are copy, add_row" in said(str(RIGHT))
    assert "line 3 cannot be imported; RuntimeError: no such luck" in said(f"{broken}:k", *own)
    assert "must have kernel and args" in said(str(words))
    assert "needs --args for its parameters x_ptr, y_ptr, n, BLOCK" in said(f"{RIGHT}:copy")
    assert "missing BLOCK; unknown BLOK" in said(f"{RIGHT}:copy", *own[:-1], "BLOK=64")
    assert "got 'f17'" in said(f"{RIGHT}:copy", "--args", "x_ptr=f17[64]", *own[2:])
    assert "got 'spils'" in said("layer_norm", "--gate", "spils == 0")
    assert "--with traffic" in said("layer_norm", "--gate", "traffic < 2")
    assert "NAME=VALUE" in said(f"{RIGHT}:copy", "--args", "x_ptr")
    assert "is not a file" in said("record", "nowhere.py")


def test_what_is_good_is_reported_beside_what_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    spec = str(ROOT / "examples" / "lab" / "softmax.yaml")
    words = ["lab", "softmax", spec, "nowhere.yaml", "--target", "sm_80", "sm_81", "--workers", "0"]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert re.search(r"^sm_80 +4 ", said.out, re.M) and "\n1 kernel on 1 chip in " in said.out
    errors = said.err.splitlines()
    assert len(errors) == 3 and "'sm_81'" in errors[0] and "'softmax'" in errors[1], errors
    assert errors[2] == "lab: nowhere.yaml is not a file"


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    said = one_line(capsys, str(ROOT / "examples" / "lab" / "softmax.yaml"))
    assert said == "lab: needs the package yaml; pip install 'fastgpt-triton[lab]'"


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.lab import analyse

    def missing(*_: Any) -> Any:
        raise FileNotFoundError(2, "this build of triton came without it", "nvdisasm")

    monkeypatch.setattr("fastgpt.lab.isa.disassemble", missing)
    monkeypatch.setattr(analyse, "_cached", lambda path: None)
    (row,) = run(copy_spec()).rows
    assert row.error is not None and "nvdisasm" in row.error and "\n" not in row.error


# Comparing


def test_lines_are_those_of_the_file_at_hand_though_triton_caches_by_source(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(RIGHT.read_text() + f"\nCOPY = {str(tmp_path)!r}\n")
        (row,) = run(copy_spec(kernel=f"{file}:copy")).rows
        assert {line.file for line in row.lines} == {str(file)}
        assert any("tl.store" in line.text for line in row.lines)


def test_two_kernels_and_two_revisions_side_by_side(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    file, spec = tmp_path / "mine.py", tmp_path / "mine.yaml"
    file.write_text(RIGHT.read_text())
    spec.write_text(
        "kernel: mine.py:copy\nsizes: {N: 4096}\ngrid: [4]\n"
        "args: {x_ptr: 'bf16[N]', y_ptr: 'bf16[N]', n: N, BLOCK: 1024}\n"
    )
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    contiguous = "offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"
    apart = "offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * 3"
    file.write_text(RIGHT.read_text().replace(contiguous, apart, 1))
    words = ["lab", "compare", f"{spec}@HEAD", str(spec), "--target", "sm_90", "--workers", "0"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"mine\.copy +sm_90 +wide +1\.00 +0\.00 +-100%", out), out
    assert cli.main([*words, "--gate", "wide == 1"]) == 1
    capsys.readouterr()
    git("commit", "-qam", "second")
    assert cli.main(words) == 0
    assert "no column differs" in capsys.readouterr().out
    assert "HEAD~5" in one_line(capsys, "compare", f"{spec}@HEAD~5", str(spec))


def test_fastgpts_own_kernels_at_a_revision(tmp_path: Path) -> None:
    from fastgpt.lab import revision

    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for source in (ROOT / "kernels").glob("*.py"):
        text = source.read_text()
        if source.name == "tiles.py":
            text = text.replace("_ATTENTION_FLOAT32 = {", "_ATTENTION_FLOAT32: dict = {")
            text = re.sub(r"Tile\(128, 128, 8, 3\)", "Tile(64, 128, 8, 3)", text)
        (kernels / source.name).write_text(text)
    now = cases.launches("attention", "sm_90")[0]
    with revision.taken(str(kernels)):
        before = cases.launches("attention", "sm_90")[0]
    assert (now.variant["BLOCK_M"], before.variant["BLOCK_M"]) == (128, 64)
    assert before.kernel.startswith(str(kernels))
    assert cases.launches("attention", "sm_90")[0] == now


# Recording


def test_a_recorded_program_is_a_spec(tmp_path: Path) -> None:
    if not semantics.available():
        pytest.skip(semantics.MISSING)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "from right import copy, histogram\n"
        "for n in (1000, 1000, 64):\n"
        "    x = torch.randn(2, n, device='cuda', dtype=torch.bfloat16)[1]\n"
        "    y = torch.empty(n, device='cuda', dtype=torch.bfloat16)\n"
        "    copy[(-(-n // 256),)](x, y, n, BLOCK=256, num_warps=2)\n"
        "    assert torch.equal(x, y)\n"
        "counts = torch.zeros(4, device='cuda', dtype=torch.int32)\n"
        "histogram[(1,)](torch.tensor([0, 3, 3, 1], device='cuda'), counts, BLOCK=4)\n"
    )
    out = tmp_path / "launches.yaml"
    assert cli.main(["lab", "record", "-o", str(out), str(script)]) == 0
    said = yaml.safe_load(out.read_text())
    assert [one["kernel"] for one in said] == [f"{RIGHT}:copy"] * 2 + [f"{RIGHT}:histogram"]
    assert said[0]["args"]["x_ptr"] == {"tensor": "bf16[1000]", "offset": 1000}
    assert said[0]["grid"] == [4] and said[0]["options"]["num_warps"] == 2
    assert said[2]["args"]["x_ptr"] == {"tensor": "i64[4]", "values": [0, 3, 3, 1]}
    rows = run(*read(out)).rows
    assert [row.error for row in rows] == [None] * 3 and [row.warps for row in rows][:2] == [2, 2]


# Memory and host


def test_saved_bytes_are_those_of_autograd() -> None:
    x = torch.zeros(64, 32, requires_grad=True)
    w = torch.zeros(16, 32, requires_grad=True)

    def call() -> torch.Tensor:
        return torch.nn.functional.linear(x.tanh(), w).exp()

    # tanh keeps its output, which linear keeps too: once; exp keeps its own. w is a parameter.
    assert memory.saved_bytes(call, [w]) == 4 * (64 * 32 + 64 * 16)
    assert memory.saved_bytes(call) == 4 * (64 * 32 + 64 * 16 + 16 * 32)
    with torch.no_grad():
        assert memory.saved_bytes(call) == 0


def test_fake_tensors_weigh_what_real_ones_do() -> None:
    def build() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.LayerNorm(48))
        x = torch.zeros(8, 16, 48, requires_grad=True)
        return model, lambda: model(x)

    model, call = build()
    assert memory.of_model(build) == memory.saved_bytes(call, model.parameters())


def test_the_kernels_keep_what_they_promise() -> None:
    """Layer norm: h, mean and rstd. Attention: q, k, v, o, lse. ffn: x and pre-activation."""
    M, N = 512, 768
    kept = {
        name: {row.provider: row.bytes for row in memory.of_op(*cases.parse(said))}
        for name, said in {
            "layer_norm": f"layer_norm:M={M},N={N}",
            "attention": "attention:B=2,T=128,H=4,D=64",
            "ffn": f"ffn:M={M},C={N},F={4 * N}",
        }.items()
    }
    assert kept["layer_norm"]["fastgpt"] == 2 * M * N + 2 * 4 * M
    assert kept["attention"]["fastgpt"] == 4 * 2 * (2 * 128 * 4 * 64) + 4 * 2 * 4 * 128
    assert kept["ffn"]["fastgpt"] == 2 * (M * N + M * 4 * N)
    for name in ("layer_norm", "ffn"):
        assert kept[name]["fastgpt"] < kept[name]["PyTorch"]


def test_host_cost_counts_the_launches_of_an_op() -> None:
    from fastgpt.lab import host

    launches = {row.what: row.launches for name in cases.OPS for row in host.of_op(name)}
    assert launches == {
        "layer_norm, forward": 1, "layer_norm, forward and backward": 3,
        "attention, forward": 1, "attention, forward and backward": 4,
        "ffn, forward": 1, "ffn, forward and backward": 2,
    }  # fmt: skip
    (launch,) = copy_spec().launches()
    cost = host.of_launch(launch)
    assert cost.launches == 1 and 0 < cost.microseconds < 1e5
