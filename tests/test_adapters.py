"""LoRA in files: both ways against the package peft on transformers' models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, lora
from fastgpt.adapters import load_adapter, save_adapter
from fastgpt.lora import LoraConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM

GPT2 = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(16, 31, 2, 4, 32, variant="llama", n_kv_head=2, n_inner=48)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA}
PARTS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def made(config: GPTConfig, folder: Path) -> GPT:
    """A model, and a folder of Hugging Face's with its weights."""
    model = GPT(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder / "base")
    return model


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def drawn(model: nn.Module) -> None:
    """Draw every B anew, which is 0 at first."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(31, (2, 12))


@pytest.mark.parametrize("targets", [(), ("c_attn",), ("h.1.attn.c_proj",)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_reads_what_is_saved(
    kind: str, targets: tuple[str, ...], tmp_path: Path, ids: Tensor
) -> None:
    model = made(CONFIGS[kind], tmp_path)
    before = model(ids)
    lora.add(model, LoraConfig(3, 5.0, targets, dropout=0.1))
    drawn(model)
    save_adapter(model.eval(), tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs(tmp_path), tmp_path / "adapter").eval()
    want = adapted(input_ids=ids).logits
    assert (want - before).abs().max() > 0.1
    close(model(ids), want)
    # Every file's tensor has a place in peft's model, and the other way round.
    own = peft.get_peft_model_state_dict(adapted)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert own.keys() == saved.keys() and all(torch.equal(own[n], saved[n]) for n in own)
    close(model(ids), load_adapter(made_again(tmp_path), tmp_path / "adapter").eval()(ids))


def made_again(folder: Path) -> GPT:
    return GPT.from_pretrained(folder / "base")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"target_modules": ["c_attn", "q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "c_fc"], "use_rslora": True},
        {"layers_to_transform": [1], "lora_dropout": 0.1},
        {"rank_pattern": {"h.1.attn.c_proj": 2, r"layers\.[01].*q_proj": 6},
         "alpha_pattern": {"c_fc": 3, "v_proj": 7, "up_proj": 2}},
    ],
    ids=["all", "some", "by the root of the rank", "one layer", "patterns"],
)  # fmt: skip
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saved_is_read(
    kind: str, change: dict[str, Any], tmp_path: Path, ids: Tensor
) -> None:
    model = made(CONFIGS[kind], tmp_path)
    before = model(ids)
    change = dict(change)
    wanted = [t for t in change.pop("target_modules", PARTS[kind]) if t in PARTS[kind]]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=wanted, fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM", **change,
    )  # fmt: skip
    adapted = peft.get_peft_model(theirs(tmp_path), config)
    drawn(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    want = adapted(input_ids=ids).logits
    assert (want - before).abs().max() > 0.1
    load_adapter(model, tmp_path / "adapter").eval()
    close(model(ids), want)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{side}" for name, _ in lora.layers(model) for side in "AB"
    }
    # And once more through our own files, whose ranks are sums where q, k and v were apart.
    save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(theirs(tmp_path), tmp_path / "again").eval()
    close(again(input_ids=ids).logits, want)
    close(lora.merge(model)(ids), want)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_trains_as_peft_does(kind: str, tmp_path: Path, ids: Tensor) -> None:
    """The same steps from the same matrices; Llama's q, k and v, whose A is one here, apart."""
    targets = ["o_proj", "up_proj", "down_proj"] if kind == "llama" else PARTS[kind]
    model = made(CONFIGS[kind], tmp_path)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "gpt2"
    )
    adapted = peft.get_peft_model(theirs(tmp_path), config)
    drawn(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (model, adapted)
    ]
    for _ in range(3):
        model(ids[:, :-1], ids[:, 1:]).backward()
        adapted(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    save_adapter(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, want in peft.get_peft_model_state_dict(adapted).items():
        assert (want - first[name]).norm() > 1e-3
        torch.testing.assert_close(ours[name], want, atol=1e-5, rtol=1e-4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = lora.add(made(GPT2, tmp_path), LoraConfig(2))
    save_adapter(model, tmp_path / "adapter", base="gpt2")
    return tmp_path / "adapter"


def rewritten(folder: Path, **change: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_it_says_of_what_it_is(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gpt2"
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert {f.name for f in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "must be of peft_type LORA; got 'LOHA'"),
        ({"use_dora": True}, "must be plain LoRA; its use_dora is True"),
        ({"modules_to_save": ["wte"]}, r"must be plain LoRA; its modules_to_save is \['wte'\]"),
        ({"bias": "all"}, "bias must be \"none\"; got 'all'"),
    ],
)
def test_rejects_another_kind(saved: Path, change: dict[str, Any], message: str) -> None:
    rewritten(saved, **change)
    with pytest.raises(ValueError, match=f"^load_adapter: .*{message}"):
        load_adapter(GPT(GPT2), saved)


def test_rejects_files_that_are_broken(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold adapter_config.json; it does not$"):
        load_adapter(GPT(GPT2), tmp_path / "nowhere")
    weights = saved / "adapter_model.safetensors"
    whole = load_file(weights)
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    for change, message in (
        ({key: None}, "must hold A and B of transformer.h.0.mlp.c_fc; it holds one"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, "it has .*lm_head"),
        ({key: torch.zeros(3, 32)}, r"must hold A \(rank, 32\) and B \(128, rank\) of h.0.mlp.c_fc"
         r"; got \(3, 32\), \(128, 2\)"),
    ):  # fmt: skip
        save_file({n: t for n, t in (whole | change).items() if t is not None}, weights)
        model = GPT(GPT2)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, saved)
        assert not any(lora.layers(model))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter is broken; "):
        load_adapter(GPT(GPT2), saved)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors; it does not$"):
        load_adapter(GPT(GPT2), saved)


def test_rejects_a_model_that_does_not_fit(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^save_adapter: the model must have LoRA; it has none$"):
        save_adapter(GPT(GPT2), saved)
    with pytest.raises(ValueError, match=r"^load_adapter: the model must have no LoRA; it has"):
        load_adapter(lora.add(GPT(GPT2), LoraConfig(2)), saved)
    for other in (replace(GPT2, n_layer=1), LLAMA):
        with pytest.raises(ValueError, match=r"must adapt linear layers of the blocks; it has"):
            load_adapter(GPT(other), saved)
