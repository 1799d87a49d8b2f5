"""Attention weights of some rows, and of a model that runs as always while they are kept."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig, capture_attention, ops
from fastgpt.huggingface.model import FastGPTConfig, FastGPTForCausalLM
from fastgpt.interpret.rows import weights_of_rows
from fastgpt.ops.attention_reference import attention_weights
from fastgpt.ops.watch import Seen, watched
from tests.conftest import launched
from tests.test_packed import CONFIG, LLAMA, model_of
from tests.test_pretrained_gpt2 import microformer  # noqa: F401

CONFIGS = pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama, grouped"])
ROWS, HEADS = (6, 0, 3), (3, 1)


def ids(B: int = 2, T: int = 9) -> Tensor:
    return torch.randint(31, (B, T))


def inputs(device: str, Tq: int = 7, Tk: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, Tq, 4, 16), (2, Tk, 2, 16), (2, Tk, 2, 16)
    return tuple(torch.randn(s, device=device) for s in shapes)  # type: ignore[return-value]


def features(device: str) -> dict[str, dict[str, Any]]:
    return {
        "causal": {},
        "all": {"causal": False},
        "window": {"window": 3},
        "softcap": {"softcap": 0.7},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 2.0], device=device)},
        "bias": {"bias": torch.randn(1, 4, 7, 11, device=device)},
        "mask": {"key_mask": torch.arange(11, device=device).expand(2, -1) != 3},
        "documents": {"document_ids": (torch.arange(11, device=device) // 4).expand(2, -1)},
    }


def check_rows(name: str, device: str, scale: float = 0.3) -> None:
    q, k, v = inputs(device)
    seen: list[Seen] = []
    with watched(seen.append):
        o = ops.attention(q, k, v, softmax_scale=scale, **features(device)[name])
    (call,) = seen
    whole, _, _ = attention_weights(
        q, k, scale, call.left, call.right, 0.0, None, call.extras
    )  # (B, H, Tq, Tk)
    got = weights_of_rows(call, HEADS, ROWS)
    torch.testing.assert_close(got, whole[:, HEADS][:, :, ROWS], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, 3, device=device))
    assert torch.equal(call.o, o)


@pytest.mark.parametrize("name", features("cpu"))
def test_rows_are_those_of_the_whole_matrix(name: str) -> None:
    check_rows(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["window", "softcap", "bias", "documents"])
def test_rows_of_the_kernels_lse(name: str, device: str) -> None:
    check_rows(name, device)


def test_a_row_that_sees_no_key_is_zero() -> None:
    q, k, v = inputs("cpu")
    seen: list[Seen] = []
    with watched(seen.append):
        ops.attention(q, k, v, key_mask=torch.zeros(2, 11, dtype=torch.bool))
    assert torch.equal(weights_of_rows(seen[0], HEADS, ROWS), torch.zeros(2, 2, 3, 11))


def test_rows_of_sequences_end_to_end() -> None:
    """Of fewer queries than keys, and an empty one between."""
    q, k, v = (t.flatten(0, 1) for t in inputs("cpu", 6, 9))
    cu_q, cu_k = torch.tensor([0, 4, 4, 12]), torch.tensor([0, 7, 9, 18])
    seen: list[Seen] = []
    with watched(seen.append):
        o = ops.attention_varlen(q, k, v, cu_q, cu_k, 8, 9)
    w = weights_of_rows(seen[0], range(4), range(12))[0]  # (H, 12, 18)
    torch.testing.assert_close(w.sum(-1), torch.ones(4, 12))
    values = v.repeat_interleave(2, 1).transpose(0, 1)  # (H, 18, D)
    torch.testing.assert_close((w @ values).transpose(0, 1), o)


def check_model(config: GPTConfig, device: str) -> None:
    model, idx = model_of(config, device).eval(), ids().to(device)
    before = launched.copy()
    want = model(idx)
    between = launched.copy()
    with capture_attention(model, rows=None, keep="qkvo") as captured:
        got = model(idx)
    assert torch.equal(got, want)
    assert launched - between == between - before
    assert [call.layer for call in captured.calls] == [0, 1]
    for call in captured.calls:
        assert call.q is not None and call.k is not None
        assert call.v is not None and call.o is not None
        assert call.weights.shape == (2, config.n_head, 9, 9)
        scores = call.q @ call.k.mT * call.scale
        hidden = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
        written_out = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(call.weights, written_out, atol=1e-6, rtol=1e-5)
        sums = call.weights.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-6, rtol=0.0)
        torch.testing.assert_close(call.weights @ call.v, call.o, atol=1e-5, rtol=1e-5)
    with capture_attention(model, layers=-1, heads=[1], rows=[2, -1], keep=["q"]) as few:
        model(idx)
    (call,), last = few.calls, captured[1]
    assert (call.layer, call.heads, call.rows, call.k) == (1, (1,), (2, 8), None)
    assert last.q is not None and call.q is not None
    assert torch.equal(call.q, last.q[:, 1:2, [2, 8]])
    torch.testing.assert_close(call.weights, last.weights[:, 1:2, [2, 8]], atol=1e-6, rtol=1e-5)


@CONFIGS
def test_a_model_runs_as_always(config: GPTConfig) -> None:
    check_model(config, "cpu")


@pytest.mark.gpu
@CONFIGS
def test_a_model_runs_as_always_on_kernels(config: GPTConfig, device: str) -> None:
    check_model(config, device)


@pytest.mark.gpu
def test_gradients_on_kernels_are_as_always(device: str) -> None:
    model = model_of(replace(CONFIG, n_layer=1, recompute=2), device)
    idx = ids(1, 4).to(device)
    want = torch.autograd.grad(model(idx, idx), list(model.parameters()))
    with capture_attention(model) as captured:
        got = torch.autograd.grad(model(idx, idx), list(model.parameters()))
    assert all(map(torch.equal, got, want))
    assert len(captured.calls) == 1 and not captured[0].weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = model_of(CONFIG).to(dtype)
    with capture_attention(model) as captured:
        model(ids())
    w = captured[1].weights
    assert w.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


def test_autocast_does_not_round_the_weights() -> None:
    model = model_of(CONFIG)
    with torch.autocast("cpu", torch.bfloat16), capture_attention(model) as captured:
        model(ids())
    w = captured[1].weights
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


@CONFIGS
@torch.no_grad()
def test_steps_with_a_cache_are_rows_of_the_whole(config: GPTConfig) -> None:
    model, idx = model_of(config).eval(), ids(1)
    with capture_attention(model, layers=1, rows=None) as whole:
        model(idx)
    cache = model.new_cache(1)
    with capture_attention(model, layers=1, rows=None) as steps:
        for part in idx.split([5, 1, 3], dim=1):
            model.hidden(part, cache)
    assert [call.weights.shape[2:] for call in steps.calls] == [(5, 5), (1, 6), (3, 9)]
    rows = [row for call in steps.calls for row in call.weights[0].unbind(1)]  # (H, Tk) each
    for t, row in enumerate(rows):
        torch.testing.assert_close(row, whole[1].weights[0, :, t, : row.shape[1]])
    with pytest.raises(ValueError, match="layer 1 made 3 calls; they are in calls"):
        steps[1]


def test_every_step_of_generate_is_seen() -> None:
    model, idx = model_of(CONFIG).eval(), ids(1, 4)
    want = fastgpt.generate(model, idx, 5, temperature=0.0)
    with capture_attention(model) as captured:
        got = fastgpt.generate(model, idx, 5, temperature=0.0)
    assert torch.equal(got, want)
    lengths = [call.weights.shape[3] for call in captured.calls if call.layer == 0]
    assert lengths == [4, 5, 6, 7, 8]


@CONFIGS
def test_packed_documents_look_at_themselves_alone(config: GPTConfig) -> None:
    model, idx = model_of(config).eval(), ids(2, 10)
    ends = [0, 7, 12, 20]
    with capture_attention(model, rows=None) as packed:
        model(idx, cu_seqlens=torch.tensor(ends))
    weights = packed[1].weights[0]  # (H, 20, 20)
    for start, end in pairwise(ends):
        with capture_attention(model, rows=None) as alone:
            model(idx.view(1, -1)[:, start:end])
        torch.testing.assert_close(weights[:, start:end, start:end], alone[1].weights[0])
        weights[:, start:end, start:end] = 0.0
    assert not weights.any()


def test_another_models_calls_are_not_its_own() -> None:
    model, other = model_of(CONFIG), model_of(LLAMA)
    with capture_attention(model) as captured, capture_attention(other) as others:
        model(ids())
        other(ids())
        ops.attention(*inputs("cpu"))
    assert len(captured.calls) == len(others.calls) == 2
    model(ids())
    assert len(captured.calls) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_holds_a_gpt() -> None:
    model = FastGPTForCausalLM(FastGPTConfig(24, 31, 1, 2, 16))
    with capture_attention(model) as captured:
        model(ids())
    assert captured[0].weights.shape == (2, model.config.n_head, 1, 9)


def test_real_weights_as_transformers_eager_attention_has_them(
    microformer: Path,  # noqa: F811
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        microformer, attn_implementation="eager"
    )
    model = GPT.from_pretrained(microformer)
    idx = torch.randint(model.config.vocab_size, (1, 24))
    with torch.no_grad():
        want = theirs(idx, output_attentions=True).attentions
        with capture_attention(model, rows=None) as captured:
            model(idx)
    assert len(want) == model.config.n_layer
    for layer, w in enumerate(want):
        torch.testing.assert_close(captured[layer].weights, w, atol=1e-5, rtol=1e-4)


def test_what_it_refuses() -> None:
    model = model_of(CONFIG)
    for changes, said in (
        ({"layers": 2}, "layers must lie in 0 to 1, or from -2 on if counted from the end; got 2"),
        ({"heads": [0, 0]}, "heads must differ; got 0, 0"),
        ({"rows": 24}, "rows must lie in 0 to 23"),
        ({"keep": ["q", "p"]}, "keep must be of q, k, v, o; got 'p'"),
    ):
        with pytest.raises(ValueError, match=said), capture_attention(model, **changes):
            pass
    with pytest.raises(TypeError, match=r"layers must be integers; got 0\.5"):
        with capture_attention(model, layers=[0.5]):  # type: ignore[list-item]
            pass
    with pytest.raises(TypeError, match=r"one fastgpt\.GPT; got Linear, which holds 0"):
        with capture_attention(torch.nn.Linear(2, 2)):
            pass
    with pytest.raises(ValueError, match="a compiled model's inside is not seen"):
        with capture_attention(torch.compile(model)):
            pass
    with capture_attention(model, layers=0) as captured:
        with pytest.raises(ValueError, match="rows must lie in 0 to 8"):
            with capture_attention(model, rows=9):
                model(ids())
    with pytest.raises(ValueError, match="the layers asked for are 0; got 1"):
        captured[1]
    with capture_attention(model) as captured:
        pass
    with pytest.raises(ValueError, match="layer 0 made no call"):
        captured[0]
