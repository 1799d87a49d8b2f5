"""The variant "llama" against Hugging Face's Llama, its own counts, its cache, its errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT, GPTConfig, generate
from fastgpt.layouts import weights_from
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint
from tests.check import assert_one_graph

SMALL = GPTConfig(
    block_size=32, vocab_size=97, n_layer=2, n_head=4, n_embd=32, variant="llama", n_kv_head=2,
    n_inner=48, norm_eps=1e-5, rope_theta=1e3,
)  # fmt: skip


def small(**changes: Any) -> GPT:
    """A small model whose norms are not at their initial values."""
    model = GPT(replace(SMALL, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def ids(B: int = 2, T: int = 9, V: int = 97) -> Tensor:
    return torch.randint(0, V, (B, T))


def hugging_face(config: GPTConfig) -> Any:
    """Hugging Face's Llama of that shape, with weights of its own."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd,
            intermediate_size=config.inner, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied, head_dim=config.head_dim,
        )
    )  # fmt: skip
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return theirs.eval()


def renamed(theirs: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Hugging Face's weights or gradients under the names of the model's."""
    return weights_from(theirs, model.config, {n: t.shape for n, t in model.state_dict().items()})


@pytest.mark.parametrize("change", [{}, {"tied": False}, {"n_kv_head": None}], ids=str)
def test_matches_hugging_face_in_logits_and_every_gradient(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    theirs = hugging_face(config).double()
    model = GPT(config).double()
    model.load_state_dict(renamed(theirs.state_dict(), model))
    x = ids(3, 32)
    # Hugging Face makes its angles in float32.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model(x), theirs(x).logits, **close)
    model(x[:, :-1], x[:, 1:]).backward()
    F.cross_entropy(theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    want = renamed(grads, model)
    assert want.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, want[name], msg=name, **close)


def test_qk_norm_is_that_of_the_formula() -> None:
    """Attention with normalised heads, written out in complex numbers."""
    attn: Any = small(qk_norm=True, n_layer=1).double().h[0].attn
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    angle = torch.outer(torch.arange(5.0), 1e3 ** (-torch.arange(4.0) / 4)).double()
    q, k, v = attn.c_attn(x).view(2, 5, 8, 8).split([4, 2, 2], 2)
    q = F.rms_norm(q, (8,), attn.q_norm.weight, 1e-5)
    k = F.rms_norm(k, (8,), attn.k_norm.weight, 1e-5).repeat_interleave(2, 2)
    q, k = (torch.complex(*(t.contiguous() for t in y.chunk(2, -1))) for y in (q, k))
    q, k = (y * torch.polar(torch.ones_like(angle), angle)[:, None] for y in (q, k))
    scores = torch.einsum("bthd,bshd->bhts", q, k.conj()).real / 8**0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2))
    got = attn(x, turn=(angle.cos(), angle.sin()))
    torch.testing.assert_close(got, attn.c_proj(o.reshape(2, 5, 32)))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_cache_goes_on_where_the_text_was(qk_norm: bool) -> None:
    model = small(qk_norm=qk_norm)
    x = ids(2, 12)
    cache = model.new_cache(2, 12)
    assert cache.room(0).shape == (2, 2, 12, 2, 8)
    parts = [model.hidden(part, cache) for part in x.split([5, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(x), atol=1e-5, rtol=1e-4)


def test_greedy_text_is_hugging_faces() -> None:
    theirs = hugging_face(SMALL)
    model = GPT(SMALL)
    model.load_state_dict(renamed(theirs.state_dict(), model))
    x = ids(2, 4)
    want = theirs.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, x, 8, temperature=0.0), want)


def test_scores_do_not_depend_on_where_the_text_begins() -> None:
    model, x = small(), ids(1, 6)
    near = model.hidden(x)
    model._turns = model._turn(7, 6)
    torch.testing.assert_close(model.hidden(x), near, atol=1e-4, rtol=1e-4)


def test_a_model_of_16_bits_turns_by_float32_angles() -> None:
    model = small().bfloat16()
    assert model._turns is not None and model._turns[0].dtype == torch.float32
    assert model(ids()).dtype == torch.bfloat16


def test_compiles_whole_and_once_for_three_lengths() -> None:
    model = small(qk_norm=True)
    assert_one_graph(lambda idx: (model(idx),), [{"idx": ids(2, T)} for T in (5, 8, 13)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    model = small(qk_norm=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = ids(), ids()
    got, want = (torch.autograd.grad(f(x, y), list(model.parameters())) for f in (compiled, model))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_trains() -> None:
    model = GPT(replace(SMALL, qk_norm=True))
    optimizer = model.configure_optimizer(1e-2)
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    x = ids(4, 16)
    losses = []
    for _ in range(30):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    assert not any("bias" in name or "wpe" in name for name in model.state_dict())


def test_starts_as_gpt2_does() -> None:
    model = GPT(replace(SMALL, n_layer=8, n_embd=128, tied=False))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            want = 0.02 / 4 if name.endswith(("c_proj.weight", "down_proj.weight")) else 0.02
            assert abs(float(p.detach().std()) / want - 1.0) < 0.05, name


def test_counts() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("smollm2-135m"))
        assert GPT(GPTConfig.preset("smollm2-360m")).num_params() == 361_821_120
    assert model.num_params() == 134_515_008
    assert model.num_params(embeddings=False) == 134_515_008 - 49152 * 576
    small_one = small()
    T = 7
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small_one(ids(1, T))
    future = 2 * 2 * 2 * 32 * T * (T - 1) // 2
    assert counter.get_total_flops() - future == small_one.flops(T)
    assert GPTConfig(variant="llama").inner == 2048  # 8/3 of 768


def test_a_checkpoint_keeps_the_variant(tmp_path: Path) -> None:
    model = small(qk_norm=True, tied=False, vocab_size=300)
    tokenizer = Tokenizer.train("some text to count", 260)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, model, tokenizer)
    saver.wait()
    again, _ = checkpoint.load(tmp_path)
    assert again.config == model.config
    x = ids()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"variant": "bert"}, ValueError, r"variant must be one of gpt2, llama; got 'bert'"),
        ({"bias": True}, ValueError, r'variant "llama" has no biases; got bias True'),
        ({"n_kv_head": 3}, ValueError, r"multiple of n_kv_head; got n_head 4, n_kv_head 3"),
        ({"n_kv_head": 0}, ValueError, r"n_kv_head must be at least 1; got 0"),
        ({"n_inner": 4.5}, TypeError, r"n_inner must be an int; got 4.5"),
        ({"norm_eps": 0.0}, ValueError, r"norm_eps must be positive; got 0.0"),
        ({"rope_theta": "many"}, TypeError, r"rope_theta must be a number; got 'many'"),
        ({"tied": 1}, TypeError, r"tied must be True or False; got 1"),
        ({"variant": "gpt2"}, ValueError, r'rope_theta is of variant "llama" only; got .*gpt2.'),
        (
            {"variant": "gpt2", "qk_norm": True, "rope_theta": 1e4},
            ValueError,
            r'qk_norm is of variant "llama" only; got .*gpt2.',
        ),
    ],
    ids=str,
)
def test_rejects_a_shape(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GPTConfig: .*{message}$"):
        replace(SMALL, **change)
