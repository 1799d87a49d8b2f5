"""The step that generates on a CPU gives the modules' logits, and gives way where it must."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt.compress import compress
from fastgpt.decode import one_token
from fastgpt.lora import LoraConfig, add
from fastgpt.model import GPT, GPTConfig

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no bias": {"bias": False},
    "untied": {"tied": False},
    "grouped": {"n_kv_head": 2},
    "relu": {"activation": "relu"},
    "llama": {"variant": "llama", "n_kv_head": 2, "n_inner": 96},
    "narrow": {"variant": "llama", "n_head": 3, "n_kv_head": 1, "n_head_dim": 32, "n_inner": 96},
    "qk_norm": {"variant": "llama", "qk_norm": True, "tied": False, "n_inner": 96},
}


def model_of(shape: str = "gpt2", kind: str = "float32") -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=48, vocab_size=96, n_layer=3, n_head=4, n_embd=64)
    model = GPT(replace(config, **{"bias": None, "activation": None, **SHAPES[shape]}))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if name.endswith("weight") and p.ndim == 1 else 0.0, std=0.1)
    if kind in ("int8", "int4"):
        return compress(model, kind)
    return model.to(getattr(torch, kind)).eval()


def prompts(B: int, T: int = 7) -> Tensor:
    return torch.randint(0, 96, (B, T), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def both(model: GPT, ids: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """The logits after each of new tokens, by the step and by the modules, on the same tokens."""
    B, T = ids.shape
    made = []
    caches = [model.new_cache(B, T + new) for _ in range(2)]
    for cache in caches:
        model.hidden(ids, cache)
    step = one_token(model, caches[0], B)
    assert step is not None
    tokens = torch.randint(0, 96, (new, B), generator=torch.Generator().manual_seed(1))
    for token in tokens:
        theirs = model.logits(model.hidden(token[:, None], caches[1])[:, -1])
        made.append((step(token), theirs))
        assert caches[0].length == caches[1].length
    got, want = zip(*made, strict=True)
    return torch.stack(got), torch.stack(want)


@pytest.mark.parametrize("B", [1, 3, 9, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_gives_the_logits_of_the_modules(shape: str, B: int) -> None:
    got, want = both(model_of(shape), prompts(B), 9)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["gpt2", "qk_norm"])
def test_a_step_errs_no_more_than_the_modules(shape: str, kind: str, B: int) -> None:
    """Both against the same weights in float64."""
    model = model_of(shape, kind)
    wide = GPT(replace(model.config, quantized=None)).double().eval()
    state = model.state_dict() if kind == "bfloat16" else dequantized(model)
    wide.load_state_dict({n: t.double() for n, t in state.items()})
    ids = prompts(B)
    got, want = both(model, ids, 9)
    tokens = torch.randint(0, 96, (9, B), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gold = wide(torch.cat((ids, tokens.t()), 1))[:, ids.shape[1] :].transpose(0, 1)
    off, theirs = ((t.double() - gold).norm() / gold.norm() for t in (got, want))
    assert got.dtype == want.dtype
    assert off <= 1.25 * theirs + 1e-6
    assert off < 0.05


def dequantized(model: GPT) -> dict[str, Tensor]:
    """A quantised model's state_dict with its weights as numbers."""
    from fastgpt.quantized import Quantized

    state = {n: t for n, t in model.state_dict().items() if not n.endswith(".scale")}
    for name, m in model.named_modules():
        if isinstance(m, Quantized):
            state[f"{name}.weight"] = m.dequantized(torch.float64)
    return state


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_what_is_in_the_cache_stays(kind: str) -> None:
    model = model_of("gpt2", kind)
    with torch.inference_mode():
        cache = model.new_cache(2, 20)
        model.hidden(prompts(2), cache)
        step = one_token(model, cache, 2)
        assert step is not None
        for _ in range(5):
            before = [cache.room(n)[:, :, : cache.length].clone() for n in range(3)]
            step(prompts(2)[:, 0])
            for n, kept in enumerate(before):
                assert torch.equal(cache.room(n)[:, :, : cache.length - 1], kept)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_rows_of_a_batch_are_the_rows_alone(kind: str) -> None:
    model, ids = model_of("gpt2", kind), prompts(4)
    together = fastgpt.generate(model, ids, 20, temperature=0.0)
    alone = torch.cat([fastgpt.generate(model, row[None], 20, temperature=0.0) for row in ids])
    same = (together == alone).all(1)
    assert bool(same.all()) if kind == "float32" else int(same.sum()) >= 3


def test_generate_takes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(), prompts(2)
    want = fastgpt.generate(model, ids, 12, temperature=0.0)
    calls = []
    forward = GPT.hidden

    def counted(self: GPT, *args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(GPT, "hidden", counted)
    assert torch.equal(fastgpt.generate(model, ids, 12, temperature=0.0), want)
    assert len(calls) == 1  # the prompt
    monkeypatch.setattr("fastgpt.decoder.one_token", lambda *a: None)
    assert torch.equal(fastgpt.generate(model, ids, 12, temperature=0.0), want)
    assert len(calls) == 1 + 12


def test_weights_that_change_are_seen() -> None:
    model, ids = model_of(), prompts(1)
    first = fastgpt.generate(model, ids, 12, temperature=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.3)
    model.zero_grad()
    again = fastgpt.generate(model, ids, 12, temperature=0.0)
    assert not torch.equal(first, again)
    fresh = GPT(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fastgpt.generate(fresh, ids, 12, temperature=0.0), again)


def _hook(model: GPT) -> None:
    model.h[1].register_forward_hook(lambda *a: None)


def _mixed(model: GPT) -> None:
    model.h[0].bfloat16()


def _other(model: GPT) -> None:
    model.h[0].mlp = nn.Identity()


def _lora(model: GPT) -> None:
    add(model, LoraConfig(rank=2))


@pytest.mark.parametrize("change", [_hook, _mixed, _other, _lora, GPT.double])
def test_other_models_run_by_their_modules(change: Any) -> None:
    model = model_of()
    change(model)
    assert one_token(model, model.new_cache(1, 20), 1) is None


def test_under_autocast_the_modules_run() -> None:
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert one_token(model, model.new_cache(1, 20), 1) is None
        assert fastgpt.generate(model, prompts(1), 4).shape == (1, 11)
