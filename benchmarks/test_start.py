"""How long it takes until something happens: `import fastgpt` beside `import torch`, and --help."""

import subprocess
import sys
from typing import Any

import pytest

STARTS = {
    "import torch": ["-c", "import torch"],
    "import fastgpt, all of it": ["-c", "from fastgpt import *"],
    "fastgpt --help": ["-m", "fastgpt", "--help"],
    "fastgpt bench --help": ["-m", "fastgpt", "bench", "--help"],
}


@pytest.mark.parametrize("what", STARTS)
def test_start(benchmark: Any, what: str) -> None:
    command = [sys.executable, *STARTS[what]]
    benchmark.group = "start"
    benchmark.pedantic(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
        rounds=5, warmup_rounds=1,
    )  # fmt: skip
