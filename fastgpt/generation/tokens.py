"""Tokens from a model, one after the other: whole or as a stream.

`generate` and `stream` take and give tensors, a continuation for each row; `complete` is for texts,
several continuations of each, stops and log-probabilities.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt.decoder import Decoder
from fastgpt.generation.sampling import Sampling, uniform
from fastgpt.model import GPT


def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
) -> Tensor:
    """Continue each row of ids by up to max_new_tokens tokens, one after the other.

    Args:
        model: in training or evaluation mode; generation runs without dropout, and leaves the
            mode as it was.
        ids: (B, T) int64 or int32, the prompts, all of one length T of at least 1.
        max_new_tokens: T + max_new_tokens may be at most the model's block_size.
        temperature, top_k, top_p, min_p, repetition_penalty: see
            `fastgpt.generation.sampling.Sampling`.
        seed: one for each row; or one number s, and row b's is s + b; drawn from torch's
            generator if None.
        eos: an id, or some, after which a row ends; it is filled up with the one it ended by.

    Returns:
        (B, T + n) int64 on ids' device, prompts included; n is max_new_tokens, or less if every
        row has ended.

    Raises:
        ValueError: an argument outside these rules.
        TypeError: ids are not integers.

    Examples:
        >>> model = fastgpt.GPT(fastgpt.GPTConfig.preset("tiny"))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> fastgpt.generate(model, ids, 5, temperature=0.8, top_p=0.9, seed=0).shape
        torch.Size([2, 8])
    """
    new = list(
        stream(
            model,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            eos=eos,
        )
    )
    return torch.cat([ids.long(), *(token[:, None] for token in new)], dim=1)


def stream(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens of `generate` as they come, (B,) int64 each; the same arguments.

    They are checked here, not at the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    B, T = _check(model, ids, max_new_tokens)
    ends = torch.tensor(end_ids(eos, model.config.vocab_size), device=ids.device)
    u = uniform(seed, B, max_new_tokens).to(ids.device)  # (max_new_tokens, B)

    def tokens() -> Iterator[Tensor]:
        if not max_new_tokens:
            return
        decoder = Decoder(model, B, T + max_new_tokens - 1)  # the last token is never fed back
        seen = seen_ids(ids.tolist(), model) if sampling.looks_back else None
        ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
        new = ids[:, -1]
        for n in range(max_new_tokens):
            logits = decoder.step(new) if n else decoder.prefill(ids)
            drawn = sampling.choose(logits, u[n], seen)
            new = torch.where(ended, new, drawn) if len(ends) else drawn
            if seen is not None:
                seen.scatter_(1, new[:, None], True)
            yield new
            if len(ends):
                ended = ended | torch.isin(new, ends)
                if bool(ended.all()):
                    return

    return tokens()


def end_ids(eos: int | Sequence[int] | None, vocab_size: int) -> list[int]:
    """The ids after which a row ends.

    Raises:
        ValueError: one lies outside the vocabulary.
    """
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for id in ids:
        if not 0 <= id < vocab_size:
            raise ValueError(
                f"generate: eos must lie in the vocabulary, 0 to {vocab_size - 1}; got {id}"
            )
    return ids


def seen_ids(rows: Sequence[Sequence[int]], model: GPT) -> Tensor:
    """(B, V) bool on the model's device, whether an id stands in a row."""
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, rows, strict=True):
        row[torch.tensor(ids)] = True
    return seen.to(model.wte.weight.device)


def _check(model: GPT, ids: Tensor, max_new_tokens: int) -> tuple[int, int]:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: ids must be int64 or int32; got {ids.dtype}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"generate: ids must be (B, T), B and T at least 1; got {tuple(ids.shape)}"
        )
    B, T = ids.shape
    fits(model, T, max_new_tokens)
    if ids.device != model.wte.weight.device:
        raise ValueError(
            f"generate: ids must be on the model's device, {model.wte.weight.device};"
            f" got {ids.device}"
        )
    return B, T


def fits(model: GPT, T: int, max_new_tokens: int) -> None:
    """Raise unless a prompt of T tokens and the new ones fit the context.

    Raises:
        ValueError: they do not, or max_new_tokens is negative.
    """
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative; got {max_new_tokens}")
    if T + max_new_tokens > model.config.block_size:
        raise ValueError(
            "generate: prompt and new tokens must fit the context, block_size"
            f" {model.config.block_size}; got a prompt of {T} and max_new_tokens {max_new_tokens}"
        )
