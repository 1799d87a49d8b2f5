"""Rollout, logit lens, attribution, ablation and direct logits, each against what it must equal."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPT, capture_attention, compress, interpret
from fastgpt.interpret import (
    attention_rollout,
    direct_logits,
    head_ablation,
    logit_lens,
    token_attribution,
)
from tests.test_packed import CONFIG, LLAMA, model_of

CONFIGS = pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama, grouped"])
TARGET = 7


def ids(T: int = 9) -> Tensor:
    return torch.randint(31, (1, T))


def sharp(config: object, device: str = "cpu") -> GPT:
    """A model whose parts matter, in training mode, where there is no dropout to be seen."""
    model = model_of(replace(config, dropout=0.3), device)  # type: ignore[type-var]
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 4.0
    return model


@torch.no_grad()
def loss(model: GPT, idx: Tensor, target: int | None) -> Tensor:
    logits = model.eval()(idx)
    if target is None:
        return F.cross_entropy(logits[0, :-1], idx[0, 1:])
    return -logits[0, -1].log_softmax(-1)[target]


# ------------------------------------------------------------------ rollout


def test_rollout_is_the_product_written_out() -> None:
    model = sharp(CONFIG).eval()
    with capture_attention(model, rows=None) as captured:
        model(ids())
    got = attention_rollout(captured)
    first, second = (captured[n].weights.mean(1)[0] for n in (0, 1))
    eye = torch.eye(9)
    torch.testing.assert_close(got[0], (second + eye) / 2 @ (first + eye) / 2)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 9))
    assert not got[0].triu(1).any()
    torch.testing.assert_close(attention_rollout(captured, 1.0)[0], eye)


def test_rollout_wants_all_layers_and_rows() -> None:
    model = model_of(CONFIG)
    with capture_attention(model, layers=1, rows=None) as captured:
        model(ids())
    with pytest.raises(ValueError, match="all layers"):
        attention_rollout(captured)
    with capture_attention(model) as captured:
        model(ids())
    with pytest.raises(ValueError, match="all 9 rows must be captured, rows=None"):
        attention_rollout(captured)


# ------------------------------------------------------------------ logit lens


def check_lens(config: object, device: str) -> None:
    model, idx = sharp(config, device), ids().to(device)
    got = logit_lens(model, idx, rows=None)
    assert model.training
    with torch.no_grad():
        want = model.eval()(idx)
        assert got.shape == (3, 1, 9, 31)
        torch.testing.assert_close(got[-1], want, atol=1e-5, rtol=1e-5)
        bottom = model.logits(model.ln_f(model._embed(idx, 0, 0.0, None)))
        torch.testing.assert_close(got[0], bottom)
        torch.testing.assert_close(logit_lens(model, idx), got[:, :, -1:], atol=1e-5, rtol=1e-5)
        del model.h[1]
        torch.testing.assert_close(got[1], model(idx), atol=1e-5, rtol=1e-5)


@CONFIGS
def test_the_lens_is_the_model_cut_off(config: object) -> None:
    check_lens(config, "cpu")


@pytest.mark.gpu
def test_the_lens_on_kernels(device: str) -> None:
    check_lens(CONFIG, device)


# ------------------------------------------------------------------ heads


@CONFIGS
@pytest.mark.parametrize("target", [TARGET, None])
def test_ablation_is_a_model_with_a_head_taken_out(config: object, target: int | None) -> None:
    """c_proj without the head's columns gives what zeroing its slice gives."""
    model, idx = sharp(config), ids()
    got = head_ablation(model, idx, target)
    c = model.config
    assert got.shape == (c.n_layer, c.n_head) and got.abs().min() > 1e-4
    assert model.training
    whole = loss(model, idx, target)
    for layer in range(c.n_layer):
        for head in range(c.n_head):
            weight = model.get_parameter(f"h.{layer}.attn.c_proj.weight")
            kept = weight.detach().clone()
            weight.data[:, head * c.head_dim : (head + 1) * c.head_dim] = 0.0
            without = loss(model, idx, target)
            weight.data.copy_(kept)
            torch.testing.assert_close(got[layer, head], without - whole, atol=1e-5, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ablation_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = sharp(LLAMA), ids()
    want = head_ablation(model, idx, TARGET)
    monkeypatch.setattr(interpret.heads, "ROOM", 27)
    torch.testing.assert_close(head_ablation(model, idx, TARGET), want, atol=1e-6, rtol=1e-5)


@CONFIGS
def test_direct_logits_sum_to_the_logit(config: object) -> None:
    model, idx = sharp(config), ids()
    got = direct_logits(model, idx, TARGET)
    want = float(model.eval()(idx)[0, -1, TARGET].detach())
    assert got.logit == pytest.approx(want, rel=1e-5)
    assert got.sum == pytest.approx(want, rel=1e-4)
    for parts in (got.heads, got.mlp):
        assert parts.abs().min() > 1e-4
    assert (got.position != 0.0) == (model.wpe is not None)


def test_direct_logits_of_a_head_that_does_nothing_are_zero() -> None:
    model = sharp(CONFIG)
    model.get_parameter("h.1.attn.c_proj.weight").data[:, :16] = 0.0
    got = direct_logits(model, ids(), TARGET).heads
    assert float(got[1, 0]) == pytest.approx(0.0, abs=1e-6) and float(got[1, 1].abs()) > 1e-4


# ------------------------------------------------------------------ attribution


@CONFIGS
def test_integrated_gradients_are_complete(config: object) -> None:
    pytest.importorskip("captum")
    model, idx = model_of(config), ids()  # type: ignore[arg-type]
    got = token_attribution(model, idx, TARGET)
    assert got.value == pytest.approx(-float(loss(model, idx, TARGET)), rel=1e-5)
    assert got.baseline is not None and got.error is not None
    assert abs(got.error) <= 0.01 * abs(got.value - got.baseline)
    assert got.scores.shape == (9,)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_x_input_is_a_small_step_of_each_token() -> None:
    pytest.importorskip("captum")
    model, idx = model_of(CONFIG).double(), ids(5)
    got = token_attribution(model, idx, TARGET, "gradient_x_input").scores
    step, changes = 1e-6, []
    for t in range(5):
        rows = F.embedding(idx, model.wte.weight).detach()
        values = []
        for sign in (1.0, -1.0):
            moved = rows.clone()
            moved[0, t] *= 1.0 + sign * step
            state = interpret.stream.with_positions(model, moved)
            logits = interpret.attribution._logits(model, state)
            values.append(float(logits.log_softmax(-1)[0, TARGET].detach()))
        changes.append((values[0] - values[1]) / (2 * step))
    torch.testing.assert_close(got, torch.tensor(changes), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(find_spec("captum") is None, reason="needs captum")
@pytest.mark.gpu
def test_attribution_and_ablation_through_kernels(device: str) -> None:
    model, idx = model_of(replace(CONFIG, n_layer=1), device), ids(4).to(device)
    on_kernels = token_attribution(model, idx, TARGET, "gradient_x_input").scores
    heads = head_ablation(model, idx, TARGET)
    model.cpu().double()
    gold = token_attribution(model, idx.cpu(), TARGET, "gradient_x_input").scores
    torch.testing.assert_close(on_kernels, gold, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(heads, head_ablation(model, idx.cpu(), TARGET), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ what is refused


def test_what_it_refuses() -> None:
    model = model_of(CONFIG)
    with pytest.raises(ValueError, match="must be \\(1, T\\), at least 2 tokens without a target"):
        head_ablation(model, ids(1))
    with pytest.raises(ValueError, match="target must lie in the vocabulary, 0 to 30; got 31"):
        direct_logits(model, ids(), 31)
    with pytest.raises(ValueError, match="method must be integrated_gradients or"):
        token_attribution(model, ids(), 3, "lime")
    with pytest.raises(ValueError, match="the context is at most block_size 24 tokens; got 25"):
        logit_lens(model, ids(25))
    with pytest.raises(ValueError, match="rows must lie in 0 to 8"):
        logit_lens(model, ids(), rows=9)
    with pytest.raises(ValueError, match="float weights, through which gradients go; it has int8"):
        token_attribution(compress(model, "int8"), ids(), 3)
