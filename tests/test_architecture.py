"""The rules of the house, executable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OPS = (
    "attention", "attention_decode", "layer_norm", "rms_norm", "ffn", "embedding", "adamw",
    "rotary", "cross_entropy", "linear_cross_entropy", "quantized_linear",
)  # fmt: skip
# What may import what: a layer sees those before it.
LAYERS = {
    "kernels": 0, "ops": 1, "sharded": 1, "functional": 2, "norms": 2, "transformer": 2,
    "cache": 2, "layers": 2, "quantized": 2, "optim": 2, "config": 2, "model": 3, "layouts": 3,
    "gguf_file": 3, "pretrained": 3, "lora": 3, "adapters": 3,
    "tokenizer": 4, "data": 4, "decode": 4, "decoder": 4, "generation": 5, "parallel": 4,
    "train": 5, "answers": 5,
    "compress": 6, "prune": 6, "privacy": 6, "lab": 6, "interpret": 6,
    "demo": 7, "bench": 7, "huggingface": 5, "patching": 6, "cli": 8,
    "tune_ops": 6, "tune": 7, "warmup": 7, "plan": 7,
}  # fmt: skip
SOURCES = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "fastgpt").rglob("*.py")]


def place(file: Path) -> str:
    """The layer a file belongs to."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__main__":
        return "cli"
    return "kernels" if "kernels" in parts else parts[1]


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_four_places(op: str) -> None:
    for folder in ("kernels", "fastgpt/ops", "benchmarks"):
        assert (ROOT / folder / f"{op}.py").is_file(), folder
    assert (ROOT / "tests" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    here = LAYERS.get(place(file), 99)
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "fastgpt" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS[parts[1]] <= here, f"{file.name} imports {name}"


def test_kernels_import_torch_and_triton_only() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(file)}
        allowed = {"torch", "triton", "fastgpt", "dataclasses", "typing", "contextlib"}
        allowed |= {"functools", "inspect", "collections"}
        assert roots <= allowed, file


def test_kernels_is_no_package_and_is_linked() -> None:
    """A top-level package `kernels` would be taken for Hugging Face's by transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastgpt" / "kernels").resolve() == (ROOT / "kernels").resolve()


def test_the_environment_is_read_in_one_place() -> None:
    readers = [f for f in SOURCES if re.search(r"os\.(environ|getenv)", f.read_text())]
    assert {f.relative_to(ROOT).as_posix() for f in readers} <= {
        "fastgpt/ops/backend.py", "fastgpt/lab/child.py", "fastgpt/parallel/layout.py"
    }  # fmt: skip


@pytest.mark.parametrize("said", ["from fastgpt import *", "import fastgpt.cli"])
def test_importing_asks_nothing_of_the_machine(said: str) -> None:
    code = (
        "import torch, sys\n"
        "def no(*a, **k): raise SystemExit('asked for a GPU')\n"
        "torch.cuda.is_available = torch.cuda.init = torch.cuda.get_device_properties = no\n"
        f"{said}\n"
        "banned = {'triton', 'transformers', 'tokenizers', 'jsonargparse', 'yaml'}\n"
        "print(sorted(banned & set(sys.modules)))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.strip() == "[]", got.stdout + got.stderr


@pytest.mark.parametrize(
    "argv",
    ["--help", "demo --help", "generate --help", "chat --help", "next --help", "bench --help",
     "bench compare --help", "lab --help", "lab compare --help", "explain --help"],
)  # fmt: skip
def test_help_does_without_torch(argv: str) -> None:
    """Which takes a second to import; benchmarks/test_start.py has the times."""
    code = (
        "import sys, fastgpt.cli\n"
        f"try: code = fastgpt.cli.main({argv.split()!r})\n"
        "except SystemExit as end: code = end.code\n"
        "print([code, *sorted({'torch', 'numpy', 'triton', 'transformers'} & set(sys.modules))])"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.splitlines()[-1:] == ["[0]"], got.stdout + got.stderr


def test_a_name_of_the_package_is_a_function_whatever_was_imported_first() -> None:
    """compress, tune and warmup are modules too, which Python would put in their place."""
    code = (
        "import fastgpt.compress, fastgpt.warmup, fastgpt.tune, fastgpt\n"
        "names = [n for n in fastgpt.__all__ if not hasattr(fastgpt, n)]\n"
        "same = [n for n in ('compress', 'tune', 'warmup') if not callable(getattr(fastgpt, n))]\n"
        "print(names, same, set(fastgpt.__all__) <= set(dir(fastgpt)))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.strip() == "[] [] True", got.stdout + got.stderr


def test_no_kernel_uses_what_the_house_forbids() -> None:
    """Atomics give other bits each run, libdevice is not portable, 3.9 has no block pointers."""
    for file in (ROOT / "kernels").glob("*.py"):
        assert not re.search(
            r"tl\.atomic|libdevice|make_block_ptr|triton\.autotune", file.read_text()
        )


def test_sizes_of_a_batch_are_never_constexpr() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"\b(M|N|K|T|Tq|Tk|B|H): tl\.constexpr", file.read_text()), file


def test_imports_beside_transformers_and_hugging_faces_kernels() -> None:
    pytest.importorskip("transformers")
    code = (
        "import fastgpt, transformers, fastgpt.kernels.tiles\n"
        "from transformers import GPT2LMHeadModel"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 0, got.stderr
