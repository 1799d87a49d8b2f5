"""Batches by step: a function of the seed, the step and which share of the batch is asked for.

There is no state to save: a run goes on from the number of its step alone, on any number of ranks.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.data.config import PACKINGS
from fastgpt.data.corpus import Ints, Part
from fastgpt.data.packing import Packing, pack, stretches

IGNORE = -100  # a target that takes no part in the loss


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the token after each.

    Attributes:
        idx: (B, T) int64.
        targets: (B, T) int64; -100 where none takes part in the loss.
        cu_seqlens: (n + 1,) int32: with the rows end to end, document i has the tokens
            cu_seqlens[i] .. cu_seqlens[i + 1] - 1, and attention stays in it; None if it does in
            whole rows.
        max_seqlen: tokens of the longest.
    """

    idx: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; to CUDA through pinned memory, without waiting."""
        cuda = torch.device(device).type == "cuda" and torch.accelerator.is_available()

        def moved(t: Tensor) -> Tensor:
            return t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device)

        cu = None if self.cu_seqlens is None else moved(self.cu_seqlens)
        return replace(self, idx=moved(self.idx), targets=moved(self.targets), cu_seqlens=cu)


class Shuffle:
    """A permutation of 0 .. n - 1 drawn from rng, of which no more is made than is asked for.

    It is a Feistel network on the least power of 4 that n fits in, followed for as long as it leads
    out of the range (Black, Rogaway, Ciphers with arbitrary finite domains, 2002,
    https://eprint.iacr.org/2001/012, section 4).
    """

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n = n
        half = max(1, -(-(n - 1).bit_length() // 2))
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)
        self._keys = rng.integers(2**64, size=8, dtype=np.uint64)

    def __call__(self, i: Ints) -> Ints:
        """(m,) the numbers at places i of the permutation."""
        x = self._rounds(i.astype(np.uint64))
        while (out := x >= self.n).any():
            x[out] = self._rounds(x[out])
        return x.astype(np.int64)

    def _rounds(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return left << self._half | right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: Steele, Lea, Flood, 2014, https://doi.org/10.1145/2660193.2660195."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Batches of a part of a corpus.

    An epoch visits every row once, in an order of its own. With packing "concat" rows are windows
    of the tokens end to end; they do not overlap, and every epoch lays them out from another start.
    With "documents" a row holds whole documents (pieces of block_size of longer ones), each of
    which attends to itself alone, and what is left of it is padding without targets. Pieces that
    have no target are left out. Which row holds what takes some 25 bytes of memory a document.

    Args:
        part: of a corpus.
        block_size: tokens of a row, T.
        rows: of the batch of a step, all ranks together.
        seed: of the order.
        packing: "concat" or "documents".

    Raises:
        ValueError: there is no whole row in it, or rows or block_size is below 1.
    """

    def __init__(
        self, part: Part, block_size: int, rows: int, seed: int = 0, packing: str = "concat"
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(
                f"sampler: packing must be one of {', '.join(PACKINGS)}; got {packing!r}"
            )
        for name, value in (("block_size", block_size), ("rows", rows)):
            if value < 1:
                raise ValueError(f"sampler: {name} must be at least 1; got {value}")
        self.part, self.block_size, self.rows = part, block_size, rows
        self.seed, self.packing = seed, packing
        if packing == "concat" and len(part) <= block_size:
            raise ValueError(
                f"text: it must be longer than the context, block_size {block_size} tokens;"
                f" got {len(part)} tokens"
            )
        if packing == "documents" and not self.windows:
            raise ValueError(
                "text: it must have a document with a token to predict after another; got none"
            )

    @cached_property
    def _plan(self) -> Packing:
        starts, lengths = stretches(self.part.ends, self.block_size)
        taught = self.part.learned(starts + 1, lengths) > 0
        return pack(starts[taught], lengths[taught], self.block_size)

    @cached_property
    def windows(self) -> int:
        """How many rows `take` knows: those that do not overlap."""
        if self.packing == "documents":
            return len(self._plan.rows) - 1
        return (len(self.part) - 1) // self.block_size

    @property
    def per_epoch(self) -> int:
        """Rows of an epoch."""
        if self.packing == "documents":
            return self.windows
        return max(1, self.windows - 1)  # one less than would fit, to have room to shift them

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The share of a rank in the batch of a step: rows [rank, rank + 1) * rows / world.

        Args:
            step: its number, from 0.
            rank: whose share.
            world: how many shares there are; rows is a multiple of it.

        Raises:
            ValueError: rows is no multiple of world, or rank does not lie below it.
        """
        if world < 1 or self.rows % world:
            raise ValueError(
                f"sampler: a batch of {self.rows} rows must divide by the number of shares;"
                f" got {world}"
            )
        if not 0 <= rank < world or step < 0:
            raise ValueError(
                f"sampler: rank must lie in [0, {world}) and step not be negative; got rank {rank},"
                f" step {step}"
            )
        share = self.rows // world
        at = step * self.rows + rank * share + np.arange(share)
        epochs, places = np.divmod(at, self.per_epoch)
        rows: list[tuple[int, int]] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            order, shift = self._epoch(epoch)
            rows += [(n, shift) for n in order(places[epochs == epoch]).tolist()]
        return self._batch(rows)

    def take(self, numbers: list[int]) -> Batch:
        """Rows by their number, in [0, windows), in the order of the corpus: to evaluate on."""
        return self._batch([(n, 0) for n in numbers])

    def _epoch(self, epoch: int) -> tuple[Shuffle, int]:
        """The order of an epoch's rows, and the token at which the first starts."""
        rng = np.random.default_rng((self.seed, epoch))
        order = Shuffle(self.per_epoch, rng)
        if self.packing == "documents":
            return order, 0
        room = len(self.part) - 1 - self.per_epoch * self.block_size
        return order, int(rng.integers(0, room + 1))

    def _batch(self, rows: list[tuple[int, int]]) -> Batch:
        if self.packing == "documents":
            return self._packed([n for n, _ in rows])
        T = self.block_size
        read = [self.part.read(at, at + T + 1) for at in (n * T + shift for n, shift in rows)]
        ids = torch.from_numpy(np.stack([i for i, _ in read]))  # (B, T + 1)
        learn = torch.from_numpy(np.stack([flags for _, flags in read]))
        targets = ids[:, 1:].masked_fill(~learn[:, 1:], IGNORE)
        return Batch(ids[:, :-1].contiguous(), targets, None, T)

    def _packed(self, numbers: list[int]) -> Batch:
        B, T, plan = len(numbers), self.block_size, self._plan
        idx = np.zeros((B, T), np.int64)
        targets = np.full((B, T), IGNORE, np.int64)
        cu, longest = [0], 0
        for row, n in enumerate(numbers):
            at = 0
            for s in range(int(plan.rows[n]), int(plan.rows[n + 1])):
                start, length = int(plan.starts[s]), int(plan.lengths[s])
                ids, learn = self.part.read(start, start + length + 1)
                idx[row, at : at + length] = ids[:-1]
                targets[row, at : at + length] = np.where(learn[1:], ids[1:], IGNORE)
                at += length
                cu.append(row * T + at)
                longest = max(longest, length)
            if at < T:  # the padding is a document of its own
                cu.append((row + 1) * T)
                longest = max(longest, T - at)
        return Batch(
            torch.from_numpy(idx), torch.from_numpy(targets),
            torch.tensor(cu, dtype=torch.int32), longest,
        )  # fmt: skip
