"""Generation: the cache changes nothing, a seed is a text, and what is drawn is what should be."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgpt
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT, GPTConfig


@pytest.fixture
def model() -> GPT:
    made = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=32, dropout=0.3))
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def prompts(B: int, T: int) -> Tensor:
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(7))


def without_cache(model: GPT, ids: Tensor, n: int) -> Iterator[Tensor]:
    """The logits that decide each of n greedy tokens, everything computed anew each time."""
    model.eval()
    for _ in range(n):
        logits = model(ids)[:, -1]
        yield logits
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)


@pytest.mark.parametrize("T", [1, 5, 31])
def test_the_cache_changes_nothing(model: GPT, T: int) -> None:
    ids, n = prompts(3, T), 32 - T
    with torch.no_grad():
        want = torch.stack([x.argmax(-1) for x in without_cache(model, ids, n)], 1)
    assert torch.equal(fastgpt.generate(model, ids, n, temperature=0.0)[:, T:], want)


def test_cached_logits_are_the_logits(model: GPT) -> None:
    model.eval()
    ids = prompts(2, 20)
    with torch.no_grad():
        want = model(ids)
        cache = model.new_cache(2)
        parts = [
            model.logits(model.hidden(ids[:, a:b], cache))
            for a, b in ((0, 7), (7, 8), (8, 9), (9, 20))
        ]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)


def test_a_row_is_the_same_alone_and_in_a_batch(model: GPT) -> None:
    ids = prompts(4, 5)
    seeds = [11, 5, 99, 5]
    together = fastgpt.generate(model, ids, 20, seed=seeds, top_p=0.9)
    for row, seed in enumerate(seeds):
        alone = fastgpt.generate(model, ids[row : row + 1], 20, seed=seed, top_p=0.9)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(
        fastgpt.generate(model, ids, 20, seed=3),
        fastgpt.generate(model, ids, 20, seed=[3, 4, 5, 6]),
    )


def test_a_seed_is_a_text(model: GPT) -> None:
    ids = prompts(1, 3)
    first, again, other = (fastgpt.generate(model, ids, 25, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shorter = fastgpt.generate(model, ids, 10, seed=1)
    assert torch.equal(shorter, first[:, :13])


def test_without_a_seed_torch_decides(model: GPT) -> None:
    ids = prompts(1, 3)
    torch.manual_seed(5)
    first, second = fastgpt.generate(model, ids, 25), fastgpt.generate(model, ids, 25)
    torch.manual_seed(5)
    assert torch.equal(fastgpt.generate(model, ids, 25), first)
    assert not torch.equal(first, second)


def test_the_stream_is_the_text(model: GPT) -> None:
    ids = prompts(2, 4)
    whole = fastgpt.generate(model, ids, 12, seed=0)
    streamed = list(fastgpt.stream(model, ids, 12, seed=0))
    assert torch.equal(torch.stack(streamed, 1), whole[:, 4:])
    assert torch.equal(whole[:, :4], ids)


def test_a_row_ends_at_eos_and_is_filled_up(model: GPT) -> None:
    ids = prompts(3, 4)
    free = fastgpt.generate(model, ids, 28, seed=0)[:, 4:]
    eos = int(free[1, 3])
    ended = fastgpt.generate(model, ids, 28, seed=0, eos=eos)[:, 4:]
    lengths = []
    for row in range(3):
        at = (free[row] == eos).nonzero().flatten().tolist()
        end = at[0] + 1 if at else 28
        lengths.append(end)
        assert torch.equal(ended[row, :end], free[row, :end])
        assert bool((ended[row, end:] == eos).all())
    assert ended.shape[1] == max(lengths)
    assert min(lengths) <= 4


def test_the_mode_is_left_as_it_was(model: GPT) -> None:
    for mode in (True, False):
        model.train(mode)
        new = fastgpt.generate(model, prompts(1, 3), 4)
        assert all(m.training is mode for m in model.modules())
    # Tokens made in inference mode could not be trained on.
    model(new, new).backward()
    half = fastgpt.stream(model.train(), prompts(1, 3), 4)
    next(half)
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_no_tokens_are_no_tokens(model: GPT) -> None:
    ids = prompts(2, 32)
    assert torch.equal(fastgpt.generate(model, ids, 0), ids)


def test_bfloat16_weights_generate(model: GPT) -> None:
    new = fastgpt.generate(model.bfloat16(), prompts(2, 4), 6, temperature=0.0)
    assert new.shape == (2, 10)


@pytest.mark.gpu
def test_kernels_generate_what_the_reference_does(model: GPT, device: str) -> None:
    model = model.to(device)
    ids = prompts(2, 5).to(device)
    with fastgpt.use("triton"):
        made = fastgpt.generate(model, ids, 6, temperature=0.0)
    with fastgpt.use("reference"):
        want = fastgpt.generate(model, ids, 6, temperature=0.0)
    assert torch.equal(made, want)


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=30)
def test_ids_are_drawn_as_often_as_they_are_likely(
    weights: list[float], temperature: float
) -> None:
    n = 2000
    logits = torch.tensor(weights).log()
    p = (logits / temperature).softmax(-1)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = Sampling(temperature).choose(logits.expand(n, -1), u)
    share = torch.bincount(drawn, minlength=len(weights)) / n
    assert float((share - p).abs().max()) <= 1.5 / n + 1e-6


@given(
    logits=st.lists(st.integers(-8, 8), min_size=1, max_size=9, unique=True),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.05, 1.0),
)
def test_only_what_top_k_and_top_p_leave_is_drawn(
    logits: list[int], top_k: int | None, top_p: float | None
) -> None:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    p = torch.tensor([float(logits[i]) for i in order], dtype=torch.float64).softmax(-1).tolist()
    kept, total = set(), 0.0
    for i, share in zip(order, p, strict=True):
        if top_p is not None and total >= top_p - 1e-6 and top_p < 1.0:
            break
        kept.add(i)
        total += share
    u = torch.linspace(0, 1 - 1e-12, 301, dtype=torch.float64)
    row = torch.tensor(logits, dtype=torch.float32).expand(301, -1)
    drawn = set(Sampling(1.0, top_k, top_p).choose(row, u).tolist())
    assert drawn <= kept
    assert order[0] in drawn


def test_the_largest_u_draws_a_possible_id() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    u = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    assert Sampling().choose(logits, u).item() == 1


def test_a_small_temperature_is_greedy() -> None:
    logits = torch.randn(8, 50)
    u = torch.rand(8, dtype=torch.float64)
    assert torch.equal(Sampling(1e-30).choose(logits, u), logits.argmax(-1))


@pytest.mark.parametrize(
    "ids, options, error, message",
    [
        (prompts(1, 33), {}, ValueError, r"block_size 32; got a prompt of 33 and max_new_tokens 4"),
        (prompts(1, 29), {}, ValueError, r"block_size 32; got a prompt of 29 and max_new_tokens 4"),
        (prompts(1, 0), {}, ValueError, r"ids must be \(B, T\), B and T at least 1; got \(1, 0\)"),
        (prompts(1, 4)[0], {}, ValueError, r"ids must be \(B, T\).*; got \(4,\)"),
        (prompts(1, 4).float(), {}, TypeError, r"ids must be int64 or int32; got torch.float32"),
        (prompts(1, 4), {"max_new_tokens": -1}, ValueError, r"must not be negative; got -1"),
        (prompts(1, 4), {"temperature": -1.0}, ValueError, r"temperature must be 0 or more.*-1.0"),
        (prompts(1, 4), {"temperature": float("nan")}, ValueError, r"temperature .*; got nan"),
        (prompts(1, 4), {"top_k": 0}, ValueError, r"top_k must be at least 1; got 0"),
        (prompts(1, 4), {"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\]; got 0.0"),
        (prompts(1, 4), {"seed": [1, 2]}, ValueError, r"one seed a row, 1; got 2"),
        (prompts(1, 4), {"seed": -1}, ValueError, r"seed must not be negative; got -1"),
        (prompts(1, 4), {"eos": 61}, ValueError, r"eos must lie in .*, 0 to 60; got 61"),
        (prompts(1, 4) + 61, {}, ValueError, r"ids must lie in the vocabulary, 0 to 60; got \d+"),
    ],
)  # fmt: skip
def test_rejects(
    model: GPT, ids: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^(generate|GPT): .*{message}$"):
        fastgpt.generate(model, ids, **{"max_new_tokens": 4, **options})


def test_stream_rejects_before_the_first_token(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"^generate: prompt and new tokens"):
        fastgpt.stream(model, prompts(1, 33), 1)
