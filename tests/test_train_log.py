"""What a run says of itself: JSON lines, TensorBoard, wandb, the bar."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt.train import LogConfig, log
from fastgpt.train.checkpoint import Checkpointer
from fastgpt.train.run import run
from tests.train_runs import trainer

CHANGES = {"steps": 6, "log.every": 2, "eval.every": 3, "eval.samples": 1, "eval.prompt": "In "}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def test_the_log_has_what_users_look_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t = trainer(CHANGES)
    run(t, tmp_path)
    made = lines(tmp_path)
    steps = [line for line in made if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert set(steps[0]) == {
        "step", "loss", "lr", "grad_norm", "skipped", "tokens", "tokens_per_second", "mfu",
        "peak_memory", "seconds", "time",
    }  # fmt: skip
    assert [line["tokens"] for line in steps] == [2 * 64, 4 * 64, 6 * 64]
    assert all(line["mfu"] is None for line in steps)  # a CPU's peak is not known
    assert all(line["tokens_per_second"] > 0 for line in steps)
    held_out = [line for line in made if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert set(held_out[0]) >= {"held_out_perplexity", "held_out_bits_per_byte"}
    texts = [line for line in made if "sample" in line]
    assert [line["step"] for line in texts] == [3, 6]
    assert all(line["sample"].startswith("In ") for line in texts)
    said = capsys.readouterr().err
    assert "held-out loss" in said
    assert all(c.isprintable() or c in "\n\r" for c in said)


def test_mfu_is_the_share_of_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "peak_flops", lambda device, dtype: 1e9)
    t = trainer(CHANGES)
    run(t, tmp_path)
    for line in lines(tmp_path):
        if "loss" in line:
            flops = t.model.flops(16, training=True) / 16 * line["tokens_per_second"]
            assert line["mfu"] == pytest.approx(flops / 1e9, rel=1e-2)


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    t = trainer(CHANGES)
    t.model.ln_f.register_forward_hook(
        lambda m, a, o: (o[0] * float("nan"), o[1]) if t.steps_done == 1 else o
    )
    run(t, tmp_path)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text("utf-8")
    first = lines(tmp_path)[0]
    assert first["loss"] is first["grad_norm"] is None
    assert first["skipped"] == 1


def test_tensorboard_has_the_same(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    t = trainer({**CHANGES, "log.tensorboard": True, "checkpoint.every": 3})
    run(t, tmp_path)
    # A second half, resumed from a checkpoint before the end, replaces what came after it.
    again = trainer({**CHANGES, "log.tensorboard": True, "log.every": 1})
    saver = Checkpointer(tmp_path)
    again.restore(saver, tmp_path / "step-00000003")
    run(again, tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "held_out_loss"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 5, 6]
    want = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    for event in events.Scalars("loss"):
        assert event.value == pytest.approx(want[event.step])


class FakeWandb:
    """wandb as far as it is called: a run with log and finish. It cannot be installed for tests
    without its service."""

    Error = RuntimeError

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.inits.append(options)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=finish
        )


def test_wandb_is_told_and_knows_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    t = trainer({**CHANGES, "log.wandb": "tests"})
    run(t, tmp_path)
    again = trainer({**CHANGES, "log.wandb": "tests"})
    saver = Checkpointer(tmp_path)
    again.restore(saver, tmp_path / "step-00000006")
    run(again, tmp_path)
    assert [i["project"] for i in fake.inits] == ["tests", "tests"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.inits[0]["config"]["optim.lr"] == t.config.optim.lr
    assert fake.finished == 2
    steps = [step for step, values in fake.logged if "loss" in values]
    assert steps == [2, 4, 6]


def test_what_is_not_installed_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^train: needs the package tqdm; pip install"):
        log.require(LogConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else True)
    log.require(LogConfig(tensorboard=True))
    with pytest.raises(ImportError, match=r"^train: needs the package wandb; pip install wandb$"):
        log.require(LogConfig(wandb="project"))


@pytest.mark.parametrize("changes", [{"every": 0}, {"wandb": ""}])
def test_rejects(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^log: "):
        LogConfig(**changes)
