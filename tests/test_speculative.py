"""Speculative decoding: the model's own distribution, in fewer passes."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.speculative import Lookup, accept, speculate

V = 6


def model(seed: int, **options: Any) -> GPT:
    """Random weights, wide enough apart that its distributions differ from flat ones."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=48, vocab_size=V, n_layer=1, n_head=2, n_embd=16, **options))
    for p in gpt.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    return gpt.eval()


def assert_drawn_from(found: Counter[Any], p: dict[Any, float]) -> None:
    """Pearson's chi-square test; it fails one right run in ten thousand."""
    n = sum(found.values())
    assert not any(found[x] for x in found if not p.get(x))
    cells = [x for x in p if p[x] > 0.0]
    common = [x for x in cells if n * p[x] >= 5.0]
    groups = [(found[x], n * p[x]) for x in common]
    rare = [x for x in cells if n * p[x] < 5.0]
    if rare:
        groups.append((sum(found[x] for x in rare), n * sum(p[x] for x in rare)))
    chi = sum((f - e) ** 2 / e for f, e in groups)
    df = len(groups) - 1
    # Wilson and Hilferty: (chi / df)^(1/3) is nearly normal.
    z = ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert z < 3.72, (chi, df)


def test_the_chi_square_test_sees_a_difference() -> None:
    rng = np.random.default_rng(0)
    found = Counter(rng.choice(3, 2000, p=[0.5, 0.3, 0.2]).tolist())
    assert_drawn_from(found, {0: 0.5, 1: 0.3, 2: 0.2})
    with pytest.raises(AssertionError):
        assert_drawn_from(found, {0: 0.45, 1: 0.35, 2: 0.2})


@pytest.mark.parametrize("drawn", [True, False])
def test_a_kept_or_replaced_token_has_the_models_distribution(drawn: bool) -> None:
    """Of draws of the first token of one that was proposed, from q or as it pleased."""
    rng = np.random.default_rng(0)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    weights = [0.1, 0.1, 0.4, 0.3, 0.1]
    q = torch.tensor([weights])
    found: Counter[int] = Counter()
    for _ in range(6000):
        x = int(rng.choice(5, p=weights)) if drawn else 2
        kept, last = accept(p, [x], q if drawn else None, rng.random(2))
        found[x if kept else last] += 1
    assert_drawn_from(found, dict(enumerate(p[0].tolist())))


@pytest.mark.parametrize("draft", ["model", "lookup"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=4, repetition_penalty=1.5)], ids=["plain", "more"]
)
def test_whole_texts_have_the_models_distribution(draft: str, sampling: Sampling) -> None:
    """Three tokens: all 216 texts, by the model's probabilities multiplied."""
    gpt = model(0)
    prompt = [1, 2, 3, 1, 2]
    p: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, weight in p.items():
            ids = torch.tensor([prompt + list(text)])
            seen = torch.zeros(1, V, dtype=torch.bool).scatter_(1, ids, True)
            with torch.no_grad():
                each = sampling.probabilities(gpt(ids)[:, -1], seen)[0].tolist()
            longer |= {(*text, x): weight * each[x] for x in range(V)}
        p = longer
    other: GPT | Lookup = model(1) if draft == "model" else Lookup()
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        passes = speculate(
            gpt, torch.tensor([prompt]), 3, other, sampling=sampling, draft_tokens=2, seed=seed
        )
        found[tuple(x for new in passes for x in new)] += 1
    assert_drawn_from(found, p)


@pytest.mark.parametrize("options", [{}, {"variant": "llama", "n_kv_head": 1}], ids=str)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("draft", ["model", "lookup", "itself"])
def test_greedy_text_is_generates(draft: str, k: int, options: dict[str, Any]) -> None:
    gpt = model(2, **options)
    other = {"model": model(3), "lookup": Lookup(2), "itself": gpt}[draft]
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    want = generate(gpt, ids, 40, temperature=0.0)
    passes = list(
        speculate(gpt, ids, 40, other, sampling=Sampling(temperature=0.0), draft_tokens=k)
    )
    assert [x for new in passes for x in new] == want[0, 5:].tolist()
    if draft == "itself":
        assert len(passes) == 40 // (k + 1)  # all that is drafted is kept


def test_a_text_that_repeats_itself_takes_fewer_passes() -> None:
    """Greedy text of a small model runs into a circle, which its own past foretells."""
    ids = torch.tensor([[1, 2, 3]])
    passes = list(speculate(model(2), ids, 45, Lookup(), sampling=Sampling(temperature=0.0)))
    assert len(passes) < 30


def test_it_ends_with_eos_and_at_max_new_tokens() -> None:
    gpt, ids = model(2), torch.tensor([[1, 2, 3]])
    for seed in range(20):
        whole = [x for new in speculate(gpt, ids, 9, gpt, seed=seed) for x in new]
        assert len(whole) == 9
        eos = whole[4]
        cut = [x for new in speculate(gpt, ids, 9, gpt, seed=seed, eos=eos) for x in new]
        assert cut == whole[: whole.index(eos) + 1]
    assert list(speculate(gpt, ids, 0, gpt)) == []


def test_the_same_seed_gives_the_same_text() -> None:
    gpt, ids = model(2), torch.tensor([[1, 2, 3]])
    one, two = (list(speculate(gpt, ids, 20, model(3), seed=7)) for _ in range(2))
    assert one == two


def test_lookup_takes_the_newest_place_of_the_longest_end() -> None:
    text = [1, 2, 3, 4, 9, 2, 3, 5, 8, 3, 6, 2, 3]
    assert Lookup(3).find(text, 2) == [5, 8]  # 2 3 stood twice before
    assert Lookup(1).find(text, 2) == [6, 2]  # 3 alone three times
    assert Lookup(3).find([1, 2, 3], 2) == []
    assert Lookup(3).find([7, 7], 4) == [7]
    assert Lookup(3).find([7], 4) == []


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Lookup(0), "longest must be at least 1; got 0"),
        (lambda: speculate(model(0), torch.ones(2, 3).long(), 4, Lookup()), r"\(1, T\)"),
        (lambda: speculate(model(0), torch.ones(1, 3).long(), -1, Lookup()), "got -1 and 4"),
        (lambda: speculate(model(0), torch.ones(1, 40).long(), 9, Lookup()), "got 40 and 9"),
        (
            lambda: speculate(
                model(0), torch.ones(1, 3).long(), 4,
                GPT(GPTConfig(block_size=48, vocab_size=7, n_layer=1, n_head=2, n_embd=16)),
            ),
            "the model's vocabulary, 6 ids; got 7",
        ),
    ],
)  # fmt: skip
def test_bad_input(act: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        act()
