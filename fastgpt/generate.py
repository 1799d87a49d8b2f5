"""Text from a model: a key-value cache, greedy choice or sampling, whole or as a stream.

A token is drawn by inverse transform: u uniform in [0, 1) picks the first id whose cumulative
probability exceeds u. Row b spends one number a token from a generator of its own seed, so that a
row's text does not depend on the rows beside it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastgpt.decode import one_token
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
    seed: int | Sequence[int] | None = None,
    eos: int | None = None,
) -> Tensor:
    """Continue each row of ids by up to max_new_tokens tokens, one after the other.

    Args:
        model: in training or evaluation mode; generation runs without dropout, and leaves the
            mode as it was.
        ids: (B, T) int64 or int32, the prompts, all of one length T of at least 1.
        max_new_tokens: T + max_new_tokens may be at most the model's block_size.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: if given, draw among the k likeliest tokens only.
        top_p: if given, draw among the fewest likeliest tokens whose probabilities reach top_p.
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
    seed: int | Sequence[int] | None = None,
    eos: int | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens of `generate` as they come, (B,) int64 each; the same arguments.

    They are checked here, not at the first token.
    """
    B, T = _check(model, ids, max_new_tokens, temperature, top_k, top_p, eos)
    u = _uniform(seed, B, max_new_tokens).to(ids.device)  # (max_new_tokens, B)

    def tokens() -> Iterator[Tensor]:
        if not max_new_tokens:
            return
        cache = model.new_cache(B, T + max_new_tokens - 1)  # the last token is never fed back
        step = one_token(model, cache, B)
        ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
        new = ids
        for n in range(max_new_tokens):
            if n and step is not None:
                with torch.inference_mode():
                    logits = step(new)  # (B, V)
            else:
                logits = _forward(model, new if n == 0 else new[:, None], cache)
            new = choose(logits, u[n], temperature, top_k, top_p)
            if eos is not None:
                new = new.masked_fill(ended, eos)
                ended = ended | (new == eos)
            yield new
            if eos is not None and bool(ended.all()):
                return

    return tokens()


def choose(
    logits: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one id a row: the first whose cumulative probability exceeds u.

    Args:
        logits: (B, V).
        u: (B,) float64, uniform in [0, 1).
        temperature, top_k, top_p: see `generate`.

    Returns:
        (B,) int64.
    """
    if temperature == 0.0:
        # Of 16 bits it is slower on a CPU.
        return (logits.float() if logits.dtype.itemsize == 2 else logits).argmax(-1)
    logits = logits.float()
    # From the largest logit down, so that a small temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        likely, order = p.sort(dim=-1, descending=True, stable=True)
        before = likely.cumsum(-1) - likely
        p = torch.zeros_like(p).scatter_(-1, order, likely.masked_fill(before >= top_p, 0.0))
    total = p.double().cumsum(-1)
    at = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)
    return at.squeeze(-1).clamp_(max=logits.shape[-1] - 1)


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


def _uniform(seed: int | Sequence[int] | None, B: int, n: int) -> Tensor:
    """(n, B) float64 in [0, 1), column b from row b's own seed."""
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    seeds = [seed + b for b in range(B)] if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise ValueError(f"generate: there must be one seed a row, {B}; got {len(seeds)}")
    if min(seeds, default=0) < 0:
        raise ValueError(f"generate: a seed must not be negative; got {min(seeds)}")
    columns = [np.random.default_rng(s).random(n) for s in seeds]
    return torch.from_numpy(np.stack(columns, axis=1))


def _check(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
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
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be 0 or more, and finite; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must lie in (0, 1]; got {top_p}")
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
