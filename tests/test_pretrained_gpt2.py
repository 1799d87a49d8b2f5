"""GPT.from_pretrained and save_pretrained against transformers: GPT-2's layout, both ways."""

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt import GPT, GPTConfig, explain, generate, huggingface
from tests.test_llama import SMALL as LLAMA

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

SMALL = GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
CONFIGS = {
    "gpt2": SMALL,
    "untied": replace(SMALL, tied=False),
    "erf": replace(SMALL, activation="gelu", n_inner=40, norm_eps=1e-6, dropout=0.2),
    "relu": replace(SMALL, activation="relu"),
    "llama": LLAMA,
    "llama, narrow": replace(LLAMA, n_head=2, n_kv_head=1, n_head_dim=8),
    "llama, untied": replace(LLAMA, tied=False, activation="gelu_tanh"),
    "mistral": replace(LLAMA, window=5),
}


def made(config: GPTConfig) -> GPT:
    """A model none of whose weights is at its initial value."""
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def theirs(**changes: Any) -> Any:
    """Hugging Face's GPT-2 of the small shape."""
    shape = {"n_positions": 32, "vocab_size": 97, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def ids(B: int = 2, T: int = 12) -> Tensor:
    return torch.randint(0, 97, (B, T))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_here_loaded_there_and_here(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(CONFIGS[name]).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again = GPT.from_pretrained(folder, dropout=CONFIGS[name].dropout)
    assert replace(again.config, n_inner=again.config.inner) == replace(
        model.config, n_inner=model.config.inner
    )
    assert equal(again.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in again.parameters()) and not again.training

    there, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert there.dtype == dtype
    x = ids()
    want = there(x).logits
    atol = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(model(x), want, atol=atol, rtol=1e-4)
    there.save_pretrained(tmp_path / "back")
    assert equal(GPT.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    there_again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert equal(there_again.state_dict(), there.state_dict())


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"n_inner": 48}], ids=str)
def test_logits_and_gradients_are_hugging_faces(change: dict[str, Any], tmp_path: Path) -> None:
    other = theirs(**change).double()
    other.save_pretrained(tmp_path)
    model, x = GPT.from_pretrained(tmp_path), ids()
    assert model.wte.weight.dtype == torch.float64
    got, want = model(x), other(x).logits
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    grads = dict(other.named_parameters())
    for name, p in model.named_parameters():
        g = grads[name if name.startswith("lm_head") else f"transformer.{name}"].grad
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        torch.testing.assert_close(p.grad, g.t() if turned else g)


def test_every_file_that_hugging_face_writes_or_wrote(tmp_path: Path) -> None:
    other = theirs()
    other.save_pretrained(tmp_path / "whole")
    want = GPT.from_pretrained(tmp_path / "whole").state_dict()
    assert torch.equal(
        want["h.1.attn.c_attn.weight"], other.transformer.h[1].attn.c_attn.weight.t()
    )

    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert equal(GPT.from_pretrained(tmp_path / "shards").state_dict(), want)

    headless = GPT2Model(other.config)  # its weights have no prefix
    headless.load_state_dict(other.transformer.state_dict())
    headless.save_pretrained(tmp_path / "bare")
    assert "wte.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    assert equal(GPT.from_pretrained(tmp_path / "bare").state_dict(), want)

    old = tmp_path / "old"
    old.mkdir()
    weights = other.state_dict()  # with lm_head
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, old / "pytorch_model.bin")
    (old / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    assert equal(GPT.from_pretrained(old).state_dict(), want)

    half = GPT.from_pretrained(str(old), dtype=torch.float16, dropout=0.1)
    assert half.config.dropout == 0.1 and half.wte.weight.dtype == torch.float16


class Trap:
    """Pickled, it would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_unpickles_nothing_but_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^from_pretrained: .* is broken; ") as error:
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists() and "\n" not in str(error.value)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be a state_dict of tensors; it is not$"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": None}, r"of model_type 'gpt2', 'llama', 'mistral' or 'fastgpt'; got None$"),
        ({"scale_attn_weights": False}, r"must have scale_attn_weights True; got False$"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"inverse_layer_idx False; got True$"),
        ({"add_cross_attention": True}, r"must have add_cross_attention False; got True$"),
        ({"activation_function": "tanh"}, r"activation of gelu_new, .*; got 'tanh'$"),
        ({"n_head": 5}, r"of a shape that GPT lacks; GPTConfig: n_embd must be a multiple .*$"),
        ({"n_layer": 3}, r"must hold transformer.h.2.ln_1.weight; it does not$"),
        ({"n_layer": 1}, r"a 1-layer GPT-2 alone; it has the unknown transformer.h.1.attn.*$"),
        ({"n_positions": 64}, r"must hold wpe.weight as \(64, 32\); got \(32, 32\)$"),
        ({"n_inner": 40}, r"must hold h.0.mlp.c_fc.weight as \(40, 32\); got \(128, 32\)$"),
        ({"tie_word_embeddings": False}, r"must hold lm_head.weight; it does not$"),
    ],
    ids=str,
)
def test_refuses_a_folder(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^from_pretrained: .*{message}") as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_refuses_weights_that_contradict_the_configuration(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.ones(97, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight equal to the embedding, .*; it differs$"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("gone.safetensors", "../config.json"):
        index.write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
        with pytest.raises(ValueError, match=rf"must hold {shard}, which its index lists; it does"):
            GPT.from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"^from_pretrained: .* is broken; "):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        (replace(SMALL, bias=False), "the model must have bias True; got False"),
        (replace(SMALL, n_kv_head=2), "the model must have n_kv_head 4; got 2"),
        (
            replace(SMALL, n_head=2, n_head_dim=8),
            "the model must have n_head x n_head_dim 32; got 16",
        ),
        (replace(LLAMA, qk_norm=True), "the model must have qk_norm False; got True"),
    ],
    ids=lambda c: "",
)
def test_saves_no_shape_that_hugging_face_lacks(
    config: GPTConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^save_pretrained: {message}$"):
        GPT(config).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(SMALL)
    model.save_pretrained(tmp_path)

    def full(weights: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgpt.pretrained.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        made(SMALL).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert equal(GPT.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's cache, as it lies on a disk; without it, without the package, no name."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, commit = made(SMALL), "0" * 40
    repo = tmp_path / "models--someone--tiny"
    model.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert equal(GPT.from_pretrained("someone/tiny").state_dict(), model.state_dict())
    again = GPT.from_pretrained("someone/tiny", revision=commit)
    assert equal(again.state_dict(), model.state_dict())

    with pytest.raises(
        ValueError, match=r"^from_pretrained: someone/else is no folder .* from the"
    ):
        GPT.from_pretrained("someone/else")
    for path in ("./tiny", str(tmp_path / "none"), "a/b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"cannot be read; No such file or directory$"):
            GPT.from_pretrained(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"^from_pretrained: someone/tiny is no folder .* needs"):
        GPT.from_pretrained("someone/tiny")


# ------------------------------------------------------------------ microformer-mgm

GREEDY = [
    2, 964, 6350, 320, 3317, 7829, 239, 3514, 8688, 4401, 4227, 6228, 6077, 4190, 6230, 2707, 84,
    4653, 3463, 8642, 5797, 4400, 5635, 502, 1303, 1302, 9301, 1135, 5202, 7822, 4652, 2924,
]  # fmt: skip


@pytest.fixture(scope="module")
def microformer() -> Path:
    """The folder of a trained GPT-2 of 9 million parameters, of the bacteria of the gut."""
    if (spec := find_spec("mgm")) is None or spec.origin is None:
        pytest.skip("microformer-mgm is not installed, whose wheel carries the weights")
    return Path(spec.origin).parent / "resources" / "general_model"


@torch.no_grad()
def test_microformer_has_its_numbers(microformer: Path) -> None:
    """Of transformers 5.23 with the eager attention, in float32."""
    model = GPT.from_pretrained(microformer)
    assert (model.config.n_layer, model.num_params()) == (8, 8924928)
    x = torch.arange(4, 68)[None]
    logits = model(x)
    assert logits[0, -8:].argmax(-1).tolist() == [6962, 423, 423, 423, 423, 3177, 8726, 8704]
    assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(11.850423, abs=1e-5)
    assert logits.abs().mean().item() == pytest.approx(1.921163, abs=1e-5)
    assert logits.double().sum().item() == pytest.approx(-304394.2549, abs=1.0)
    assert generate(model, torch.tensor([[2]]), 31, temperature=0.0).tolist() == [GREEDY]


@torch.no_grad()
def test_microformer_in_transformers_on_our_attention(microformer: Path, tmp_path: Path) -> None:
    huggingface.register()
    GPT.from_pretrained(microformer).save_pretrained(tmp_path)
    for folder in (microformer, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastgpt")
        x = torch.arange(4, 68)[None]
        assert len(explain(model, x)) == 8
        out = model(x, labels=x)
        assert out.loss.item() == pytest.approx(11.850423, abs=1e-5)
        assert out.logits[0, -8:].argmax(-1).tolist()[-3:] == [3177, 8726, 8704]
        text = model.generate(
            torch.tensor([[2]]), max_new_tokens=31, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert text.tolist() == [GREEDY]
