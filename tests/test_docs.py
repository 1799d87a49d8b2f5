"""The site builds without a warning, and every public name is on it."""

import os
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType

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
