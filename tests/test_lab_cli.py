"""fastgpt lab at the command line: files, gates, revisions, recording, each kind of bad input."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgpt import cli
from fastgpt.lab import cases, semantics
from fastgpt.lab.result import Result, from_json, to_json
from fastgpt.lab.spec import read
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT
from tests.lab_specs import FOLDER, RIGHT, copy_spec, run

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command says."""
    assert cli.main(["lab", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1, said
    return said.err.strip()


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
    assert "layer_norm, rms_norm" in said("softmax") and "'softmax'" in said("softmax")
    assert "takes B, T, H, D" in said("attention:Q=3")
    assert "must be int" in said("attention:D=wide")
    assert "must be at least 1" in said("attention:D=0")
    assert "are _fwd_kernel, _dq_kernel" in said("attention._bwd_kernel")
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
        if source.name == "attention_tiles.py":
            text = text.replace("_ATTENTION_FLOAT32 = {", "_ATTENTION_FLOAT32: dict = {")
            text = re.sub(r"\b(Tile|_tma)\(128, 128,", r"\1(64, 128,", text)
        (kernels / source.name).write_text(text)
    now = cases.launches("attention", "sm_100")[0]
    with revision.taken(str(kernels)):
        before = cases.launches("attention", "sm_100")[0]
    assert (now.variant["BLOCK_M"], before.variant["BLOCK_M"]) == (128, 64)
    assert before.kernel.startswith(str(kernels))
    assert cases.launches("attention", "sm_100")[0] == now


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
