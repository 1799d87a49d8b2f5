"""Fine-tuning: from given weights, whole or with LoRA, through checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, lora
from fastgpt.adapters import load_adapter, save_adapter
from fastgpt.lora import LoraConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint, load
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer
from fastgpt.train.given import given_model, given_tokenizer
from fastgpt.train.optimizer import OptimConfig

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
