"""complete: prompts of any lengths, many continuations, stops, log-probabilities, sliding."""

from typing import Any

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt import GPT, GPTConfig, beam_search, complete, generate
from fastgpt.generation.completion import Writing
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.speculative import Lookup
from fastgpt.tokenizer import Tokenizer

TEXT = "In year one a fox met nine dogs; 白日依山尽，黄河入海流。"
TOKENIZER = Tokenizer.train([TEXT * 20], 300)
V = 300
PROMPTS = [[5], [7, 8, 9, 250, 3], [1, 2], [7, 8, 9, 250, 3], [4] * 9]


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(1)
    config = GPTConfig(32, V, n_layer=2, n_head=2, n_embd=32, dropout=0.2, variant=request.param)
    made = GPT(config)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def ids_of(rows: list[list[Any]]) -> list[list[list[int]]]:
    return [[one.ids for one in row] for row in rows]


def test_a_row_is_its_prompt_and_its_seed(model: GPT) -> None:
    """Alone, in a batch, beside longer ones, and as the k-th of n."""
    together = ids_of(complete(model, PROMPTS, 12, n=3, seed=40, top_p=0.95))
    assert len({tuple(ids) for row in together for ids in row}) == 15
    for b, prompt in enumerate(PROMPTS):
        for k in range(3):
            seed = 40 + 3 * b + k
            alone = generate(model, torch.tensor([prompt]), 12, seed=seed, top_p=0.95)
            assert together[b][k] == alone[0, len(prompt) :].tolist()
    seeds = [40 + r for r in range(15)]
    assert ids_of(complete(model, PROMPTS, 12, n=3, seed=seeds, top_p=0.95)) == together
    assert model.training


def test_rows_end_each_by_itself(model: GPT) -> None:
    """And those that go on are as if the others had, through every change of the batch."""
    free = complete(model, PROMPTS, 16, n=2, seed=3)
    eos = sorted({id for row in free for one in row for id in one.ids[2:7]})[::5]
    for row, was in zip(complete(model, PROMPTS, 16, n=2, seed=3, eos=eos), free, strict=True):
        for one, all_of_it in zip(row, was, strict=True):
            at = next((i for i, id in enumerate(all_of_it.ids) if id in eos), None)
            assert one.ids == all_of_it.ids[: 16 if at is None else at + 1]
            assert one.ended == ("length" if at is None else "eos")


def test_a_prompt_is_read_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    hidden = GPT.hidden

    def counted(self: GPT, idx: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        rows.append(tuple(idx.shape))
        return hidden(self, idx, *args, **options)

    monkeypatch.setattr(GPT, "hidden", counted)
    complete(model, [[1] * 9], 4, n=6, seed=0)
    assert [shape for shape in rows if shape[1] > 1] == [(1, 9)]


def test_text_stops_before_a_string_across_tokens(model: GPT) -> None:
    (free,) = complete(model, ["In year"], 20, tokenizer=TOKENIZER, n=4, seed=11, eos=())
    for k, one in enumerate(free):
        text = one.text.rstrip("\ufffd")
        for at in (1, len(text) // 2):
            stop = text[at : at + 3]
            cut = text[: text.index(stop)]
            ((again,),) = complete(
                model, ["In year"], 20, tokenizer=TOKENIZER, seed=11 + k, eos=(), stop=[stop]
            )
            assert (again.text, again.ended) == (cut, "stop")
            assert again.ids == one.ids[: len(again.ids)]
            before = TOKENIZER.decode(again.ids[:-1]).rstrip("\ufffd")
            assert stop not in before  # it went on no longer than it had to
    pieces = Writing(model, ["In year"], 20, tokenizer=TOKENIZER, seed=11, eos=())
    streamed = list(pieces)
    assert [p.id for p in streamed] == free[0].ids
    assert "".join(p.text for p in streamed) == free[0].text == TOKENIZER.decode(free[0].ids)
    assert not any("\ufffd" in p.text for p in streamed[:-1]) or "\ufffd" in free[0].text


@pytest.mark.parametrize("draft", [Lookup(), "model"])
def test_a_draft_changes_nothing_but_the_pace(model: GPT, draft: Any) -> None:
    """What it draws is tested by tests/test_speculative.py."""
    smaller = GPT(GPTConfig(32, V, n_layer=1, n_head=1, n_embd=8)) if draft == "model" else draft
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "temperature": 0.0, "eos": [9, 77]}
    want = complete(model, ["In year one", "fox"], 12, **options, stop=["好", "a"])
    got = complete(model, ["In year one", "fox"], 12, **options, stop=["好", "a"], draft=smaller)
    assert got == want
    drawn = complete(model, [[5], [6]], 9, n=3, seed=1, draft=smaller)
    again = complete(model, [[6]], 9, n=3, seed=4, draft=smaller)
    assert drawn[1] == again[0]
    assert len({tuple(one.ids) for row in drawn for one in row}) == 6


def test_what_was_written_so_far_is_there(model: GPT) -> None:
    writing = Writing(model, [[5], [6]], 9, n=2, seed=0)
    for count, _ in enumerate(writing, 1):
        if count == 6:
            break
    whole = complete(model, [[5], [6]], 9, n=2, seed=0)
    flat = [one.ids for row in whole for one in row]
    got = [one.ids for row in writing.completions() for one in row]
    assert got == [ids[:n] for ids, n in zip(flat, (2, 2, 1, 1), strict=True)]


@torch.no_grad()
def test_logprobs_are_the_models(model: GPT) -> None:
    rows = complete(model, PROMPTS, 6, n=2, seed=2, temperature=0.5, top_k=3, logprobs=4)
    model.eval()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        for one in row:
            logits = model(torch.tensor([prompt + one.ids]))[0, len(prompt) - 1 : -1]
            want = logits.log_softmax(-1)
            assert one.logprobs is not None and one.top is not None
            assert one.logprobs == pytest.approx(
                want.gather(1, torch.tensor(one.ids)[:, None])[:, 0].tolist(), abs=1e-4
            )
            values, ids = want.topk(4)
            assert [[id for id, _ in at] for at in one.top] == ids.tolist()
            flat = [p for at in one.top for _, p in at]
            assert flat == pytest.approx(values.flatten().tolist(), abs=1e-4)
    assert complete(model, [[1]], 2, seed=0)[0][0].logprobs is None


@torch.no_grad()
def test_a_sliding_text_goes_on_from_its_newer_half(model: GPT) -> None:
    """Greedily, against the model on the window that the rule leaves."""
    C = model.config.block_size
    prompts = [list(range(3, 12)), [i % 90 for i in range(50)]]
    rows = complete(model, prompts, 60, temperature=0.0, overflow="slide")
    model.eval()
    for prompt, (one,) in zip(prompts, rows, strict=True):
        assert len(one.ids) == 60
        window = prompt[-C:]
        for id in one.ids:
            assert id == int(model(torch.tensor([window]))[0, -1].argmax())
            if len(window) == C:
                window = window[-(C // 2) :]
            window.append(id)


def test_a_sliding_row_is_the_same_beside_others(model: GPT) -> None:
    together = ids_of(complete(model, PROMPTS, 50, seed=7, overflow="slide"))
    for b, prompt in enumerate(PROMPTS):
        alone = ids_of(complete(model, [prompt], 50, seed=7 + b, overflow="slide"))
        assert alone[0] == together[b]


def test_beams_of_prompts_of_different_lengths(model: GPT) -> None:
    together = beam_search(model, PROMPTS, 6, beams=3, n=2, eos=[7, 8])
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = beam_search(model, [prompt], 6, beams=3, n=2, eos=[7, 8])
        assert [one.ids for one in row] == [one.ids for one in alone]
        assert [one.score for one in row] == pytest.approx([one.score for one in alone], abs=1e-4)
    greedy = complete(model, PROMPTS, 6, temperature=0.0)
    assert ids_of(beam_search(model, PROMPTS, 6, beams=1)) == ids_of(greedy)


def test_all_beams_of_a_small_space_are_the_best_of_it() -> None:
    """With as many beams as there are texts, it is a search through all."""
    model = GPT(GPTConfig(8, 5, n_layer=1, n_head=1, n_embd=8)).eval()
    nn.init.normal_(model.wte.weight, std=1.0)
    with torch.no_grad():
        logp = {
            (a, b): float(
                model(torch.tensor([[2, a]])).log_softmax(-1)[0, [0, 1], [a, b]].sum()
            )
            for a in range(5) for b in range(5)
        }  # fmt: skip
    best = sorted(logp, key=lambda ab: -logp[ab])
    (row,) = beam_search(model, [[2]], 2, beams=12, n=5, length_penalty=0.0)
    assert [tuple(one.ids) for one in row] == best[:5]
    assert [one.score for one in row] == pytest.approx([logp[ab] for ab in best[:5]], abs=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: complete(m, "In", 4), "prompts must be a list of texts or .*; got str"),
        (lambda m: complete(m, torch.ones(1, 2), 4), "prompts must be a list .*; got Tensor"),
        (lambda m: complete(m, [[1.5]], 4), "ids of prompts must be int"),
        (lambda m: complete(m, [], 4), "at least one prompt; got none"),
        (lambda m: complete(m, [[1], []], 4), "a prompt must be at least one token; got none"),
        (lambda m: complete(m, [[1, 300]], 4), "vocabulary, 0 to 299; got 300"),
        (lambda m: complete(m, [[-1]], 4), "vocabulary, 0 to 299; got -1"),
        (lambda m: complete(m, ["In"], 4), "prompts that are texts need a tokenizer; got none"),
        (lambda m: complete(m, [[1]], 4, stop=["x"]), "stop strings need a tokenizer; got none"),
        (lambda m: complete(m, [[1]], 4, stop=[""]), "stop must be a list of .*; got .*"),
        (lambda m: complete(m, [[1]], 4, stop="x"), "stop must be a list of strings.*; got 'x'"),
        (lambda m: complete(m, [[1]], 4, n=0), "n must be at least 1; got 0"),
        (lambda m: complete(m, [[1]], 4, logprobs=-1), "logprobs must be from 0 to 300; got -1"),
        (lambda m: complete(m, [[1]], 4, eos=300), "eos must lie in .*, 0 to 299; got 300"),
        (lambda m: complete(m, [[1]], 4, n=2, seed=[1]), "one seed a row, 2; got 1"),
        (lambda m: complete(m, [[1]] * 9, 32), "block_size 32; got a prompt of 1 and .* 32"),
        (lambda m: complete(m, [[1], [1] * 32]), "got a prompt of 32 and max_new_tokens 1"),
        (lambda m: complete(m, [[1]], -1, overflow="slide"), "must not be negative; got -1"),
        (lambda m: complete(m, [[1]], overflow="slide"), "slides needs max_new_tokens; got none"),
        (lambda m: complete(m, [[1]], 4, overflow="cut"), "refuse or slide; got 'cut'"),
        (lambda m: complete(m, [[1]], 4, draft=Lookup(), logprobs=0), "a draft goes with no .*"),
        (lambda m: beam_search(m, [[1]], 4, beams=0), "beams must be at least 1; got 0"),
        (lambda m: beam_search(m, [[1]], 4, n=5), "n must be from 1 to beams, 4; got 5"),
        (lambda m: beam_search(m, [[1]], 0), "max_new_tokens must be at least 1; got 0"),
        (lambda m: beam_search(m, [[1]], 4, length_penalty=float("inf")), "finite; got inf"),
        (lambda m: beam_search(m, [[1]], 4, early_stopping="always"), 'got .always.'),
    ],
)  # fmt: skip
def test_rejects(call: Any, message: str) -> None:
    model = GPT(GPTConfig(32, V, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises((ValueError, TypeError), match=rf"^(generate|beam_search): .*{message}$"):
        call(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0, "top_k": 5}, "temperature 0 takes the likeliest.*; got top_k 5"),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature 0 takes .*; got top_p 0.9"),
        ({"temperature": 0.0, "min_p": 0.1}, "temperature 0 takes .*; got min_p 0.1"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]; got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive.*; got 0.0"),
    ],
)
def test_conflicting_or_wild_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^generate: {message}$"):
        Sampling(**options)


def test_a_penalty_needs_what_was_seen() -> None:
    with pytest.raises(ValueError, match=r"^generate: a repetition penalty needs the ids that"):
        Sampling(repetition_penalty=1.1).probabilities(torch.zeros(1, 4))


def test_drawn_tokens_are_as_frequent_as_they_are_likely() -> None:
    """A chi-square test of 4000 draws by seeds 0 .. 3999, at the 1 in 1000 level."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 40, n_layer=1, n_head=1, n_embd=16)).eval()
    nn.init.normal_(model.wte.weight, std=0.5)
    options: dict[str, Any] = {"temperature": 1.2, "top_k": 25, "top_p": 0.95, "min_p": 0.01,
                               "repetition_penalty": 1.5}  # fmt: skip
    prompt, n = [3, 17, 3], 4000
    (made,) = complete(model, [prompt], 1, n=n, seed=0, **options)
    drawn = torch.bincount(torch.tensor([one.ids[0] for one in made]), minlength=40)
    seen = torch.zeros(1, 40, dtype=torch.bool)
    seen[0, prompt] = True
    with torch.no_grad():
        p = Sampling(**options).probabilities(model(torch.tensor([prompt]))[:, -1], seen)[0]
    assert not drawn[p == 0].any()
    kept = p > 0
    assert 10 < int(kept.sum()) < 40
    want = p[kept].double() * n
    chi2 = ((drawn[kept] - want) ** 2 / want).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2.0, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, chi2 / 2.0)) > 1e-3


def test_public_names() -> None:
    assert fastgpt.complete is complete and fastgpt.beam_search is beam_search
