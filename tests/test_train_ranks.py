"""Runs on many ranks: the run of one within rounding, the same bits again, errors said once."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastgpt.train import TrainConfig, Trainer, load, train
from fastgpt.train.checkpoint import find, read_json
from tests import ranks
from tests.conftest import ROOT
from tests.train_runs import CONFIG, TEXT, changed, log

CHANGES: dict[str, Any] = {
    "model.dropout": 0.0, "precision": "float32", "eval.samples": 1, "eval.prompt": "In year ",
    "eval.sample_tokens": 4, "checkpoint.asynchronous": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return changed(CONFIG, {**CHANGES, "data.files": (str(path),), "out": str(tmp_path / "one")})


def work(rank: int, config: TrainConfig, stop_at: int = 0, signalled: int = 0) -> None:
    """Train; at the end of step stop_at the rank signalled gets a SIGTERM."""
    step = Trainer.step

    def watched(self: Trainer) -> Any:
        made = step(self)
        if rank == signalled and made.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return made

    Trainer.step = watched  # type: ignore[method-assign]
    trainer = train(config)
    assert trainer.done == (stop_at == 0)
    assert trainer.steps_done == (stop_at or config.steps)


def close(a: list[dict[str, Any]], b: list[dict[str, Any]], rel: float = 2e-4) -> None:
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for one, other in zip(a, b, strict=True):
        for key in one.keys() - {"sample"}:
            assert one[key] == pytest.approx(other[key], rel=rel), (key, one, other)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {}), (2, {"batch.tokens": 4 * 16, "batch.rows": 1}), (2, {"parallel.fsdp": 2}),
        (2, {"parallel.tp": 2}), (2, {"parallel.cp": 2}),
        (4, {"parallel.fsdp": 2, "parallel.tp": 2}), (4, {"parallel.cp": 2}),
        (2, {"optim.name": "muon", "parallel.fsdp": 2}), (2, {"data.packing": "documents"}),
    ],
    ids=[
        "dp", "dp, accumulated", "fsdp", "tp", "cp", "fsdp x tp", "dp x cp", "muon, fsdp",
        "documents",
    ],
)  # fmt: skip
def test_many_ranks_make_the_run_of_one(
    config: TrainConfig, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    alone = {k: v for k, v in layout.items() if not k.startswith("parallel.")}
    train(changed(config, alone))
    many = changed(config, {"out": str(tmp_path / "many"), **layout})
    ranks.run(world, tmp_path, work, many)
    close(log(config.out), log(many.out))
    assert load(many.out)[0].config == load(config.out)[0].config


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on_to_the_bit(
    config: TrainConfig, tmp_path: Path, dropout: float
) -> None:
    whole = changed(config, {"out": str(tmp_path / "whole"), "model.dropout": dropout})
    ranks.run(2, tmp_path, work, whole)
    cut = changed(whole, {"out": str(tmp_path / "cut"), "resume": "auto"})
    ranks.run(2, tmp_path, work, cut, 7, 1)
    assert find(cut.out).name == "step-00000007"
    ranks.run(2, tmp_path, work, cut)
    assert log(cut.out) == log(whole.out)


def test_a_run_goes_on_on_another_number_of_ranks(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    cut = changed(config, {"out": str(tmp_path / "cut"), "resume": "auto"})
    ranks.run(2, tmp_path, work, cut, 3, 0)
    ranks.run(4, tmp_path, work, changed(cut, {"parallel.fsdp": 2}), 7, 3)
    train(cut)
    close(log(config.out), log(cut.out))


@pytest.mark.parametrize("layout", [{}, {"parallel.fsdp": 2}], ids=["dp", "fsdp"])
def test_float16_scales_alike_on_all_ranks(
    config: TrainConfig, tmp_path: Path, layout: dict[str, Any]
) -> None:
    config = changed(config, {"precision": "float16", "eval.samples": 0})
    train(config)
    two = changed(config, {"out": str(tmp_path / "two"), **layout})
    ranks.run(2, tmp_path, spoil_one, two)
    close(log(config.out)[:1], log(two.out)[:1], 1e-2)
    state = read_json(find(two.out) / "train.json")
    assert state["skipped"] == 1
    assert state["scaler"]["scale"] == 2.0**15  # halved once


def dies(rank: int, config: TrainConfig) -> None:
    step = Trainer.step

    def watched(self: Trainer) -> Any:
        if rank == 1 and self.steps_done == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.step = watched  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match=r"^train: another rank has gone, so rank 0 ends; "):
        train(config)


@pytest.mark.parametrize("layout", [{}, {"parallel.fsdp": 2}], ids=["dp", "fsdp"])
def test_a_rank_that_dies_ends_the_others(
    config: TrainConfig, tmp_path: Path, layout: dict[str, Any]
) -> None:
    processes = ranks.start(2, tmp_path, dies, changed(config, layout))
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, -signal.SIGKILL], (
        tmp_path / "rank-0.txt"
    ).read_text()
    assert find(config.out).name == "step-00000004"


def spoil_one(rank: int, config: TrainConfig) -> None:
    step = Trainer.step

    def watched(self: Trainer) -> Any:
        if rank == 1 and self.steps_done == 1:
            norm = self.model.ln_f
            hook = norm.register_forward_hook(lambda m, a, o: (o[0] * float("nan"), o[1]))
            try:
                return step(self)
            finally:
                hook.remove()
        return step(self)

    Trainer.step = watched  # type: ignore[method-assign]
    assert train(config).done


@pytest.mark.parametrize("layout", [{}, {"parallel.fsdp": 2}], ids=["dp", "fsdp"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    config: TrainConfig, tmp_path: Path, layout: dict[str, Any]
) -> None:
    ranks.run(2, tmp_path, spoil_one, changed(config, layout))
    steps = [line for line in log(config.out) if "loss" in line]
    assert [line["skipped"] for line in steps] == [0] + 11 * [1]
    assert steps[1]["loss"] is None
    assert all(line["loss"] is not None for line in steps[2:])


def refused(rank: int, config: TrainConfig, message: str, other: TrainConfig | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        train(config if other is None or rank == 0 else other)


def test_what_one_rank_refuses_all_do(config: TrainConfig, tmp_path: Path) -> None:
    out = str(tmp_path / "new" / "run")
    other = changed(config, {"out": out, "optim.lr": 0.5})
    config = changed(config, {"out": out})
    message = r"^train: all ranks must have one optim\.lr; got 0\.003 on rank 0, 0\.5 on rank 1"
    ranks.run(2, tmp_path, refused, config, message, other)
    message = r"^batch: a step's 3 rows of 16 tokens must divide among 2 ranks; they do not$"
    ranks.run(2, tmp_path, refused, changed(config, {"batch.tokens": 48}), message)
    message = r"^parallel: .* must be the number of ranks, 2"
    ranks.run(2, tmp_path, refused, changed(config, {"parallel.dp": 3}), message)
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    files = (str(tmp_path / "short.txt"),)
    message = r"^(text|data): "
    ranks.run(2, tmp_path, refused, changed(config, {"data.files": files}), message)
    assert not (tmp_path / "new").exists()


def torchrun(
    *args: str, restarts: int = 0, script: Sequence[str] = ("-m", "fastgpt.train")
) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts), *script, *args,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


OPTIONS = [
    "--steps", "4", "--device", "cpu", "--model.block-size", "16", "--model.n-layer", "1",
    "--model.n-head", "2", "--model.n-embd", "16", "--data.vocab-size", "300", "--batch.rows", "4",
]  # fmt: skip


def test_torchrun_starts_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "run"
    made = torchrun("--data.files", str(tmp_path / "a.txt"), "--out", str(out), *OPTIONS)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"done: 4 steps, checkpoint {find(out)}\n"
    assert made.stderr.count("held-out loss") == 1


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
from fastgpt.cli import main
from fastgpt.train import Trainer

step, once = Trainer.step, Path(__file__).with_name("once")

def watched(self):
    if self.layout.rank == 1 and self.steps_done == 3 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

Trainer.step = watched
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_torchrun_restarts_a_run_whose_rank_died(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    script = tmp_path / "dies.py"
    script.write_text(DIES_ONCE)
    options = ["--data.files", str(tmp_path / "a.txt"), *OPTIONS, "--resume", "auto"]
    options += ["--model.dropout", "0.1", "--log.every", "1", "--checkpoint.every", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    made = torchrun(*options, "--out", str(cut), restarts=1, script=[str(script)])
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "once").exists()
    assert "train: another rank has gone, so rank 0 ends; --resume auto goes on" in made.stderr
    assert "Traceback" not in made.stderr
    assert torchrun(*options, "--out", str(whole)).returncode == 0
    assert log(cut) == log(whole)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--optim.lr", "fast"], "fastgpt train: "),
        (["--data.files", "/none.txt"], "file: /none.txt cannot be used"),
    ],
    ids=["options", "data"],
)
def test_torchrun_hears_of_a_refusal_once(tmp_path: Path, args: list[str], message: str) -> None:
    made = torchrun("--out", str(tmp_path / "run"), *OPTIONS, *args)
    assert made.returncode != 0
    assert made.stdout == ""
    assert [line for line in made.stderr.splitlines() if line.startswith(message)] != []
    assert made.stderr.count(message) == 1, made.stderr
    assert "exitcode  : 2" in made.stderr
    assert list(tmp_path.iterdir()) == []
