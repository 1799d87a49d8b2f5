"""From tokens to the logits of what comes next: all that generation asks of a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastgpt.decode import one_token
from fastgpt.model import GPT


class Decoder:
    """A model with a cache of B rows, which are fed tokens and give the logits after them.

    Args:
        model: in training or evaluation mode; it runs without dropout, and its mode is left as it
            was.
        B: rows.
        length: the most positions of a row, at most block_size; block_size if None.

    Raises:
        ValueError: B or length lies outside these rules.
    """

    def __init__(self, model: GPT, B: int, length: int | None = None) -> None:
        most = model.config.block_size
        length = most if length is None else length
        if B < 1:
            raise ValueError(f"Decoder: B must be at least 1; got {B}")
        if not 1 <= length <= most:
            raise ValueError(f"Decoder: length must be from 1 to block_size, {most}; got {length}")
        self.model, self.length = model, length
        self.cache = model.new_cache(B, length)
        self._B = B
        self._step = one_token(model, self.cache, B)

    @property
    def lengths(self) -> list[int]:
        """Positions held, per row."""
        return [self.cache.length] * self._B

    def prefill(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Add tokens after those that are held.

        Args:
            ids: (B, T) int64 or int32, each row's tokens and, to its right, any ids as padding.
            lengths: tokens of each row, from 1 to T; T if None.

        Returns:
            (B, V): the logits after each row's last token.
        """
        if lengths is not None and any(n != ids.shape[1] for n in lengths):
            raise NotImplementedError("Decoder: rows of different lengths are yet to come")
        with self._evaluating():
            logits = self.model.logits(self.model.hidden(ids, self.cache)[:, -1])
        return logits.clone()  # outside of inference mode: a tensor like any other

    def step(self, token: Tensor) -> Tensor:
        """Add one token a row, (B,) -> the logits after it, (B, V)."""
        with self._evaluating():
            if self._step is not None:
                logits = self._step(token)
            else:
                logits = self.model.logits(self.model.hidden(token[:, None], self.cache)[:, -1])
        return logits.clone()

    def extend(self, tokens: Tensor) -> Tensor:
        """Add T tokens a row, (B, T) -> the logits after each, (B, T, V)."""
        with self._evaluating():
            logits = self.model.logits(self.model.hidden(tokens, self.cache))
        return logits.clone()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Go back to fewer positions, per row."""
        if any(n != lengths[0] for n in lengths):
            raise NotImplementedError("Decoder: rows of different lengths are yet to come")
        self.cache.length = lengths[0]

    def reorder(self, rows: Tensor) -> None:
        """Let row b be what row rows[b] was; rows: (n,) int64, of which there are n from then on.

        With n other than B rows are dropped, or a prompt that was read once is continued by many.
        """
        old, n = self.cache, rows.shape[0]
        if n != self._B:
            self.cache, self._B = self.model.new_cache(n, self.length), n
            self.cache.length = old.length
            self._step = one_token(self.model, self.cache, n)
        for layer in range(self.model.config.n_layer):
            room, had = (c.room(layer)[:, :, : old.length] for c in (self.cache, old))
            room.copy_(had[:, rows])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()
