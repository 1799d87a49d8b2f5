"""Fine-tuning: from given weights, whole or with LoRA, through checkpoints."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPT, GPTConfig, lora
from fastgpt.adapters import load_adapter, save_adapter
from fastgpt.cli import main
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    checkpoint,
    load,
)
from fastgpt.train import train as train_run
from fastgpt.train.checkpoint import Checkpointer
from fastgpt.train.given import given_model, given_tokenizer
from tests.test_parallel import torchrun
from tests.train_runs import CONFIG, changed, log

SHAPE = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(16, 300, 2, 4, 32, variant="llama", n_kv_head=2, n_inner=48, qk_norm=True)
TOKENIZER = Tokenizer.train(["abc"], 257)
NOW = CheckpointConfig(asynchronous=False)


def made(shape: GPTConfig = SHAPE, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(3)
    model = GPT(shape)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def ids(step: int = 0, T: int = 9) -> Tensor:
    return torch.randint(0, 257, (2, T), generator=torch.Generator().manual_seed(step))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: Any) -> None:
    for step in steps:
        idx = ids(step)
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a: GPT, b: GPT) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("targets", [(), ("c_attn", "h.1.mlp.c_fc")])
def test_a_checkpoint_of_lora_goes_on_bit_for_bit(
    name: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    how = LoraConfig(2, 6.0, targets, dropout=0.1)
    model = lora.add(made(), how).eval()
    optimizer = OptimConfig(name, lr=1e-2).build(model)
    train(model, optimizer, range(2))
    Checkpointer(tmp_path, NOW).save(2, model, TOKENIZER, optimizer)
    loaded, _ = load(tmp_path)
    assert equal(loaded, model) and lora.describe(loaded) == lora.describe(model)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    torch.manual_seed(9)
    again = lora.add(GPT(SHAPE), how).eval()
    resumed = OptimConfig(name, lr=1e-2).build(again)
    Checkpointer(tmp_path, NOW).load(checkpoint.find(tmp_path), again, resumed)
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(2, 4))
    assert equal(model, again)


def test_a_checkpoint_of_lora_is_exported_merged(tmp_path: Path) -> None:
    model = lora.add(made(), LoraConfig(2))
    train(model, OptimConfig(lr=1e-2).build(model), range(2))
    Checkpointer(tmp_path / "run", NOW).save(1, model, TOKENIZER)
    checkpoint.export(tmp_path / "run", tmp_path / "out")
    assert equal(GPT.from_pretrained(tmp_path / "out"), lora.merge(model))


def test_an_adapter_is_made_of_a_checkpoint(tmp_path: Path) -> None:
    base = made().eval()
    base.save_pretrained(tmp_path / "base")
    model = lora.add(made(), LoraConfig(2)).eval()
    train(model, OptimConfig(lr=1e-2).build(model), range(2))
    Checkpointer(tmp_path / "run", NOW).save(1, model, TOKENIZER)
    save_adapter(load(tmp_path / "run")[0], tmp_path / "adapter", base=str(tmp_path / "base"))
    assert equal(load_adapter(base, tmp_path / "adapter"), model)
    assert (model(ids()) - made().eval()(ids())).abs().max() > 1e-3


def test_rejects_a_checkpoint_of_other_lora(tmp_path: Path) -> None:
    Checkpointer(tmp_path, NOW).save(1, lora.add(made(), LoraConfig(2)), TOKENIZER)
    for model, message in (
        (made(), "has the unknown h.0.attn.c_attn.lora_A"),
        (lora.add(made(), LoraConfig(3)), r"lora_A as \(3, 32\); got .* \(2, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpointer(tmp_path, NOW).load(checkpoint.find(tmp_path), model)


# ------------------------------------------------------------------ given weights


def folder_of(model: GPT, where: str, tmp_path: Path) -> Path:
    if where == "hugging face":
        model.save_pretrained(tmp_path)
        TOKENIZER.save(tmp_path / "tokenizer.json")
    else:
        Checkpointer(tmp_path, NOW).save(1, model, TOKENIZER)
    return checkpoint.find(tmp_path) if where == "checkpoint" else tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["hugging face", "checkpoint", "run"])
def test_a_model_is_given(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(dtype=dtype)
    folder = folder_of(model, where, tmp_path)
    given = given_model(folder, dropout=0.3)
    assert given.config == replace(SHAPE, dropout=0.3)
    assert equal(given, model.float())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in given.parameters())
    assert given.training
    assert not torch.equal(given(ids()), given(ids())), "it drops out"
    assert Tokenizer.load(given_tokenizer(folder)).vocab_size == 257


@pytest.mark.parametrize("shape", [SHAPE, LLAMA], ids=["gpt2", "llama"])
def test_a_given_model_can_have_a_shorter_context(shape: GPTConfig, tmp_path: Path) -> None:
    model = made(shape)
    given = given_model(folder_of(model, "run", tmp_path), block_size=9)
    assert given.config == replace(shape, block_size=9)
    assert torch.equal(given(ids()), model(ids()))
    with pytest.raises(ValueError, match=r"^GPT: the context is at most block_size 9 tokens"):
        given(ids(T=10))
    with pytest.raises(ValueError, match=r"^model: block_size must be at most the 16 of"):
        given_model(tmp_path, block_size=17)


def test_lora_of_a_given_run_is_merged(tmp_path: Path) -> None:
    model = lora.add(made(), LoraConfig(2))
    train(model, OptimConfig(lr=1e-2).build(model), range(2))
    given = given_model(folder_of(model, "run", tmp_path))
    assert not any(lora.layers(given)) and equal(given, lora.merge(model))


def test_rejects_what_gives_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^from_pretrained: .* cannot be read"):
        given_model(tmp_path / "nowhere")
    made().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: .* must hold tokenizer.json, or data.tokenizer"):
        given_tokenizer(tmp_path)


# ------------------------------------------------------------------ runs


PAIRS = [(f"What is {a} and {b}?\n", f"It is {a + b}.") for a in range(12) for b in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has read the questions and other answers."""
    folder = tmp_path_factory.mktemp("base")
    text = "\n\n".join(f"{q}It is {'AB'[len(q) % 2]}." for q, _ in PAIRS)
    (folder / "text.txt").write_text(text)
    train_run(
        changed(CONFIG, {
            "out": str(folder / "run"), "steps": 150, "data.files": (str(folder / "text.txt"),),
            "model.block_size": 32, "model.dropout": 0.0, "eval.every": 0,
        })
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return TrainConfig(
        out=str(tmp_path / "run"), steps=60, device="cpu", precision="float32",
        model=ModelConfig(init=str(base)),
        data=DataConfig((str(tmp_path / "pairs.jsonl"),), packing="documents"),
        batch=BatchConfig(rows=4), optim=OptimConfig(lr=1e-2), schedule=ScheduleConfig(warmup=2),
        eval=EvalConfig(every=0), checkpoint=CheckpointConfig(every=30),
        log=LogConfig(every=1),
    )  # fmt: skip


def losses_by_hand(model: GPT, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Mean loss of the answers' tokens and the end, each pair by itself."""
    nats, count = 0.0, 0
    for prompt, answer in pairs:
        asked, told = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos]
        idx = torch.tensor([asked + told])
        logits = model(idx[:, :-1])[0, len(asked) - 1 :]
        nats += F.cross_entropy(logits, idx[0, len(asked) :], reduction="sum").item()
        count += len(told)
    return nats / count


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_the_answers_alone(rank: int, config: TrainConfig, base: Path) -> None:
    """The loss that is trained on is that of the answers, which falls; by hand it is the same."""
    lr = 3e-2 if rank else 1e-2
    config = changed(config, {"lora.rank": rank, "optim.lr": lr, "steps": 120})
    trainer = train_run(config)
    first = log(config.out)[0]["loss"]
    model, tokenizer = load(config.out)
    before, own = load(base)
    assert tokenizer.encode("fox, dog") == own.encode("fox, dog")
    kept = trainer.held_out.part
    texts = [tokenizer.decode(kept.read(a, b)[0].tolist())
             for a, b in pairwise([0, *kept.ends.tolist()])]  # fmt: skip
    pairs = [p for p in PAIRS if any(t.startswith("".join(p)) for t in texts)]
    assert len(pairs) == len(texts) > 5
    with torch.no_grad():
        assert losses_by_hand(before, tokenizer, PAIRS) == pytest.approx(first, rel=0.15)
        held_out = losses_by_hand(model.eval(), tokenizer, pairs)
    assert log(config.out)[-1]["held_out_loss"] == pytest.approx(held_out, rel=1e-4)
    assert held_out < 0.8 * losses_by_hand(before, tokenizer, pairs)
    # What is no answer is not learnt: with LoRA not one weight of the base has changed.
    same = [n for n, t in before.state_dict().items() if torch.equal(t, model.state_dict()[n])]
    assert len(same) == (len(before.state_dict()) if rank else 0)
    assert len(list(lora.layers(model))) == (8 if rank else 0)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_stopped_run_goes_on_without_the_given_weights(
    rank: int, config: TrainConfig, tmp_path: Path
) -> None:
    config = changed(config, {"lora.rank": rank, "lora.dropout": 0.1, "steps": 12,
                              "checkpoint.every": 6, "model.dropout": 0.1})  # fmt: skip
    train_run(changed(config, {"out": str(tmp_path / "whole")}))
    trainer = train_run(changed(config, {"max_seconds": 1e9}))
    folder = Path(config.out)
    shutil.rmtree(checkpoint.checkpoints(folder)[0])
    base = Path(str(config.model.init))
    base.rename(base.with_name("away"))
    try:
        again = train_run(changed(config, {"resume": "must", "max_seconds": 1e9}))
    finally:
        base.with_name("away").rename(base)
    assert log(folder) == log(tmp_path / "whole")
    assert equal(again.model, trainer.model)
    assert equal(load(folder)[0], load(tmp_path / "whole")[0])


def test_hugging_faces_folder_is_fine_tuned(config: TrainConfig, base: Path) -> None:
    folder = Path(config.out).with_name("hf")
    checkpoint.export(base, folder)
    a, b = (
        train_run(changed(config, {"steps": 2, "out": f"{config.out}{n}", "model.init": str(source),
                                   "model.block_size": 24}))
        for n, source in enumerate((base, folder))
    )  # fmt: skip
    assert equal(a.model, b.model)
    assert a.model.config.block_size == a.batches.block_size == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.init": "/nowhere"}, "from_pretrained: /nowhere cannot be read"),
        ({"model.block_size": 64}, "model: block_size must be at most the 32 of"),
        ({"lora.rank": 2, "lora.targets": ("q_proj",)}, "lora: targets must be linear layers"),
        ({"data.tokenizer": "BIG"}, r"model: its vocab_size \d+ must have room for the tokenizer's"
         " ids; got 400"),
    ],
)  # fmt: skip
def test_rejects_a_run(changes: dict[str, Any], message: str, config: TrainConfig) -> None:
    if changes.get("data.tokenizer"):
        file = Path(config.out).with_name("big.json")
        Tokenizer.train([f"{n}{chr(n)}x" for n in range(1, 3000)], 400).save(file)
        changes = {"data.tokenizer": str(file)}
    with pytest.raises(ValueError, match=f"^{message}"):
        train_run(changed(config, changes))
    assert not Path(config.out).exists()


def test_rejects_a_configuration() -> None:
    with pytest.raises(ValueError, match=r"^model: init gives the shape, so n_layer must be left"):
        ModelConfig(init="gpt2", n_layer=3)
    with pytest.raises(ValueError, match=r"^train: lora needs parallel.tp 1; got 2$"):
        TrainConfig(lora=LoraConfig(2), parallel=ParallelConfig(tp=2))


def test_the_command_fine_tunes(
    config: TrainConfig, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.init", str(base), "--data.files", *config.data.files, "--out", config.out,
             "--lora.rank", "2", "--lora.targets", "c_attn", "mlp.c_proj", "--steps", "2",
             "--data.packing", "documents", "--device", "cpu", "--batch.rows", "4"]  # fmt: skip
    assert main(["train", *words]) == 0
    model, _ = load(config.out)
    kinds = {name.split(".", 2)[2] for name, _ in lora.layers(model)}
    assert kinds == {"attn.c_attn", "mlp.c_proj"}
    assert main(["generate", PAIRS[0][0], "--model", config.out, "--seed", "1",
                 "--max-new-tokens", "3"]) == 0  # fmt: skip
    assert PAIRS[0][0] in capsys.readouterr().out


def test_lora_on_two_ranks_equals_one() -> None:
    job = torchrun(2, "tests/finetuning_ranks.py")
    assert "all equal" in job.stdout, job.stderr[-3000:]
