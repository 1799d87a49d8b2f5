"""Tokens from a model, one after the other: whole or as a stream."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt.decode import one_token
from fastgpt.generation.sampling import Sampling, uniform
from fastgpt.layers import KVCache
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
    eos: int | None = None,
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
        eos: if given, a row ends after this id, and is filled up with it.

    Returns:
        (B, T + n) int64 on ids' device, prompts included; n is max_new_tokens, or less if every
        row has ended.

    Raises:
        ValueError: an argument outside these rules.
        TypeError: ids are not integers.
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
    eos: int | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens of `generate` as they come, (B,) int64 each; the same arguments.

    They are checked here, not at the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    B, T = _check(model, ids, max_new_tokens, eos)
    u = uniform(seed, B, max_new_tokens).to(ids.device)  # (max_new_tokens, B)

    def tokens() -> Iterator[Tensor]:
        if not max_new_tokens:
            return
        cache = model.new_cache(B, T + max_new_tokens - 1)  # the last token is never fed back
        step = one_token(model, cache, B)
        seen = _seen(ids, model.config.vocab_size) if repetition_penalty != 1.0 else None
        ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
        new = ids
        for n in range(max_new_tokens):
            if n and step is not None:
                with torch.inference_mode():
                    logits = step(new)  # (B, V)
            else:
                logits = _forward(model, new if n == 0 else new[:, None], cache)
            new = sampling.choose(logits, u[n], seen)
            if seen is not None:
                seen.scatter_(1, new[:, None], True)
            if eos is not None:
                new = new.masked_fill(ended, eos)
                ended = ended | (new == eos)
            yield new
            if eos is not None and bool(ended.all()):
                return

    return tokens()


def _forward(model: GPT, token: Tensor, cache: KVCache | None) -> Tensor:
    """The logits after the last token: (B, T) -> (B, V), without dropout and without gradient."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            logits = model.logits(model.hidden(token, cache)[:, -1])
        return logits.clone()  # outside: a tensor like any other
    finally:
        if training:
            model.train()


def _seen(ids: Tensor, V: int) -> Tensor:
    """(B, V) bool, whether the id stands in the row."""
    none = torch.zeros(ids.shape[0], V, dtype=torch.bool, device=ids.device)
    return none.scatter_(1, ids.long(), True)


def _check(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    eos: int | None,
) -> tuple[int, int]:
    config = model.config
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: ids must be int64 or int32; got {ids.dtype}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"generate: ids must be (B, T), B and T at least 1; got {tuple(ids.shape)}"
        )
    B, T = ids.shape
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative; got {max_new_tokens}")
    if T + max_new_tokens > config.block_size:
        raise ValueError(
            f"generate: prompt and new tokens must fit the context, block_size"
            f" {config.block_size}; got a prompt of {T} and max_new_tokens {max_new_tokens}"
        )
    if eos is not None and not 0 <= eos < config.vocab_size:
        raise ValueError(
            f"generate: eos must lie in the vocabulary, 0 to {config.vocab_size - 1}; got {eos}"
        )
    if ids.device != model.wte.weight.device:
        raise ValueError(
            f"generate: ids must be on the model's device, {model.wte.weight.device};"
            f" got {ids.device}"
        )
    return B, T
