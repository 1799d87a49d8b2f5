"""fastgpt bench --suite gpu: its path from the checks to the rows to paste, at tiny sizes.

Under the sanitizer a GPU's clock, memory and profiler are not there: those of this machine's CPU
stand for them.
"""

from pathlib import Path

import pytest
import torch

from fastgpt.bench import gpu as suite
from fastgpt.bench import result, timing
from fastgpt.bench.ops import OPS
from fastgpt.bench.report import MARKS
from fastgpt.bench.run import Wanted
from fastgpt.bench.show import Shown
from fastgpt.ops.backend import INTERPRET
from fastgpt.tune_ops import DTYPES, TASKS
from tests.conftest import SANITIZED
from tests.test_tune import Event

PROVIDERS = ("fastgpt", "torch", "sdpa", "torch fused", "Hugging Face")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="wants the device cuda")
def test_the_suite_checks_times_tunes_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if SANITIZED:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name in ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *a: None)
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
        monkeypatch.setattr(timing, "peaks", lambda *a: {"gemm_flops": 1e9, "copy_bytes": 1e9})
        monkeypatch.setattr(timing, "FLUSHED", 64)
        monkeypatch.setattr(timing, "launched", lambda step: (1, 0.001))
        monkeypatch.setattr(timing, "host_seconds", lambda step: 1e-6)
    # Of all ops, or the sanitizer takes minutes: a row op, a product, one without backward.
    some = ("layer_norm", "linear_cross_entropy", "adamw")
    monkeypatch.setattr(suite, "TASKS", {n: TASKS[n] for n in ("layer_norm", "adamw")})
    monkeypatch.setattr(suite, "OPS", {n: OPS[n] for n in some})
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{MARKS[0]}\n{MARKS[1]}\nafter\n")
    out = tmp_path / "run.json"
    wanted = Wanted((), "cuda", (), providers=PROVIDERS)

    assert suite.gpu(wanted, out, Shown(page), small=True, say=len)

    run = result.read(out)
    assert run.notes[suite.CHECKS] == [
        f"{op}, {name}: right" for op in ("layer_norm", "adamw") for name in DTYPES
    ]
    rows = run.notes[suite.TILES]
    assert any(row.startswith("layer_norm_tile(N=40, backward=True") for row in rows), rows
    assert all("measured on" in row for row in rows)
    ours = {(r.what, r.mode): r for r in run.rows if r.provider == "fastgpt"}
    assert {what for what, _ in ours} == {"step", *some}
    assert [r for r in ours.values() if r.state != "timed"] == []
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    for said_there in ("### Training step", "### Kernels", "### Correctness", "```python"):
        assert said_there in text


def test_the_plan_has_every_op_and_check() -> None:
    assert set(TASKS) == set(OPS)
    assert {p.what for p in suite.plan()} == {"step", *OPS}
    assert all(p.modes == ("forward", "backward") for p in suite.plan() if p.part == suite.KERNELS)
