"""Training: exact resume, checkpoints that survive a kill, numbers that are what they say."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastgpt.model import GPT
from fastgpt.train import TrainConfig, Trainer, checkpoint, load, train
from fastgpt.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    flat,
    to_yaml,
)  # fmt: skip
from fastgpt.train.run import interrupts, prepare

TEXT = "\n\n".join(
    f"In year {n} the {'quick' if n % 3 else 'slow'} fox met {n * n} dogs; 白日依山尽 {n}."
    for n in range(300)
)
CONFIG = TrainConfig(
    steps=12,
    device="cpu",
    model=ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2),
    data=DataConfig(vocab_size=300),
    batch=BatchConfig(rows=4),
    optim=OptimConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup=3),
    eval=EvalConfig(every=5),
    checkpoint=CheckpointConfig(every=4),
    log=LogConfig(every=1),
)


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A configuration with other values, by dotted names."""
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        if group:
            name, value = group, replace(getattr(config, group), **{field: value})
        config = replace(config, **{name: value})
    return config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from two, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(changes: dict[str, Any] | None = None, **top: Any) -> Trainer:
    return prepare(changed(CONFIG, {**(changes or {}), **top}), [TEXT])


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
    first.save(tmp_path, {"config": flat(first.config)})
    torch.manual_seed(99)
    second = trainer(change, precision=precision)
    second.restore(checkpoint.find(tmp_path))
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
    tokens, T = t.held_out.tokens.astype(np.int64), 16
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
    T, tokens = 16, t.held_out.tokens
    windows = (len(tokens) - 1) // T
    assert windows > 6
    parts = [tokens[w * T : w * T + T + 1] for w in (0, windows // 3, 2 * windows // 3)]
    three = changed(t.config, {"eval.windows": 0})
    losses = [
        Trainer(three, t.model, t.tokenizer, t.batches.tokens, part).evaluate().loss
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


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    t = trainer()
    t.step()
    folder = t.save(tmp_path, {})
    model, tokenizer = load(tmp_path)
    assert model.config == t.model.config
    assert same(model.state_dict(), weights(t))
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.encode(TEXT) == t.tokenizer.encode(TEXT)
    assert same(load(folder)[0].state_dict(), weights(t))
    names = {"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"}
    assert {p.name for p in folder.iterdir()} == names | {"train.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"latest", folder.name}
    assert set(load_file(folder / "model.safetensors")) == set(t.model.state_dict())


def test_the_latest_replaces_the_one_before(tmp_path: Path) -> None:
    t = trainer()
    for _ in range(3):
        t.step()
        folder = t.save(tmp_path, {})
        again = t.save(tmp_path, {})  # the same step a second time
        assert again != folder
        assert checkpoint.find(tmp_path) == again
        assert {p.name for p in tmp_path.iterdir()} == {"latest", again.name}


def test_a_save_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer()
    t.save(tmp_path, {})
    before, listing = weights(t), sorted(p.name for p in tmp_path.iterdir())
    t.step()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_file", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(OSError, match="No space left"):
                t.save(tmp_path, {})
        assert sorted(p.name for p in tmp_path.iterdir()) == listing
        assert same(load(tmp_path)[0].state_dict(), before)


SAVER = """
import sys, torch
from pathlib import Path
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint

model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=256))
tokenizer = Tokenizer.train(["abc"], 257)
optimizer = model.configure_optimizer(1e-3)
model(torch.zeros(1, 4).long(), torch.zeros(1, 4).long()).backward()
optimizer.step()
for step in range(10**6):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    checkpoint.save(sys.argv[1], step, model, tokenizer, optimizer, {"step": step})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    torn = rounds = 0
    while rounds < 5 or (torn == 0 and rounds < 40):
        rounds += 1
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        said = int(process.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.05)))  # some saves later, somewhere in one
        process.kill()
        said = max([said, *map(int, process.communicate()[0].split())])
        torn += any(p.name.startswith(".step-") for p in tmp_path.iterdir())
        for whole in tmp_path.glob("step-*"):
            load(whole)
        model, _ = load(tmp_path)
        values = {float(v) for p in model.state_dict().values() for v in (p.min(), p.max())}
        assert len(values) == 1, f"round {rounds}: weights of several steps"
        state = checkpoint.read_json(checkpoint.find(tmp_path) / "train.json")
        assert values == {float(state["step"])}
        assert state["step"] >= said
        moments = load_file(checkpoint.find(tmp_path) / "optimizer.safetensors")
        assert all(bool(v.isfinite().all()) for v in moments.values())
    assert torn, "no kill came in the middle of a save: this test proved nothing"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    t = trainer()
    t.step()
    return t.save(tmp_path / "run", {})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_rejects_a_damaged_checkpoint(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        other = {"empty": b"", "cut": content[: len(content) // 2], "noise": os.urandom(500)}
        file.write_bytes(other[damage])
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$"):
        load(saved)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"].update(changes.pop("model", {}))
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, r'config.json must say "format": "fastgpt"'),
        ({"version": 2}, r"must have version 1; got 2"),
        ({"model": {"n_embd": 64}}, r"must hold \S+ as \("),
        ({"model": {"n_layer": 3}}, r"must hold the model's weights; it lacks h\.2\."),
        ({"model": {"n_layer": 1}}, r"must hold the model's weights; it has the unknown h\.1\."),
        ({"model": {"n_head": 5}}, r"n_embd must be a multiple of n_head"),
        ({"model": {"width": 5}}, r"unexpected keyword argument 'width'"),
        ({"model": {"vocab_size": 299}}, r"must hold wte.weight as \(299, 32\)"),
    ],
    ids=str,
)
def test_rejects_a_foreign_checkpoint(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=rf"^checkpoint: [^\n]*{message}[^\n]*$"):
        load(saved)


def test_rejects_hugging_faces_checkpoint(tmp_path: Path) -> None:
    import transformers

    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9, "n_positions": 4}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint: .* was made by something else$"):
        load(tmp_path)


def test_rejects_integer_weights(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({k: v.to(torch.int64) for k, v in tensors.items()}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"^checkpoint: .*got torch.int64"):
        load(saved)


def test_rejects_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: .*; got a folder without one$"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint: .*; there is no such folder$"):
        load(tmp_path / "nowhere")
    (tmp_path / "latest").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match=r"^checkpoint: "):
        load(tmp_path)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    data = (str(tmp_path / "text.txt"),)
    return changed(CONFIG, {"data.files": data, "out": str(tmp_path / "run")})


def log(out: str) -> list[dict[str, Any]]:
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    keep = ("step", "loss", "lr", "grad_norm", "held_out_loss", "held_out_bits_per_byte")
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


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


def test_resume_rejects_damage(config: TrainConfig) -> None:
    train(replace(config, steps=2))
    folder = checkpoint.find(config.out)
    kept = shutil.copytree(folder, folder.with_name("kept"))
    for name in ("optimizer.safetensors", "train.json"):
        for content in (None, b"", b"{}"):
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$"):
                train(replace(config, steps=2, resume="must"))
        shutil.copy(kept / name, folder / name)
    assert train(replace(config, steps=2, resume="must")).done


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
    dotted["data.files"] = tuple(dotted["data.files"])
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


def test_a_model_of_another_shape_is_not_restored(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: the model must have the run's shape; got"):
        trainer({"model.n_layer": 1}).restore(saved)
    assert isinstance(load(saved)[0], GPT)
