"""What the lab's pages say is what it does, and docs/kernels.md is what the kernels are."""

import re
import shlex
from pathlib import Path

import pytest
import triton
import yaml

from fastgpt import cli, lab
from fastgpt.lab.spec import read
from fastgpt.lab.table import COLUMNS
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]

TABLE = ROOT / "docs" / "kernels.md"
PAGE = (ROOT / "docs" / "lab.md").read_text()
MADE_WITH = re.search(r"^Made by `(.*)` with Triton (\S+)\.$", TABLE.read_text(), re.M)


@pytest.mark.slow
def test_the_table_of_kernels_is_current_and_every_kernel_holds_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make tables` writes it; the gate is for every chip that fastgpt's kernels run on."""
    assert MADE_WITH is not None
    command, version = MADE_WITH.groups()
    if triton.__version__ != version:
        pytest.skip(f"docs/kernels.md is of Triton {version}")
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    _, *words = shlex.split(command)
    assert cli.main(words) == 0
    assert Path("docs/kernels.md").read_text() == TABLE.read_text(), "stale: make tables"
    ops = words[1 : words.index("--with")]
    code = cli.main(["lab", *ops, "--gate", "spills == 0 and smem <= limit and redundancy == 1"])
    assert code == 0, capsys.readouterr().err


def test_the_table_is_of_the_triton_that_is_installed_by_default() -> None:
    """With another pin the test above would be skipped for ever."""
    assert MADE_WITH is not None
    assert f"triton=={MADE_WITH[2]}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_products_read_their_operands_16_bytes_at_a_time_or_in_bulk() -> None:
    subjects = [lab.subject("ffn._up_kernel"), lab.subject("ffn._dh_kernel")]
    for row in lab.study(subjects, ["sm_80", "sm_90", "gfx950"], workers=0).rows:
        assert row.loop is not None
        for kind in ("global_load", "global_async"):
            assert set(row.loop.widths.get(kind, {})) <= {16, 0}, (row.kernel, row.target)


def test_the_page_names_every_column_of_a_gate() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.split("A rule is an expression of columns:")[1]))
    assert set(COLUMNS) - {"warps", "limited_by", "bound"} <= named, set(COLUMNS) - named


def test_the_pages_python_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(block.replace("lab.study(", "lab.study(workers=0, subjects="), {})
    assert re.search(r"^sm_90 \d+ 0 0\.0$", capsys.readouterr().out, re.M)


def test_the_pages_spec_is_the_file() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    file = ROOT / "examples" / "lab" / "softmax.yaml"
    assert yaml.safe_load(block) == yaml.safe_load(file.read_text())


def test_the_pages_first_finding(capsys: pytest.CaptureFixture[str]) -> None:
    """A row of 1000 elements has no wide access, one of 1008 nothing else."""
    (spec,) = read(ROOT / "examples" / "lab" / "softmax.yaml")
    shares = []
    for N in (1000, 1008):
        sized = lab.Spec(spec.kernel, spec.args, spec.grid, spec.options, {"M": 8192, "N": N})
        (row,) = lab.study([lab.subject(sized)], ["sm_90"], workers=0).rows
        shares.append(row.whole.wide_share())
    assert shares == [0.0, 1.0]


def test_ligers_layer_norm_from_its_own_package_beside_ours() -> None:
    pytest.importorskip("liger_kernel")
    theirs = lab.subject(str(ROOT / "examples" / "lab" / "liger_layer_norm.yaml"))
    result = lab.study([theirs, lab.subject("layer_norm")], ["sm_80", "gfx942"], workers=0)
    rows = {(row.kernel, row.target): row for row in result.rows}
    for target in ("sm_80", "gfx942"):
        liger = rows["liger.layer_norm_forward", target]
        ours = rows["layer_norm._fwd_kernel", target]
        assert liger.error is None and ours.error is None
        assert liger.cost is not None and liger.cost.bound == "bandwidth"
        # A row at a time either way; ours reads the residual stream as well.
        assert ours.whole.bytes_a_lane("global_load") > liger.whole.bytes_a_lane("global_load")
        assert any("layer_norm.py" in line.file for line in liger.lines)
