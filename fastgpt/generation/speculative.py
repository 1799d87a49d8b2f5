"""Several tokens from one pass of a model: drafted by something cheaper, then kept or not.

A draft proposes x_1 .. x_k, drawn from q_1 .. q_k; one pass of the model gives p_1 .. p_(k + 1).
x_i is kept with probability min(1, p_i(x_i) / q_i(x_i)). In place of the first that is not kept
comes a token drawn from max(p_i - q_i, 0), normalised; if all are kept, one from p_(k + 1). What
comes out has the model's own distribution, whatever the draft is.

Leviathan, Kalman, Matias, Fast inference from transformers via speculative decoding, 2023,
https://arxiv.org/abs/2211.17192, algorithm 1 and appendix A.1. Drafts from the text itself:
Saxena, Prompt lookup decoding, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgpt.decoder import Decoder
from fastgpt.generation.sampling import Sampling, draw
from fastgpt.model import GPT

__all__ = ["Lookup", "speculate"]


@dataclass(frozen=True)
class Lookup:
    """Draft what followed when the last few tokens stood in the text before.

    Attributes:
        longest: so many of the last tokens are looked for; if they are not found, one less, ...
    """

    longest: int = 3

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"Lookup: longest must be at least 1; got {self.longest}")

    def find(self, text: list[int], k: int) -> list[int]:
        """At most k ids that followed the newest earlier place like the end of text."""
        ids = np.array(text)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            places = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)
            if len(found := np.nonzero((places == ids[-n:]).all(1))[0]):
                start = int(found[-1]) + n
                return text[start : start + k]
        return []


def speculate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    draft: GPT | Lookup,
    *,
    sampling: Sampling | None = None,
    draft_tokens: int = 4,
    seed: int | None = None,
    eos: int | None = None,
) -> Iterator[list[int]]:
    """Yield the new tokens of one text, those of a pass together: the draft's that were kept, and
    one of the model's own.

    Args:
        model: whose text it is.
        ids: (1, T) int64 or int32, the prompt.
        max_new_tokens: T + max_new_tokens may be at most block_size.
        draft: a smaller model of the same vocabulary, or `Lookup`.
        sampling: of both; Sampling() if None.
        draft_tokens: k, the most that are drafted for a pass.
        seed: of everything drawn; from torch's generator if None. The distribution is `generate`'s,
            the text of a seed is not.
        eos: if given, the text ends after this id.

    Raises:
        ValueError: an argument outside these rules, a draft of another vocabulary, or one whose
            context is shorter than the text may get.
    """
    T = ids.shape[-1]
    if ids.ndim != 2 or ids.shape[0] != 1 or not T:
        raise ValueError(f"speculate: ids must be (1, T), T at least 1; got {tuple(ids.shape)}")
    if max_new_tokens < 0 or draft_tokens < 1:
        raise ValueError(
            "speculate: max_new_tokens must not be negative, and draft_tokens at least 1;"
            f" got {max_new_tokens} and {draft_tokens}"
        )
    for one in (model, draft) if isinstance(draft, GPT) else (model,):
        if T + max_new_tokens > one.config.block_size:
            raise ValueError(
                f"speculate: prompt and new tokens must fit the context, block_size"
                f" {one.config.block_size}; got {T} and {max_new_tokens}"
            )
    if isinstance(draft, GPT) and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"speculate: the draft must have the model's vocabulary, {model.config.vocab_size} ids;"
            f" got {draft.config.vocab_size}"
        )
    seed = int(torch.randint(0, 2**62, ())) if seed is None else seed
    return _passes(
        model, ids, max_new_tokens, draft, sampling or Sampling(), draft_tokens, seed, eos
    )


def _passes(
    model: GPT, ids: Tensor, max_new_tokens: int, draft: GPT | Lookup, sampling: Sampling, k: int,
    seed: int, eos: int | None,
) -> Iterator[list[int]]:  # fmt: skip
    if not max_new_tokens:
        return
    text: list[int] = ids[0].tolist()
    end, rng, device = len(text) + max_new_tokens, np.random.default_rng(seed), ids.device
    target = _Reader(model, end, sampling, device)
    drafter = _Reader(draft, end, sampling, device) if isinstance(draft, GPT) else None
    while len(text) < end:
        most = min(k, end - len(text) - 1)  # the pass itself gives one more
        if drafter is not None:
            proposed, q = drafter.propose(text, most, rng)
        else:
            assert isinstance(draft, Lookup)
            proposed, q = draft.find(text, most) if most else [], None
        p = target.after(text, proposed)  # (len(proposed) + 1, V)
        kept, last = accept(p, proposed, q, rng.random(len(proposed) + 1))
        new = [*proposed[:kept], last]
        if eos is not None and eos in new:
            yield new[: new.index(eos) + 1]
            return
        text += new
        yield new


def accept(p: Tensor, proposed: list[int], q: Tensor | None, u: np.ndarray) -> tuple[int, int]:
    """How many of the proposed tokens are kept, and the token that comes after them.

    Args:
        p: (k + 1, V), the model's distributions.
        proposed: k ids.
        q: (k, V), the distributions they were drawn from; None if nothing was drawn.
        u: (k + 1,) float64, uniform in [0, 1): whether each is kept, and what comes after.
    """
    k = len(proposed)
    x = torch.tensor(proposed, device=p.device)[:, None]
    p_x = p[:k].gather(1, x)[:, 0].tolist()
    q_x = [1.0] * k if q is None else q.gather(1, x)[:, 0].tolist()
    kept = next((i for i in range(k) if u[i] * q_x[i] >= p_x[i]), k)
    rest = p[kept]
    if kept < k:
        rest = rest.clone()
        if q is None:
            rest[proposed[kept]] = 0.0
        else:
            rest = (rest - q[kept]).clamp_(min=0.0)
    last = draw(rest[None], torch.tensor([u[k]], device=p.device))
    return kept, int(last)


class _Reader:
    """A model that has read the beginning of a text, and reads on from where it agrees."""

    def __init__(self, model: GPT, length: int, sampling: Sampling, device: torch.device) -> None:
        self._decoder = Decoder(model, 1, length)
        self._sampling, self._device, self._V = sampling, device, model.config.vocab_size
        self._read: list[int] = []

    def after(self, text: list[int], more: list[int]) -> Tensor:
        """The distributions after text and after each id of more, (len(more) + 1, V)."""
        whole = text + more
        same = 0
        while same < min(len(self._read), len(text) - 1) and self._read[same] == whole[same]:
            same += 1
        if same < len(self._read):
            self._decoder.truncate([same])
        new = torch.tensor([whole[same:]], device=self._device)
        n = len(more) + 1
        if same == 0 and n == 1:
            logits = self._decoder.prefill(new)
        elif new.shape[1] == 1:
            logits = self._decoder.step(new[0])
        else:
            if (extra := new.shape[1] - n) > 16:  # a prompt: no logits of all its tokens
                self._decoder.prefill(new[:, :extra])
                new = new[:, extra:]
            logits = self._decoder.extend(new)[0, -n:]
        self._read = whole
        return self._sampling.probabilities(logits, self._seen(text, more))

    def propose(
        self, text: list[int], k: int, rng: np.random.Generator
    ) -> tuple[list[int], Tensor | None]:
        """k ids drawn one after the other, and what each was drawn from, (k, V)."""
        more: list[int] = []
        rows = []
        for _ in range(k):
            p = self.after(text + more, [])
            u = torch.from_numpy(rng.random(1)).to(self._device)
            more.append(int(draw(p, u)))
            rows.append(p[0])
        return more, torch.stack(rows) if rows else None

    def _seen(self, text: list[int], more: list[int]) -> Tensor | None:
        if self._sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(len(more) + 1, self._V, dtype=torch.bool, device=self._device)
        seen[:, text] = True
        for n, id in enumerate(more):
            seen[n + 1 :, id] = True
        return seen
