"""Three ways to run the tests marked gpu, unchanged: on a GPU, under the sanitizer, interpreted.

    pytest -m gpu                               # where there is a GPU
    python -m ttsem.sanitize pytest -m gpu      # bounds, races, uninitialised reads; on a CPU
    TRITON_INTERPRET=1 pytest -m gpu            # Triton's interpreter; on a CPU, no bfloat16

In each of them a gpu test that launches no kernel fails: the reference path proves nothing there.
With --every-kernel=PATTERN the run fails unless every kernel of fastgpt whose name, file.function,
the pattern matches from its start was launched.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch: its threads then sleep while they wait, and workers beside each other do not starve.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastgpt.ops.backend import INTERPRET

ROOT = Path(__file__).parent.parent
HAS_CUDA = torch.cuda.is_available()  # true under the sanitizer as well
SANITIZED = "ttsem" in sys.modules
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])

settings.register_profile(
    "fastgpt",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastgpt")

launched: Counter[str] = Counter()


def all_kernels() -> set[str]:
    """Every kernel that kernels/ defines, as file.function."""
    pattern = re.compile(r"^def (_\w+_kernel)\(", re.M)
    files = (ROOT / "kernels").glob("*.py")
    return {f"{f.stem}.{name}" for f in files for name in pattern.findall(f.read_text())}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", metavar="PATTERN", help="fail unless each of these ran")
    parser.addoption("--nanogpt", metavar="PATH", help="nanoGPT's model.py, to patch it")
    parser.addoption(
        "--every-configuration", action="store_true", help="compile all choices for all chips"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not (HAS_CUDA or INTERPRET):
        return
    if SANITIZED:
        from fastgpt.lab.semantics import teach

        teach()
    from triton.runtime.jit import KernelInterface

    get = KernelInterface.__getitem__

    def counted(self: Any, grid: Any) -> Any:
        launched[f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"] += 1
        return get(self, grid)

    KernelInterface.__getitem__ = counted  # type: ignore[method-assign]

    if SANITIZED:
        _show_the_lists_of_adamw()


def _show_the_lists_of_adamw() -> None:
    """ttsem knows the tensors that are arguments; AdamW's kernels find others by a table."""
    from ttsem import harness, memory

    from fastgpt.kernels import adamw

    launch = adamw.adamw
    lists: list[torch.Tensor] = []

    class Memory(memory.Memory):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in lists}
            for address, storage in storages.items():
                if storage.nbytes():
                    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.register(address, torch.Tensor.numpy(flat))

    def shown(*args: Any, **kwargs: Any) -> None:
        lists[:] = [t for column in args[:6] for t in column]
        try:
            launch(*args, **kwargs)
        finally:
            lists.clear()

    harness.Memory = Memory
    adamw.adamw = shown


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA or INTERPRET:
        return
    why = "needs a GPU, python -m ttsem.sanitize, or TRITON_INTERPRET=1"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def proof(request: pytest.FixtureRequest) -> Iterator[None]:
    """A gpu test runs on poisoned memory (torch.empty gives NaN) and must launch a kernel."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    before = launched.total()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched.total() > before, "no kernel was launched: this test proves nothing here"


def never_launched(config: pytest.Config) -> set[str]:
    """Of the kernels that --every-kernel asks for."""
    pattern = config.getoption("--every-kernel")
    if pattern is None:
        return set()
    return {name for name in all_kernels() - set(launched) if re.match(pattern, name)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launched"] = dict(launched)
    elif never_launched(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not launched:
        return
    mode = "Triton's interpreter" if INTERPRET else torch.cuda.get_device_name()
    counts = ", ".join(f"{name} {n}" for name, n in sorted(launched.items()))
    terminalreporter.write_line(f"kernel launches ({mode}): {counts}")
    if missing := never_launched(config):
        terminalreporter.write_line(f"NEVER LAUNCHED: {', '.join(sorted(missing))}", red=True)


class CollectLaunches:
    """Adds up what the workers of pytest-xdist launched."""

    def pytest_testnodedown(self, node: Any) -> None:
        launched.update(getattr(node, "workeroutput", {}).get("launched", {}))


def pytest_plugin_registered(plugin: Any, manager: pytest.PytestPluginManager) -> None:
    if type(plugin).__name__ == "DSession" and not manager.has_plugin("collect-launches"):
        manager.register(CollectLaunches(), "collect-launches")
