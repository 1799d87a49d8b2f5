"""A run that is killed again and again ends as the run that was not: bit for bit.

Every life is real processes and the whole of `fastgpt.train.train`; each ends by SIGKILL to one
rank, at a moment that was drawn. FASTGPT_KILLS=200 makes it a long test.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.data import DataConfig
from fastgpt.parallel import ParallelConfig
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    checkpoint,
    load,
    train,
)  # fmt: skip
from fastgpt.train.checkpoint import tensors
from tests import ranks
from tests.conftest import ROOT

TEXT = "\n\n".join(f"In year {n} the fox met {n * n} dogs and {n % 7} cats." for n in range(300))
KILLS = int(os.environ.get("FASTGPT_KILLS", "20"))
EVERY = 2
STEPS = 8 * KILLS  # many short lives make about 4 each


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    return TrainConfig(
        out=str(tmp_path / "whole"),
        steps=STEPS,
        device="cpu",
        precision="float32",
        resume="auto",
        model=ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=16, dropout=0.1),
        data=DataConfig(files=(str(tmp_path / "text.txt"),), vocab_size=257),
        batch=BatchConfig(rows=2),
        schedule=ScheduleConfig(warmup=10),
        eval=EvalConfig(every=0, windows=8),
        checkpoint=CheckpointConfig(every=EVERY),
        log=LogConfig(every=1),
    )


def life(rank: int, config: TrainConfig) -> None:
    train(config)


def lines(config: TrainConfig) -> int:
    try:
        return (Path(config.out) / "log.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    text = (Path(config.out) / "log.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in told if "loss" in line]


def everything(config: TrainConfig) -> dict[str, torch.Tensor]:
    """All weights, and all that the optimizer remembers, whole."""
    found: dict[str, torch.Tensor] = {}
    for part in ("model", "optimizer"):
        folder = checkpoint.find(config.out) / part
        saved = tensors.index(folder)
        those = {k: torch.empty(m.size) for k, m in saved.state_dict_metadata.items()}
        tensors.read(those, folder, saved)
        found |= those
    return found


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"fsdp": 2}], ids=str)
def test_a_run_killed_at_any_moment_is_the_run(
    tmp_path: Path, config: TrainConfig, parallel: dict[str, int]
) -> None:
    config = replace(config, parallel=ParallelConfig(**parallel))
    world = math.prod(parallel.values())
    start = time.monotonic()
    ranks.run(world, tmp_path, life, config)
    assert len(losses(config)) == STEPS
    step = (time.monotonic() - start) / STEPS

    killed = replace(config, out=str(tmp_path / "killed"))
    out, rng = Path(killed.out), np.random.default_rng(0)
    kills = torn = 0
    while kills < KILLS or not torn:
        assert kills < 10 * KILLS, "no kill came in the middle of a save: this proves nothing"
        processes = ranks.start(world, tmp_path, life, killed)
        before = lines(killed)
        if rng.random() < 0.2:  # before it has taken up the run, perhaps
            end = time.monotonic() + rng.uniform(0.0, 1.0)
            while time.monotonic() < end and lines(killed) <= before:
                time.sleep(0.0005)
        else:
            more = int(rng.integers(1, 2 * EVERY + 1))
            while lines(killed) < before + more:
                assert any(p.is_alive() for p in processes), said(tmp_path, world)
                time.sleep(0.0005)
            time.sleep(rng.uniform(0.0, 2.0 * step))
        victim = processes[int(rng.integers(world))]
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL, said(tmp_path, world)
        for other in processes:  # as torchrun does
            other.terminate()
            other.join(60)
            assert other.exitcode, "a rank outlives the run" if other.is_alive() else "no error"
        kills += 1
        torn += any(out.glob(".step-*"))
        for at in checkpoint.checkpoints(out):
            assert checkpoint.verify(at) is None, f"{at} can be seen, but is torn"
    ranks.run(world, tmp_path, life, killed)

    assert losses(killed) == losses(config)
    want, got = everything(config), everything(killed)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want)
    model, _ = load(killed.out)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def said(tmp: Path, world: int) -> str:
    return "\n".join((tmp / f"rank-{rank}.txt").read_text() for rank in range(world))


def torchrun(out: Path, text: Path, *options: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "fastgpt.train", "--out", out, "--data.files", text,
        "--data.vocab_size", "257", "--model.block_size", "8", "--model.n_layer", "1",
        "--model.n_head", "1", "--model.n_embd", "16", "--batch.rows", "2", "--device", "cpu",
        "--precision", "float32", "--log.every", "1", "--eval.every", "0", "--resume", "auto",
        "--parallel.fsdp", "2", *options,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(log: Path, count: int, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


def test_sigterm_to_torchrun_saves_and_leaves(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    endless = ("--steps", "1000000", "--checkpoint.every", "0")
    process = torchrun(out, tmp_path / "text.txt", *endless)
    wait_for(out / "log.jsonl", 5, process)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    (at,) = checkpoint.checkpoints(out)
    assert checkpoint.verify(at) is None, text
    made = losses(TrainConfig(out=str(out)))
    assert made[-1][0] == int(at.name.removeprefix("step-")) >= 5
    assert load(out)[0].config.n_embd == 16
