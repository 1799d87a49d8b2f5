"""Continuations of prompts as texts: many of each, with stops and log-probabilities.

Prompts of different lengths stand in one batch, each is read once however many continuations it
gets, and rows that have ended leave the batch when half of it has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgpt.decoder import Decoder
from fastgpt.generation.sampling import Sampling, row_seeds, uniform
from fastgpt.generation.speculative import Lookup, speculate
from fastgpt.generation.stops import Text
from fastgpt.generation.tokens import end_ids, fits, seen_ids
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

Prompts = Sequence[str] | Sequence[Sequence[int]]
OVERFLOW = ("refuse", "slide")


@dataclass
class Completion:
    """A continuation of a prompt.

    Attributes:
        ids: the new tokens, to the one that ended it.
        text: of these, without what ended it; empty without a tokenizer.
        ended: by what: "length", an id of "eos", or a "stop" string.
        logprobs: if asked for, of each of ids its log-probability in nats: the model's, before
            temperature and what else `Sampling` does.
        top: if asked for, at each of ids the likeliest ids with their log-probabilities.
        score: of a beam, see `beam_search`.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: Literal["length", "eos", "stop"] = "length"
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    score: float | None = None


class Piece(NamedTuple):
    """What a token adds to a text.

    Attributes:
        row: continuation k of prompt b is row b n + k.
        id: the token.
        text: what is certain of the text now and was not before; may be empty.
        last: whether the text ends here.
    """

    row: int
    id: int
    text: str
    last: bool


def complete(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    overflow: str = "refuse",
    draft: GPT | Lookup | None = None,
) -> list[list[Completion]]:
    """Continue prompts.

    Args:
        model: in training or evaluation mode, which is left as it was.
        prompts: texts, or rows of ids, of any lengths from 1 token on.
        max_new_tokens: the most for each; if None, what the longest prompt leaves of the context.
        tokenizer: for prompts, texts and stop strings; without it there are ids only.
        n: continuations of each prompt.
        temperature, top_k, top_p, min_p, repetition_penalty: see
            `fastgpt.generation.sampling.Sampling`.
        seed: one for each row, where continuation k of prompt b is row b n + k; or one number s,
            and row r's is s + r; drawn from torch's generator if None. A row's text is its
            prompt's and its seed's alone.
        eos: an id, or some, that end a continuation. If None the tokenizer's end of text; () for
            none.
        stop: strings that end a continuation, wherever tokens begin and end.
        logprobs: if given, log-probabilities of the tokens, and of this many likeliest ones each.
        overflow: what becomes of a prompt that is too long for the context, or grows to be.
            "refuse" it; or "slide": what a `fastgpt.decoder.Decoder` that slides does. Of a prompt
            the newest tokens are read, as many as the context holds; whenever it is full, its newer
            half is kept and read anew.
        draft: what proposes tokens for the model to keep or not, several at a time, see
            `fastgpt.generation.speculative.speculate`. The distribution is the same, the text of a
            seed is not; the rows are written one after the other.

    Returns:
        n continuations for each prompt.

    Raises:
        ValueError: an argument outside these rules, or prompt and new tokens do not fit.
        TypeError: prompts are neither texts nor rows of ids.

    Examples:
        >>> model = fastgpt.GPT(fastgpt.GPTConfig.preset("tiny"))
        >>> rows = fastgpt.complete(model, [[1, 2, 3], [4]], 5, n=2, seed=0)
        >>> [len(completion.ids) for row in rows for completion in row]
        [5, 5, 5, 5]
    """
    writing = Writing(
        model, prompts, max_new_tokens, tokenizer=tokenizer, n=n,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty), seed=seed,
        eos=eos, stop=stop, logprobs=logprobs, overflow=overflow, draft=draft,
    )  # fmt: skip
    for _ in writing:
        pass
    return writing.completions()


class Writing:
    """`complete`, piece by piece: iterate once over the pieces, in the order of their tokens.

    Args:
        sampling: how tokens are chosen.
        all others: see `complete`; they are checked here.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        n: int = 1,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] | None = None,
        eos: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        overflow: str = "refuse",
        draft: GPT | Lookup | None = None,
    ) -> None:
        V = model.config.vocab_size
        if n < 1:
            raise ValueError(f"generate: n must be at least 1; got {n}")
        if logprobs is not None and not 0 <= logprobs <= V:
            raise ValueError(f"generate: logprobs must be from 0 to {V}; got {logprobs}")
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"generate: stop must be a list of strings, none empty; got {stop!r}")
        if stop and tokenizer is None:
            raise ValueError("generate: stop strings need a tokenizer; got none")
        if draft is not None and (logprobs is not None or overflow != "refuse"):
            raise ValueError("generate: a draft goes with no logprobs and no overflow but refuse")
        self._model, self._n, self._k, self._draft = model, n, logprobs, draft
        self._slides = overflow == "slide"
        self._sampling = Sampling() if sampling is None else sampling
        self._prompts = prompt_ids(prompts, model, tokenizer)
        self._most = room(model, self._prompts, max_new_tokens, overflow)
        self._ends = ends_of(eos, model, tokenizer)
        rows = len(self._prompts) * n
        self._seeds = row_seeds(seed, rows)
        table = [] if tokenizer is None else tokenizer.token_bytes
        self._texts = [Text(table, stop) for _ in range(rows)]
        self._made = [Completion() for _ in range(rows)]
        if logprobs is not None:
            for one in self._made:
                one.logprobs, one.top = [], []

    def completions(self) -> list[list[Completion]]:
        """What was written so far, for each prompt."""
        for one, text in zip(self._made, self._texts, strict=True):
            text.finish()
            one.text = str(text)
        return [self._made[at : at + self._n] for at in range(0, len(self._made), self._n)]

    def __iter__(self) -> Iterator[Piece]:
        if not self._most:
            return
        if self._draft is not None:
            yield from self._drafted(self._draft)
            return
        model, sampling, n = self._model, self._sampling, self._n
        device = model.wte.weight.device
        ids, lengths = padded(self._prompts)
        decoder = self._decoder(max(lengths))
        logits = decoder.prefill(ids.to(device), lengths)
        rows = [_Row(b * n + k) for b in range(len(lengths)) for k in range(n)]
        seen = seen_ids(self._prompts, model) if sampling.looks_back else None
        if n > 1:
            of = torch.arange(len(lengths), device=device).repeat_interleave(n)
            decoder.reorder(of)
            logits, seen = logits[of], None if seen is None else seen[of]
        u = uniform(self._seeds, len(rows), self._most).to(device)  # (max_new_tokens, rows)
        for step in range(self._most):
            new = sampling.choose(logits, u[step], seen)
            if seen is not None:
                seen.scatter_(1, new[:, None], True)
            tokens = new.tolist()
            told = None if self._k is None else _logprobs(logits, new, self._k)
            last = step + 1 == self._most
            for at, (row, id) in enumerate(zip(rows, tokens, strict=True)):
                if not row.ended:
                    yield self._add(row, id, last, None if told is None else told[at])
            left = [at for at, row in enumerate(rows) if not row.ended]
            if not left:
                return
            if len(left) <= len(rows) // 2:
                keep = torch.tensor(left, device=device)
                decoder.reorder(keep)
                rows, new, u = [rows[at] for at in left], new[keep], u[:, keep]
                seen = None if seen is None else seen[keep]
            logits = decoder.step(new)

    def _drafted(self, draft: GPT | Lookup) -> Iterator[Piece]:
        device = self._model.wte.weight.device
        for number, seed in enumerate(self._seeds):
            row, ids = _Row(number), torch.tensor([self._prompts[number // self._n]], device=device)
            passes = speculate(
                self._model, ids, self._most, draft, sampling=self._sampling, seed=seed
            )
            for count, id in enumerate(chain.from_iterable(passes), 1):
                yield self._add(row, id, count == self._most, None)
                if row.ended:
                    break

    def _decoder(self, longest: int) -> Decoder:
        model, B = self._model, len(self._prompts)
        if self._slides:
            return Decoder(model, B, full="slide")
        return Decoder(model, B, longest + self._most - 1)  # the last token is never fed back

    def _add(
        self, row: "_Row", id: int, last: bool, told: "tuple[float, list[tuple[int, float]]] | None"
    ) -> Piece:
        """A row's next token."""
        text, made = self._texts[row.number], self._made[row.number]
        made.ids.append(id)
        if told is not None and made.logprobs is not None and made.top is not None:
            made.logprobs.append(told[0])
            made.top.append(told[1])
        if id in self._ends:
            made.ended, row.ended, piece = "eos", True, text.finish()
        else:
            piece = text.feed(id)
            row.ended = last or text.stopped is not None
            if row.ended:
                piece += text.finish()
            if text.stopped is not None:
                made.ended = "stop"
        return Piece(row.number, id, piece, row.ended)


class _Row:
    """A row of the batch.

    Attributes:
        number: which row of all it is.
        ended: whether nothing is to be added.
    """

    def __init__(self, number: int) -> None:
        self.number, self.ended = number, False


def _logprobs(logits: Tensor, new: Tensor, k: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row its new token's log-probability, and the k likeliest ids with theirs."""
    all_of_them = logits.float().log_softmax(-1)
    chosen = all_of_them.gather(1, new[:, None]).squeeze(1).tolist()
    values, ids = (t.tolist() for t in all_of_them.topk(k, dim=-1))
    return [(c, list(zip(i, v, strict=True))) for c, i, v in zip(chosen, ids, values, strict=True)]


def prompt_ids(prompts: Prompts, model: GPT, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """Prompts as rows of ids.

    Raises:
        ValueError: there is none, one has no token or an id outside the vocabulary, or texts come
            without a tokenizer.
        TypeError: they are neither texts nor rows of ids.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(
            "generate: prompts must be a list of texts or of rows of ids;"
            f" got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("generate: there must be at least one prompt; got none")
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("generate: prompts that are texts need a tokenizer; got none")
            row = tokenizer.encode(prompt)
        else:
            row = list(prompt)
            if not all(isinstance(id, int) for id in row):
                raise TypeError("generate: ids of prompts must be int")
        if not row:
            raise ValueError("generate: a prompt must be at least one token; got none")
        for id in row:
            if not 0 <= id < model.config.vocab_size:
                raise ValueError(
                    "generate: ids must lie in the vocabulary, 0 to"
                    f" {model.config.vocab_size - 1}; got {id}"
                )
        rows.append(row)
    return rows


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Rows of ids as one tensor, (B, T) int64, filled up with 0 to their right, and their
    lengths."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]), lengths


def room(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, overflow: str
) -> int:
    """How many new tokens there may be.

    Raises:
        ValueError: there is no room for them, or it is not said how many a sliding text may have.
    """
    if overflow not in OVERFLOW:
        raise ValueError(f"generate: overflow must be {' or '.join(OVERFLOW)}; got {overflow!r}")
    if overflow == "slide":
        if max_new_tokens is None:
            raise ValueError("generate: a text that slides needs max_new_tokens; got none")
        fits(model, 0, min(max_new_tokens, 0))
        return max_new_tokens
    longest = max(map(len, prompts))
    if max_new_tokens is None:
        max_new_tokens = max(model.config.block_size - longest, 1)
    fits(model, longest, max_new_tokens)
    return max_new_tokens


def ends_of(
    eos: int | Sequence[int] | None, model: GPT, tokenizer: Tokenizer | None
) -> frozenset[int]:
    """The ids that end a continuation: those given, or the tokenizer's end of text."""
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos
    return frozenset(end_ids(eos, model.config.vocab_size))
