"""Training: exact resume, checkpoints that survive a kill, numbers that are what they say."""

import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastgpt.data import Part
from fastgpt.train import BatchConfig, TrainConfig, Trainer, checkpoint, train
from fastgpt.train.config import flat, to_yaml
from fastgpt.train.run import interrupts
from tests.train_runs import CONFIG, TEXT, changed, log, trainer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from two, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in t.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")]
)
def test_a_resumed_run_is_the_run(tmp_path: Path, precision: str, optimizer: str) -> None:
    change = {"optim.name": optimizer}
    whole = trainer(change, precision=precision)
    losses = [whole.step() for _ in range(12)]

    first = trainer(change, precision=precision)
    assert [first.step() for _ in range(6)] == losses[:6]
    saver = checkpoint.Checkpointer(tmp_path)
    first.save(saver, {"config": flat(first.config)})
    torch.manual_seed(99)
    second = trainer(change, precision=precision)
    second.restore(saver, saver.latest())
    second.evaluate()
    assert [second.step() for _ in range(6)] == losses[6:]
    assert same(weights(whole), weights(second))
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        a, b = whole.optimizer.state[p], second.optimizer.state[q]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_matters_to_that_test() -> None:
    a, b = trainer(), trainer({"model.dropout": 0.0})
    assert a.step().loss != b.step().loss


def test_accumulated_batches_are_one_batch() -> None:
    one = trainer({"batch.rows": 8, "model.dropout": 0.0}, precision="float32")
    four = trainer(
        {"batch.rows": 2, "batch.tokens": 8 * 16, "model.dropout": 0.0}, precision="float32"
    )
    for _ in range(3):
        a, b = one.step(), four.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_the_gradient_is_clipped() -> None:
    free, bound = (
        trainer({"optim.clip": 0.0, "model.dropout": 0.0}),
        trainer({"optim.clip": 1e-9, "model.dropout": 0.0}),
    )
    before = weights(free)
    assert free.step().grad_norm == bound.step().grad_norm > 0.0
    # AdamW divides by the gradient's size, save for its eps: a norm far below it moves nothing.
    moved = [
        max(float((t.model.state_dict()[k] - before[k]).abs().max()) for k in before)
        for t in (free, bound)
    ]
    assert moved[1] < 0.2 * moved[0]


def test_the_learning_rate_rises_and_falls() -> None:
    t = trainer({"schedule.warmup": 10, "optim.lr": 1.0, "schedule.floor": 0.1}, steps=100)
    rates = []
    for n in range(100):
        t.steps_done = n
        rates.append(t.learning_rate())
    assert rates[:9] == pytest.approx([0.1 * (n + 1) for n in range(9)], abs=0.03)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert max(rates) > 0.95
    assert rates[50] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


def test_time_that_is_over_ends_the_run_on_a_low_learning_rate() -> None:
    t = trainer({"schedule.floor": 0.1, "schedule.warmup": 0}, steps=10**6, max_seconds=10.0)
    t.seconds = 5.0
    assert t.learning_rate() == pytest.approx(CONFIG.optim.lr * 0.55)
    t.seconds = 10.0
    assert t.done
    assert t.learning_rate() == pytest.approx(CONFIG.optim.lr * 0.1)


def test_bits_per_byte_are_the_bits_of_the_bytes() -> None:
    t = trainer(precision="float32")
    t.model.eval()
    tokens, T = t.held_out.part.read(0, len(t.held_out.part))[0], 16
    windows = (len(tokens) - 1) // T
    x = torch.from_numpy(tokens[: windows * T]).view(windows, T)
    y = torch.from_numpy(tokens[1 : windows * T + 1]).view(windows, T)
    with torch.no_grad():
        nats = F.cross_entropy(t.model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    text = b"".join(t.tokenizer.token_bytes[i] for i in y.flatten().tolist())
    result = t.evaluate()
    assert result.loss == pytest.approx(nats / y.numel(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / y.numel()), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_an_evaluation_of_some_windows_is_from_all_over_the_text() -> None:
    t = trainer({"eval.windows": 3})
    T, tokens = 16, t.held_out.part.read(0, len(t.held_out.part))[0]
    windows = (len(tokens) - 1) // T
    assert windows > 6
    parts = [tokens[w * T : w * T + T + 1] for w in (0, windows // 3, 2 * windows // 3)]
    three = changed(t.config, {"eval.windows": 0})
    losses = [
        Trainer(three, t.model, t.tokenizer, t.batches.part, Part.of([part.tolist()]))
        .evaluate()
        .loss
        for part in parts
    ]
    assert t.evaluate().loss == pytest.approx(sum(losses) / 3, rel=1e-3)
    assert t.evaluate().loss != trainer({"eval.windows": 0}).evaluate().loss


def test_it_learns() -> None:
    t = trainer({"optim.lr": 5e-3, "model.dropout": 0.0, "batch.rows": 16}, steps=150)
    before = t.evaluate()
    while not t.done:
        t.step()
    after = t.evaluate()
    assert after.loss < before.loss - 1.0
    assert after.bits_per_byte < 0.75 * before.bits_per_byte


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    data = (str(tmp_path / "text.txt"),)
    return changed(CONFIG, {"data.files": data, "out": str(tmp_path / "run")})


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config)
    assert whole.done
    cut = replace(config, out=str(tmp_path / "cut"))
    step = Trainer.step

    def step_then_interrupt(self: Trainer) -> Any:
        made = step(self)
        if made.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_then_interrupt)
        stopped = train(cut)
    assert not stopped.done
    assert stopped.steps_done == 7
    assert checkpoint.find(cut.out).name == "step-00000007"
    # A process killed later would have left lines that the checkpoint does not know.
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 0.0}\n{"step": 9, "lo')
    resumed = train(replace(cut, resume="must"))
    assert resumed.done
    assert same(weights(resumed), weights(whole))
    assert log(cut.out) == log(config.out)
    assert [line["step"] for line in log(config.out)] == [
        *range(1, 6),
        5,
        *range(6, 11),
        10,
        11,
        12,
        12,
    ]


def test_a_run_that_is_done_stays_done(config: TrainConfig) -> None:
    first = train(config)
    again = train(replace(config, resume="auto"))
    assert again.steps_done == first.steps_done == 12
    assert same(weights(first), weights(again))


def test_a_run_keeps_its_numbers(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(
        ValueError, match=r"^train: a resumed run must keep its optim.lr, 0.003; got 0.1$"
    ):
        train(changed(config, {"optim.lr": 0.1, "resume": "must"}))
    train(changed(config, {"log.every": 5, "resume": "must"}))


def test_a_run_is_not_written_over(config: TrainConfig) -> None:
    train(config)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(config.out).rglob("*"))
    with pytest.raises(ValueError, match=r"^train: out must not hold a run, except to resume it"):
        train(config)
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(config.out).rglob("*")) == before


def test_a_tokenizer_can_be_given(config: TrainConfig, tmp_path: Path) -> None:
    t = train(replace(config, steps=1))
    path = checkpoint.find(config.out) / "tokenizer.json"
    changes = {"data.tokenizer": str(path), "data.vocab_size": 999, "out": str(tmp_path / "b")}
    other = changed(config, {"steps": 1, **changes})
    assert train(other).tokenizer.token_bytes == t.tokenizer.token_bytes


def test_resume_passes_over_damage(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(config)
    newest = checkpoint.find(config.out)
    file = next((newest / "optimizer").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    resumed = train(replace(config, resume="must"))
    assert f"{newest} is damaged and passed over" in caplog.text
    assert same(weights(resumed), weights(whole))
    assert checkpoint.verify(checkpoint.find(config.out)) is None
    for at in checkpoint.checkpoints(config.out):
        (at / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]* all are damaged$"):
        train(replace(config, resume="must"))


def test_signals_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, r"train: steps must be at least 1; got 0"),
        ({"batch.rows": -1}, r"batch: rows must be at least 1; got -1"),
        ({"schedule.warmup": -1}, r"schedule: warmup must not be negative; got -1"),
        ({"optim.beta2": 1.0}, r"optim: beta2 must lie in \[0, 1\); got 1.0"),
        ({"optim.lr": 0.0}, r"optim: lr must be positive; got 0.0"),
        ({"optim.lr": float("nan")}, r"optim: lr must be positive; got nan"),
        ({"schedule.floor": 2.0}, r"schedule: floor is a share of lr, in \[0, 1\]; got 2.0"),
        ({"data.held_out": 1.0}, r"data: held_out must lie in \(0, 1\); got 1.0"),
        ({"max_seconds": 0.0}, r"train: max_seconds must be positive; got 0.0"),
        ({"resume": "maybe"}, r"train: resume must be one of never, auto, must; got 'maybe'"),
        ({"eval.every": -1}, r"eval: every must not be negative; got -1"),
        ({"precision": "int8"}, r"train: precision must be one of .*; got 'int8'"),
        ({"model.preset": "gpt9"}, r"GPTConfig: the preset must be one of .*; got 'gpt9'"),
        ({"model.n_head": 3}, r"GPTConfig: n_embd must be a multiple of n_head.*"),
        ({"model.dropout": -0.1}, r"GPTConfig: dropout must lie in \[0, 1\); got -0.1"),
    ],
    ids=str,
)
def test_rejects_a_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        changed(CONFIG, change)


def test_the_configuration_reads_back(config: TrainConfig) -> None:
    import yaml  # type: ignore[import-untyped]

    read = yaml.safe_load(to_yaml(config))
    groups = {name for name, value in read.items() if isinstance(value, dict)}
    dotted = {f"{g}.{k}": v for g in groups for k, v in read.pop(g).items()}
    dotted = {k: tuple(v) if isinstance(v, list) else v for k, v in dotted.items()}
    assert changed(TrainConfig(), {**read, **dotted}) == config
    assert "model" in groups and "optim" in groups


@pytest.mark.parametrize(
    "tokens, rows, ranks, want",
    [
        (None, 4, 1, (4, 1)), (None, 4, 2, (4, 1)), (64, 4, 1, (4, 1)), (128, 4, 1, (8, 2)),
        (128, 4, 2, (8, 1)), (96, 4, 1, (6, 2)), (7 * 16, 4, 1, (7, 7)), (16, 4, 1, (1, 1)),
    ],
)  # fmt: skip
def test_accumulation_is_worked_out(
    tokens: int | None, rows: int, ranks: int, want: tuple[int, int]
) -> None:
    assert BatchConfig(tokens, rows).split(16, ranks) == want


@pytest.mark.parametrize(
    "tokens, ranks, message",
    [
        (17, 1, r"^batch: tokens must be a multiple of block_size 16; got 17$"),
        (3 * 16, 2, r"^batch: a step's 3 rows of 16 tokens must divide among 2 ranks; they do not"),
    ],
)
def test_rejects_a_batch_that_does_not_divide(tokens: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchConfig(tokens, 4).split(16, ranks)


def test_auto_begins_a_run_or_goes_on(config: TrainConfig) -> None:
    first = train(changed(config, {"steps": 3, "resume": "auto"}))
    again = train(changed(config, {"steps": 3, "resume": "auto"}))
    assert first.done and again.done
    assert same(weights(first), weights(again))
    with pytest.raises(ValueError, match=r"^train: out must not hold a run"):
        train(replace(config, steps=3))
    with pytest.raises(ValueError, match=r"^checkpoint: "):
        train(changed(config, {"out": config.out + "2", "resume": "must"}))
