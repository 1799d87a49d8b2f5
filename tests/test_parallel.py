"""Layouts against one process: real processes, started by torchrun, that speak by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import GPT
from fastgpt.parallel import Layout, ParallelConfig
from tests.conftest import ROOT
from tests.parallel_cases import CASES, CPU, SMALL, batch, trained


def torchrun(ranks: int, script: str, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *args,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=env)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_layout_equals_one_process(ranks: int, tmp_path: Path) -> None:
    """All cases of one number of ranks run in one job: to start it takes longer than they do."""
    names = [name for name in CASES if ranks in CASES[name][0]]
    out = tmp_path / "results"
    job = torchrun(ranks, "tests/parallel_cases.py", str(out), *names)
    made = dict(map(json.loads, out.read_text().splitlines())) if out.exists() else {}
    problems = [f"{name}: {made[name]}" for name in made if made[name] is not None]
    assert not problems, "\n".join(problems)
    assert list(made) == names, job.stderr[-3000:]


def test_one_rank_needs_no_process_group() -> None:
    layout = Layout.start(ParallelConfig(), CPU)
    model = GPT(SMALL)
    assert layout.parallelize(model) is model
    assert not torch.distributed.is_initialized()
    assert (layout.world, layout.data_world, layout.is_main) == (1, 1, True)
    one = batch(0)
    assert torch.equal(layout.loss(model, one), model(one.idx, one.targets))
    assert int(layout.count(one, one)) == 2 * int((one.targets >= 0).sum())
    layout.stop()


def test_accumulated_batches_add_up_to_the_mean_over_all_targets() -> None:
    layout = Layout(ParallelConfig(), CPU)
    whole, parts = trained(SMALL, layout), trained(SMALL, layout, accumulate=4)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-9)
    assert parts.norms == pytest.approx(whole.norms, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "ParallelConfig: tp must be at least 1, or -1 for what is left; got 0"),
        ({"fsdp": -1}, "ParallelConfig: one size at most may be -1, what is left; got dp -1, fsdp"),
        ({"timeout": 0.0}, "ParallelConfig: timeout must be above 0; got 0.0"),
    ],
)
def test_config_says_what_is_wrong(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ParallelConfig(**sizes)
    assert str(error.value).startswith(message)


def test_what_is_left() -> None:
    assert ParallelConfig(tp=2).resolved(8).dp == 4
    assert ParallelConfig(dp=2, fsdp=-1, tp=2).resolved(8).fsdp == 2
    for config in (ParallelConfig(dp=1), ParallelConfig(tp=3), ParallelConfig(dp=16)):
        with pytest.raises(ValueError, match="must be the number of ranks, 8; got dp"):
            config.resolved(8)
