"""From tokens to the logits of what comes next: all that generation asks of a model.

A step runs in one of three ways: on a CPU by `fastgpt.decode`; where kernels run on a GPU, as one
CUDA graph that serves all positions; by the model's modules elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastgpt.cache import FEW, SPARE, KVCache
from fastgpt.decode import one_token
from fastgpt.model import GPT
from fastgpt.ops import backend

FULL = ("refuse", "slide")


class Decoder:
    """A model and what B rows of tokens have left in its cache.

    Rows may hold different numbers of tokens; the logits of each are those that it has alone. A row
    holds at most length positions. When more come, a Decoder refuses, or with full="slide" forgets:
    of a row of n tokens, to which T are to be added so that n + T > length, the newest
    max(0, min(length // 2, length - T)) are kept and encoded anew at positions 0, 1, ..., with
    nothing before them; then the T follow. Of a prompt of more than length tokens the newest length
    are read. The logits are those of the model on the tokens that are kept.

    Args:
        model: in training or evaluation mode; it runs without dropout, and its mode is left as it
            was.
        B: rows.
        length: the most positions of a row, at most block_size; block_size if None.
        room: positions to set memory aside for at first, which doubles whenever it is full; length
            at once if None. A model with a window has a room that goes round instead, of little
            more than the window.
        full: "refuse" or "slide".
        graphs: whether steps on a GPU are captured as CUDA graphs.

    Raises:
        ValueError: an argument outside these rules.

    Attributes:
        cache: the `fastgpt.cache.KVCache`; cache.nbytes is the memory that it takes.
    """

    def __init__(
        self, model: GPT, B: int, length: int | None = None, *, room: int | None = None,
        full: str = "refuse", graphs: bool = True,
    ) -> None:  # fmt: skip
        most = model.config.block_size
        length = most if length is None else length
        if B < 1:
            raise ValueError(f"Decoder: B must be at least 1; got {B}")
        if not 1 <= length <= most:
            raise ValueError(f"Decoder: length must be from 1 to block_size, {most}; got {length}")
        if room is not None and room < 1:
            raise ValueError(f"Decoder: room must be at least 1; got {room}")
        if full not in FULL:
            raise ValueError(f"Decoder: full must be one of {', '.join(FULL)}; got {full!r}")
        self.model, self.length = model, length
        self.cache = model.new_cache(B, length, room=room)
        weight = model.ln_f.weight
        kernels = backend.kernels_run(weight)
        if kernels:
            self.cache.track()
        self._captures = graphs and kernels and _has_graphs(weight)
        # What slides must know its tokens.
        self._tokens: Tensor | None = None
        if full == "slide":
            self._tokens = torch.zeros((B, length), dtype=torch.int64, device=weight.device)
        self._made_for: Tensor | None = None
        self._one: Callable[[Tensor], Tensor] | None = None
        self._graphs: dict[int, _Captured] = {}

    @property
    def lengths(self) -> list[int]:
        """Positions held, per row."""
        return self.cache.lengths

    def prefill(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Add tokens after those that are held.

        Args:
            ids: (B, T) int64 or int32 on the model's device, each row's tokens and, to their right,
                any ids as padding.
            lengths: tokens of each row, from 1 to T; T if None.

        Returns:
            (B, V): the logits after each row's last token.

        Raises:
            ValueError: shapes or lengths outside these rules, ids outside the vocabulary, or more
                tokens than there is room for.
            TypeError: ids are not integers.
        """
        counts = self._counts(ids, lengths)
        if max(counts) > self.length:
            if self._tokens is None:
                raise self._no_room(max(counts))
            ids, counts = _newest(ids, counts, self.length)
        with self._evaluating():
            self._make_room(counts)
            cache, T = self.cache, max(counts)
            ids = ids[:, :T]
            self._note(ids, counts)
            if min(counts) == T:
                last = self._hidden(ids)[:, -1]
            elif not cache.length and (not cache.rolls or cache.slots >= T):
                hidden = self._hidden(ids)
                cache.truncate(counts)
                ends = torch.tensor(counts, device=ids.device) - 1
                last = hidden[torch.arange(len(ids), device=ids.device), ends]
            else:
                # What pads a row could overwrite what it holds, or lie beyond its room.
                cache.grow(max(map(sum, zip(cache.lengths, counts, strict=True))))
                last = torch.cat([self._row(b, ids[b, :n]) for b, n in enumerate(counts)])
            logits = self.model.logits(last)
        return logits.clone()  # outside of inference mode: a tensor like any other

    def step(self, token: Tensor) -> Tensor:
        """Add one token a row.

        Args:
            token: (B,) int64 or int32.

        Returns:
            (B, V): the logits after it.

        Raises:
            ValueError, TypeError: as `prefill`.
        """
        counts = self._counts(token[:, None], None)
        with self._evaluating():
            self._make_room(counts)
            self._note(token[:, None], counts)
            self.cache.reserve(1)
            self._made()
            if self._one is None:
                logits = self._few(token[:, None])[:, 0]
            else:
                logits = self._one(token)
        return logits.clone()

    def extend(self, tokens: Tensor) -> Tensor:
        """Add T tokens a row, and tell what follows each: to verify a draft.

        Args:
            tokens: (B, T) int64 or int32.

        Returns:
            (B, T, V): the logits after each.

        Raises:
            ValueError, TypeError: as `prefill`.
        """
        counts = self._counts(tokens, None)
        if (T := counts[0]) > self.length:
            raise self._no_room(T)
        with self._evaluating():
            self._make_room(counts)
            self._note(tokens, counts)
            logits = self._few(tokens) if T <= FEW else self.model.logits(self._hidden(tokens))
        return logits.clone()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Go back to fewer positions, per row.

        Args:
            lengths: of each row, from 0 to what it holds. A room that goes round has forgotten what
                fell out of it: there, 0 or at most `fastgpt.cache.SPARE` fewer than it ever held.

        Raises:
            ValueError: lengths outside these rules.
        """
        self.cache.truncate(lengths)

    def reorder(self, rows: Tensor) -> None:
        """Let row b be what row rows[b] was; of (B',) int64 rows, which are B from then on.

        So beams follow their best, several samples share one prompt, and ended rows leave.

        Raises:
            ValueError: rows are none, or no rows of this.
        """
        B = self.cache.batch_size
        rows = rows.cpu()
        if rows.ndim != 1 or not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= B:
            raise ValueError(f"Decoder: rows must be from 0 to {B - 1}; got {rows.tolist()}")
        with torch.inference_mode():
            self.cache.reorder(rows)
            if self._tokens is not None:
                self._tokens = self._tokens[rows.to(self._tokens.device)]

    def _counts(self, ids: Tensor, lengths: Sequence[int] | None) -> list[int]:
        """Tokens of each row, checked."""
        B = self.cache.batch_size
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Decoder: ids must be int64 or int32; got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[0] != B or not ids.shape[1]:
            raise ValueError(
                f"Decoder: ids must be (B, T), B {B} and T at least 1; got {tuple(ids.shape)}"
            )
        T = ids.shape[1]
        if lengths is None:
            return [T] * B
        if len(lengths) != B or min(lengths) < 1 or max(lengths) > T:
            raise ValueError(
                f"Decoder: lengths must be one a row, {B}, from 1 to T, {T}; got {list(lengths)}"
            )
        return list(lengths)

    def _no_room(self, T: int) -> ValueError:
        return ValueError(
            f"Decoder: there is room for {self.length} positions a row; got {T} more after"
            f' {self.cache.length}: full="slide" would forget the oldest'
        )

    def _make_room(self, counts: list[int]) -> None:
        """For so many more tokens of each row: refuse or slide."""
        cache, held = self.cache, self.cache.lengths
        full = [b for b, n in enumerate(held) if n + counts[b] > self.length]
        if not full:
            return
        if self._tokens is None:
            raise self._no_room(max(counts[b] for b in full))
        keep = [max(0, min(self.length // 2, self.length - n)) for n in counts]
        kept = {b: self._tokens[b, held[b] - keep[b] : held[b]].clone() for b in full}
        for b, tokens in kept.items():
            self._tokens[b, : keep[b]] = tokens
        if len(full) == len(held) and len({len(tokens) for tokens in kept.values()}) == 1:
            cache.truncate([0] * len(held))
            if keep[0]:
                self._hidden(torch.stack(list(kept.values())))
            return
        for b, tokens in kept.items():
            row = cache.row(b)
            row.truncate([0])
            cache.put(b, row)
            if keep[b]:
                self._row(b, tokens)

    def _note(self, ids: Tensor, counts: list[int]) -> None:
        """Write down what comes, where that may be needed again."""
        if self._tokens is None:
            return
        held = self.cache.lengths
        if min(held) == max(held) and min(counts) == max(counts):
            self._tokens[:, held[0] : held[0] + counts[0]] = ids
            return
        for b, (n, more) in enumerate(zip(held, counts, strict=True)):
            self._tokens[b, n : n + more] = ids[b, :more]

    def _hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The states after each of ids, (B, T) -> (B, T, C), which join the cache."""
        cache = self.cache if cache is None else cache
        model = self.model
        if not (cache.rolls and cache.length and ids.shape[1] > SPARE):
            return model.hidden(ids, cache)
        return torch.cat([model.hidden(part, cache) for part in ids.split(SPARE, 1)], 1)

    def _row(self, b: int, ids: Tensor) -> Tensor:
        """Add (T,) ids to row b alone -> the state after them, (1, C)."""
        row = self.cache.row(b)
        last = self._hidden(ids[None], row)[:, -1]
        self.cache.put(b, row)
        return last

    def _made(self) -> None:
        """Make what steps by itself anew, where the cache has other rooms than it was made for."""
        if self._made_for is not self.cache.room(0):
            self._made_for = self.cache.room(0)
            self._one = one_token(self.model, self.cache, self.cache.batch_size)
            self._graphs.clear()

    def _few(self, tokens: Tensor) -> Tensor:
        """Add a few tokens, (B, T) -> the logits after each, (B, T, V)."""
        cache, T = self.cache, tokens.shape[1]
        if not self._captures or not cache.length or not _kernels_alone(self.model):
            return self.model.logits(self._hidden(tokens))
        cache.reserve(T)
        self._made()
        if T not in self._graphs:
            self._graphs[T] = _Captured(self.model, cache, tokens)
        return self._graphs[T](tokens)

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


class _Captured:
    """T more tokens of every row as one CUDA graph, which serves all positions.

    Where the tokens go and what they see is read from cache.at, on the device.
    """

    def __init__(self, model: GPT, cache: KVCache, tokens: Tensor) -> None:
        self.cache, self.tokens = cache, tokens.long().clone()
        held = cache.lengths

        def step() -> Tensor:
            return model.logits(model.hidden(self.tokens, cache))

        with torch.cuda.device(tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set up and kernels compile at a first run
                for _ in range(2):
                    step()
                    cache.hold(held)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = step()
            cache.hold(held)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits; the next call overwrites them."""
        self.tokens.copy_(tokens, non_blocking=True)
        self.graph.replay()
        self.cache.advance(tokens.shape[1], device=False)
        return self.logits


def _has_graphs(weight: Tensor) -> bool:
    """Whether it is on a GPU: also one that only says so, under the sanitizer, is_cuda."""
    keys = torch._C._dispatch_keys(weight)
    return weight.is_cuda and keys.has(torch._C.DispatchKey.CUDA)


def _kernels_alone(model: GPT) -> bool:
    """Whether kernels run, and no autocast, which keeps casts of weights that a graph has not."""
    weight = model.ln_f.weight
    return backend.kernels_run(weight) and not torch.is_autocast_enabled(weight.device.type)


def _newest(ids: Tensor, counts: list[int], most: int) -> tuple[Tensor, list[int]]:
    """Of each row's tokens the newest, at most so many, padded to the right again."""
    rows = [row[max(0, n - most) : n] for row, n in zip(ids, counts, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]
