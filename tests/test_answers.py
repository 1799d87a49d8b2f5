"""Answers of a model, and SQuAD's scores of them."""

from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig, generate
from fastgpt.answers import answers, exact_match, f1, normalised
from fastgpt.tokenizer import Tokenizer

TEXT = "Question: who? Answer: the cat\nsat on the mat. " * 4


@pytest.mark.parametrize(
    "answer, accepted, em, score",
    [
        ("The  Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("tower", ["Eiffel Tower"], 0.0, 2 / 3),
        ("in the Eiffel Tower", ["Paris", "Eiffel Tower"], 0.0, 0.8),
        ("Paris", ["Eiffel Tower"], 0.0, 0.0),
        ("no no", ["no"], 0.0, 2 / 3),  # a word counts as often as it is in both
        ("the", ["a"], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
        ("theatre", ["atre"], 0.0, 0.0),  # articles are words
        ("Zürich", ["zürich."], 1.0, 1.0),
    ],
)
def test_scores_are_squads(answer: str, accepted: list[str], em: float, score: float) -> None:
    assert exact_match(answer, accepted) == em
    assert f1(answer, accepted) == pytest.approx(score)


def test_normalised() -> None:
    assert normalised("  An  U.S.-born\tman, the 2nd ") == "usborn man 2nd"


def test_answers_are_those_of_each_prompt_alone() -> None:
    tokenizer = Tokenizer.train([TEXT], 280)
    torch.manual_seed(2)
    model = GPT(GPTConfig(48, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        p.data *= 4.0
    prompts = ["who?", "Question: who", "cat", "sat", "the mat", "who", "Answer: the"]

    def alone(prompt: str) -> str:
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = generate(model, ids, 9, temperature=0.0, eos=tokenizer.eos)[0, ids.shape[1] :]
        return tokenizer.decode(new.tolist()).strip().split("\n")[0].strip()

    want = [alone(prompt) for prompt in prompts]
    assert len(set(want)) > 2
    assert answers(model, tokenizer, prompts, 9, rows=2) == want
    with pytest.raises(ValueError, match=r"^generate: "):
        answers(model, tokenizer, ["cat " * 40], 9)


def test_an_answer_ends_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train([TEXT], 280)
    model = GPT(GPTConfig(48, tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16))
    told = tokenizer.encode("\n the cat \nsat")

    def says(model: GPT, ids: torch.Tensor, n: int, **options: Any) -> torch.Tensor:
        return torch.cat([ids, torch.tensor([told] * len(ids))], 1)

    monkeypatch.setattr("fastgpt.generate", says)
    assert answers(model, tokenizer, ["who?"]) == ["the cat"]
