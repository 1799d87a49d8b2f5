"""Sampling and beam search against Hugging Face's, on a trained GPT-2: microformer-mgm."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, beam_search, complete, generate
from fastgpt.generation.sampling import Sampling

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

PROMPT = [2, 964, 6350, 320, 3317, 7829, 239]
FREQUENT = (3514, 239, 7829)  # ids that many continuations hold
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.1, "temperature": 1.5},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def folder() -> Path:
    if (spec := find_spec("mgm")) is None or spec.origin is None:
        pytest.skip("microformer-mgm is not installed, whose wheel carries the weights")
    return Path(spec.origin).parent / "resources" / "general_model"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> GPT:
    return GPT.from_pretrained(folder)


def asked(**options: Any) -> dict[str, Any]:
    """All of transformers' defaults that would have a say, taken back."""
    plain = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
        "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True,
        "output_logits": True, "output_scores": True,
    }  # fmt: skip
    return plain | options


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o))
def test_the_distribution_is_theirs(theirs: Any, options: dict[str, Any]) -> None:
    """At three tokens of two texts, as their own generate makes it."""
    torch.manual_seed(0)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    out = theirs.generate(ids, max_new_tokens=3, do_sample=True, **asked(**options))
    for n, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen.scatter_(1, out.sequences[:, : len(PROMPT) + n], True)
        got, want = Sampling(**options).probabilities(logits, seen), scores.softmax(-1)
        assert torch.equal(got > 0, want > 0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
        assert 0 < int((want > 0).sum(-1).min())


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_ids_are_theirs(theirs: Any, ours: GPT, penalty: float) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    want = theirs.generate(
        ids, max_new_tokens=40, do_sample=False, **asked(repetition_penalty=penalty)
    )
    got = generate(ours, ids, 40, temperature=0.0, repetition_penalty=penalty)
    assert torch.equal(got, want.sequences)
    done = complete(
        ours, [PROMPT, PROMPT[::-1]], 40, temperature=0.0, repetition_penalty=penalty, logprobs=0
    )
    assert [c.ids for (c,) in done] == want.sequences[:, len(PROMPT) :].tolist()
    logp = torch.stack(want.logits, 1).log_softmax(-1)
    for row, (one,) in enumerate(done):
        assert one.logprobs == pytest.approx(
            [float(logp[row, t, id]) for t, id in enumerate(one.ids)], abs=1e-4
        )


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": False},  # the three of which give three other results
        {"early_stopping": True},
        {"early_stopping": "never"},
        {"length_penalty": 0.0},
        {"length_penalty": -1.0, "early_stopping": True},
        {"length_penalty": 2.0, "early_stopping": "never", "repetition_penalty": 1.3},
        {"eos": ()},
    ],
    ids=str,
)
def test_beams_are_theirs(theirs: Any, ours: GPT, options: dict[str, Any]) -> None:
    ends = options.get("eos", FREQUENT)
    given = {k: v for k, v in options.items() if k != "eos"}
    ids, n, beams = torch.tensor([[2, 964], [2, 6350]]), 3, 3
    want = theirs.generate(
        ids, max_new_tokens=12, num_beams=beams, num_return_sequences=n, do_sample=False,
        **asked(eos_token_id=list(ends) or None, **given),
    )  # fmt: skip
    got = beam_search(ours, ids.tolist(), 12, beams=beams, n=n, eos=ends, **given)
    flat = [one for row in got for one in row]
    scores = [one.score for one in flat]
    assert scores == pytest.approx(want.sequences_scores.tolist(), rel=1e-4, abs=1e-5)
    for one, row in zip(flat, want.sequences[:, 2:].tolist(), strict=True):
        assert one.ids == row[: len(one.ids)]
        assert set(row[len(one.ids) :]) <= {0, FREQUENT[0]}  # padding
        assert one.ended == ("eos" if one.ids[-1] in ends else "length")
