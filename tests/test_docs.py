"""The site builds without a warning, with every public name, and its examples are right."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

import fastgpt
from fastgpt.cli import USAGE
from tests.conftest import ROOT

PACKAGES = """
fastgpt fastgpt.ops fastgpt.functional fastgpt.layers fastgpt.model fastgpt.patching
fastgpt.huggingface fastgpt.generation.speculative fastgpt.interpret fastgpt.train
fastgpt.train.checkpoint fastgpt.data fastgpt.optim fastgpt.parallel fastgpt.lora fastgpt.privacy
fastgpt.plan fastgpt.lab
""".split()


def test_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    told = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True)
    assert made.returncode == 0 and "WARNING" not in made.stderr, made.stderr
    assert (tmp_path / "source/examples/lab/softmax.py").is_file(), "files outside docs/"

    # Sphinx's inventory: four lines, then an object a line, its name first.
    *_, packed = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)
    there = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType):
                home = f"{getattr(value, '__module__', '')}.{name}"
                assert {f"{package}.{name}", home} & there, f"{package}.{name} is on no page"


def test_the_examples_of_docstrings() -> None:
    """What they print is what they say; those named are among them."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    shown = set()
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type | FunctionType):
                for test in finder.find(value, name, globs={"torch": torch, "fastgpt": fastgpt}):
                    if test.examples:
                        shown.add(name)
                        assert runner.run(test).failed == 0, f"{package}.{name}"
    assert shown >= {
        "attention", "layer_norm", "rms_norm", "ffn", "cross_entropy", "explain", "GPT", "generate",
        "complete", "patch", "compress", "capture_attention",
    }  # fmt: skip


@pytest.mark.parametrize("page", ["index", "dropin", "troubleshooting"])
def test_a_page(page: str) -> None:
    """Its Python runs from top to bottom, and prints or raises what stands below."""
    said = (ROOT / "docs" / f"{page}.md").read_text()
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", said, re.S | re.M)
    assert len(blocks) == said.count("```python")
    for code, printed in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(code, f"{page}.md", "exec"), names)
            except (ValueError, TypeError) as error:
                print(f"{type(error).__name__}: {error}")
        assert out.getvalue() == printed, code


def test_the_page_of_commands_has_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert re.findall(r"^  (\w+) ", USAGE, re.M) == re.findall(r"^\| `(\w+)`", page, re.M)
