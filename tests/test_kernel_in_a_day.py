"""docs/kernel_in_a_day.md quotes its files as they are, and the kernel does what it says."""

import ast
import os
import re
import subprocess
import sys

import pytest
import triton

from fastgpt import lab
from fastgpt.lab.spec import read
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT

FOLDER = ROOT / "examples" / "kernel_in_a_day"
PAGE = (ROOT / "docs" / "kernel_in_a_day.md").read_text()
elsewhere = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="of the plain run on a CPU")


def test_the_page_quotes_the_files() -> None:
    sources = [file.read_text() for file in FOLDER.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    for block in blocks:
        assert any(block in source for source in sources), f"in no file:\n{block}"
    (spec,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert spec == (FOLDER / "lab.yaml").read_text()
    whole = "".join(blocks)
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert f" {node.name}(" in whole, f"the page does not show {node.name}"


@elsewhere
def test_the_kernel_and_its_benchmark_in_the_interpreter() -> None:
    """In a process of its own, since Triton is told at import; the times mean nothing there."""
    bench = (
        "import torch; from examples.kernel_in_a_day import benchmark as b;"
        " b.compiled = lambda f: f;"  # which saves the seconds of a C++ compiler
        " b.main('cpu', torch.float32, [(2, 40)], rounds=6)"
    )
    told = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "tests.conftest", str(FOLDER)]
    for words in (tests, ["-c", bench]):
        ran = subprocess.run([sys.executable, *words], env=told, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    for mode in ("forward", "backward", "both"):
        assert re.search(rf"N=40 {mode} kernel: \d+ us, ratio 1.00", ran.stdout), ran.stdout


@elsewhere
@pytest.mark.compile
def test_the_lab_says_what_the_page_shows() -> None:
    specs = read(FOLDER / "lab.yaml")
    targets = ["sm_90", "gfx942"]
    result = lab.study([lab.subject(spec) for spec in specs], targets, workers=0)
    for row in result.rows:
        assert row.error is None
        spills = (row.kernel, row.target) == ("first.whole_row_kernel", "sm_90")
        assert (row.spills > 0) == spills, (row.kernel, row.target, row.spills)
    if f"triton=={triton.__version__}" in (ROOT / "constraints.txt").read_text():
        for row in result.rows:
            table = PAGE.split(f"\n{row.kernel}  BLOCK_N=")[1].split("\n\n")[0]
            line = rf"^{row.target} +16 +{row.registers} +{row.spills} "
            assert re.search(line, table, re.M), (row.kernel, row.target, row.registers)


@pytest.mark.parametrize("page", ["flash_attention", "layer_norm", "gelu"])
def test_the_pages_of_kernels_name_functions_that_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    code = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    named = set(re.findall(r"`(_[a-z]\w+|[A-Z][A-Z_\d]{3,}|[a-z]+_[a-z_]+)`", text))
    missing = {name for name in named if not re.search(rf"\b{name}\b", code)}
    assert len(named) > 8 and not missing, missing
