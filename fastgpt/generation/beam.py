"""Beam search: the continuations of a prompt that are likeliest as a whole, by keeping a few.

Wu et al., Google's neural machine translation system, 2016, https://arxiv.org/abs/1609.08144; with
the rules of Hugging Face's transformers for what ends a search, so that it finds what theirs does.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from fastgpt.decoder import Decoder
from fastgpt.generation.completion import Completion, Prompts, ends_of, padded, prompt_ids, room
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.stops import Text
from fastgpt.generation.tokens import seen_ids
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

NEVER = -1e9  # a sum of log-probabilities below any other


def beam_search(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    beams: int = 4,
    n: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
) -> list[list[Completion]]:
    """The best n of the continuations that a beam search finds for each prompt.

    A continuation's score is sum log p(token) / (number of tokens) ** length_penalty, in nats.

    Args:
        model, prompts, max_new_tokens, tokenizer, eos: see `fastgpt.complete`.
        beams: partial continuations that are kept of each prompt.
        n: continuations to return, at most beams.
        length_penalty: above 0 longer ones gain, below 0 shorter ones.
        early_stopping: when the search for a prompt ends. True: when beams continuations have
            ended; False: when the best partial one, by its score now, is worse than all of
            those; "never": when it is so by the best score that it could still reach.
        repetition_penalty: multiplies the log-probabilities of ids that came before.

    Returns:
        n continuations with their scores for each prompt, the best first.

    Raises:
        ValueError: an argument outside these rules, or prompt and new tokens do not fit.
        TypeError: prompts are neither texts nor rows of ids.
    """
    V = model.config.vocab_size
    if beams < 1:
        raise ValueError(f"beam_search: beams must be at least 1; got {beams}")
    if not 1 <= n <= beams:
        raise ValueError(f"beam_search: n must be from 1 to beams, {beams}; got {n}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"beam_search: length_penalty must be finite; got {length_penalty}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(
            f'beam_search: early_stopping must be True, False or "never"; got {early_stopping!r}'
        )
    penalty = Sampling(repetition_penalty=repetition_penalty)
    rows = prompt_ids(prompts, model, tokenizer)
    most = room(model, rows, max_new_tokens, "refuse")
    if most < 1:
        raise ValueError(f"beam_search: max_new_tokens must be at least 1; got {most}")
    ends = ends_of(eos, model, tokenizer)
    candidates = max(2, 1 + len(ends)) * beams
    if candidates > beams * V:
        raise ValueError(f"beam_search: there must be fewer ends than ids, {V}; got {len(ends)}")

    searches = [_Search(beams, most, length_penalty, early_stopping, ends) for _ in rows]
    device = model.wte.weight.device
    B, (ids, lengths) = len(rows), padded(rows)
    decoder = Decoder(model, B, max(lengths) + most - 1)
    logits = decoder.prefill(ids.to(device), lengths)
    of = torch.arange(B, device=device).repeat_interleave(beams)
    decoder.reorder(of)
    logits = logits[of]  # (B beams, V)
    seen = seen_ids(rows, model)[of] if penalty.looks_back else None
    scores = torch.full((B, beams), NEVER, device=device)
    scores[:, 0] = 0.0  # all beams are the same at first
    for step in range(most):
        logp = penalty.penalized(logits.float().log_softmax(-1), seen)
        total = (logp.view(B, beams, V) + scores[:, :, None]).flatten(1)
        best, at = (t.tolist() for t in total.topk(candidates, dim=-1))
        kept = [s.advance(b, a, V) for s, b, a in zip(searches, best, at, strict=True)]
        if all(search.over for search in searches):
            break
        assert step + 1 < most
        scores = torch.tensor([[k[0] for k in row] for row in kept], device=device)
        parent = torch.tensor([[k[1] for k in row] for row in kept], device=device)
        new = torch.tensor([k[2] for row in kept for k in row], device=device)
        parent = (parent + torch.arange(B, device=device)[:, None] * beams).flatten()
        decoder.reorder(parent)
        if seen is not None:
            seen = seen[parent].scatter_(1, new[:, None], True)
        logits = decoder.step(new)

    return [[_completion(*one, ends, tokenizer) for one in s.found[:n]] for s in searches]


class _Search:
    """That of one prompt.

    Attributes:
        found: the best continuations that have ended, with their scores, at most as many as beams.
        over: whether nothing can change that.
    """

    def __init__(
        self, beams: int, most: int, length_penalty: float, early_stopping: bool | str,
        ends: frozenset[int],
    ) -> None:  # fmt: skip
        self._beams, self._most, self._ends = beams, most, ends
        self._penalty, self._early = length_penalty, early_stopping
        self._open: list[list[int]] = [[]] * beams
        self.found: list[tuple[float, list[int]]] = []
        self.over = False

    def advance(
        self, scores: Sequence[float], at: Sequence[int], V: int
    ) -> list[tuple[float, int, int]]:
        """Take a step.

        Args:
            scores: sums of log-probabilities of the best candidates, the best first.
            at: where each comes from: beam times V plus the token.

        Returns:
            The open beams from now on: sum, former beam, token.
        """
        new: list[tuple[float, int, int]] = []
        t = len(self._open[0]) + 1
        for rank, (score, place) in enumerate(zip(scores, at, strict=True)):
            beam, token = divmod(place, V)
            if token not in self._ends and t < self._most:
                if len(new) < self._beams:
                    new.append((score, beam, token))
            elif rank < self._beams and not self.over:
                self.found.append((score / t**self._penalty, [*self._open[beam], token]))
        self.found.sort(key=lambda one: one[0], reverse=True)
        del self.found[self._beams :]
        self._open = [[*self._open[beam], token] for _, beam, token in new]
        full = len(self.found) == self._beams
        if t == self._most or (full and self._early is True):
            self.over = True
        elif full:
            longest = self._most if self._early == "never" and self._penalty > 0.0 else t
            self.over |= new[0][0] / longest**self._penalty <= self.found[-1][0]
        return new


def _completion(
    score: float, ids: list[int], ends: frozenset[int], tokenizer: Tokenizer | None
) -> Completion:
    text = Text([] if tokenizer is None else tokenizer.token_bytes)
    ended = ids[-1] in ends
    for id in ids[:-1] if ended else ids:
        text.feed(id)
    text.finish()
    return Completion(ids, str(text), "eos" if ended else "length", score=score)
