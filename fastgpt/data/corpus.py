"""A corpus on disk: token shards, mapped into memory, and what is known of them.

tokenizer.json              what made the ids
train-00000.tokens.npy      (n,) uint16, or uint32 for a vocabulary of more than 65536
train-00000.ends.npy        (documents,) int64: where each document ends
train-00000.learn.npy       (ceil(n / 8),) uint8: a bit a token, whether it takes part in the
                            loss; no such file if all do
held_out-00000. ...
shards.json                 sizes, counts and SHA-256 of all; written last
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.tokenizer import Tokenizer

MANIFEST, TOKENIZER = "shards.json", "tokenizer.json"
TRAIN, HELD_OUT = PARTS = ("train", "held_out")
VERSION = 1
Tokens = npt.NDArray[Any]
"""Ids, uint16 or uint32."""
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shard:
    """Some documents, end to end.

    Attributes:
        tokens: (n,) uint16 or uint32.
        ends: (documents,) int64, where each document ends; the last is n.
        learn: (ceil(n / 8),) uint8, for each token a bit, whether it takes part in the loss, as
            np.packbits has them; None if all do.
        bytes: of UTF-8 text.
    """

    tokens: Tokens
    ends: Ints
    learn: npt.NDArray[np.uint8] | None = None
    bytes: int = 0


class Part:
    """The tokens of a part of a corpus as one long row, read from its shards as needed.

    Args:
        shards: in their order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> "Part":
        """A part in memory, of documents given as ids."""
        ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        ids = [np.asarray(ids, np.uint32) for ids in documents]
        return cls([Shard(np.concatenate([np.empty(0, np.uint32), *ids]), ends)])

    def __len__(self) -> int:
        """Tokens."""
        return int(self._starts[-1])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(len(shard.ends) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 text."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def ends(self) -> Ints:
        """(documents,) where each document ends."""
        pairs = zip(self._starts, self.shards, strict=False)
        return np.concatenate([np.empty(0, np.int64), *(at + s.ends for at, s in pairs)])

    def read(self, start: int, stop: int) -> tuple[Ints, Flags]:
        """Tokens start .. stop - 1, and whether each takes part in the loss."""
        ids = np.empty(stop - start, np.int64)
        learn = np.ones(stop - start, np.bool_)
        at = start
        while at < stop:
            n = int(np.searchsorted(self._starts, at, side="right")) - 1
            shard, first = self.shards[n], int(self._starts[n])
            end = min(stop, int(self._starts[n + 1]))
            a, b, here = at - first, end - first, slice(at - start, end - start)
            ids[here] = shard.tokens[a:b]
            if shard.learn is not None:
                bits = np.unpackbits(shard.learn[a // 8 : -(-b // 8)])
                learn[here] = bits[a % 8 : a % 8 + b - a]
            at = end
        return ids, learn

    def learned(self, starts: Ints, lengths: Ints) -> Ints:
        """(S,) how many tokens of each of some stretches take part in the loss.

        Args:
            starts: (S,) where they start, not decreasing; none goes beyond its shard.
            lengths: (S,).
        """
        counts = lengths.copy()
        for n, shard in enumerate(self.shards):
            if shard.learn is None:
                continue
            first = int(self._starts[n])
            here = slice(*np.searchsorted(starts, self._starts[n : n + 2]))
            flags = np.unpackbits(shard.learn, count=len(shard.tokens))
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(flags, dtype=np.int64)])
            at = starts[here] - first
            counts[here] = before[at + lengths[here]] - before[at]
        return counts


@dataclass(frozen=True)
class Corpus:
    """A training part and a held-out part, and the tokenizer that made their ids.

    Attributes:
        folder: where it lies.
        tokenizer: of its ids.
        train, held_out: the parts.
        told: what shards.json says.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Part
    held_out: Part
    told: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Ids lie below it."""
        return len(self.tokenizer.token_bytes)

    @cached_property
    def token_bytes(self) -> Tensor:
        """(vocab_size,) int64: bytes of UTF-8 that an id stands for, for bits per byte."""
        return torch.tensor([len(b) for b in self.tokenizer.token_bytes])

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None,
        verify: bool = False,
    ) -> "Corpus":  # fmt: skip
        """Map a corpus that `prepare` made into memory.

        Args:
            folder: of it.
            tokenizer: if given, the one that its ids must be of.
            verify: whether to read all of it, and compare its SHA-256; if not, sizes alone are.

        Raises:
            ValueError: there is no finished corpus; a file is missing, of another size or digest
                than when it was written; or it is of another tokenizer.
        """
        folder = Path(folder)
        told = read_manifest(folder)
        own = Tokenizer.load(_present(folder / TOKENIZER))
        for one, what in ((own, f"{folder / TOKENIZER}"), (tokenizer, "the tokenizer given")):
            if one is not None and one.fingerprint != told["tokenizer"]["fingerprint"]:
                raise ValueError(
                    f"data: {folder} holds ids of another tokenizer; got {what}, of"
                    f" {one.vocab_size} ids, where {told['tokenizer']['vocab_size']} were used"
                )
        parts: dict[str, list[Shard]] = {name: [] for name in PARTS}
        for entry in told["shards"]:
            for name, facts in entry["files"].items():
                check_file(folder / name, facts, verify)
            arrays = {name.split(".")[1]: _map(folder / name) for name in entry["files"]}
            parts[entry["part"]].append(
                Shard(arrays["tokens"], arrays["ends"], arrays.get("learn"), entry["bytes"])
            )
        return cls(folder, own, Part(parts[TRAIN]), Part(parts[HELD_OUT]), told)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What shards.json says.

    Raises:
        ValueError: there is none, or it is none.
    """
    path = folder / MANIFEST
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = told["version"]
        _ = told["tokenizer"]["fingerprint"], told["shards"], told["asked"]
    except FileNotFoundError:
        raise ValueError(
            f"data: {folder} holds no finished corpus; {MANIFEST} is missing"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"data: {path} is broken; prepare the corpus anew") from None
    if version != VERSION:
        raise ValueError(
            f"data: {path} must be of version {VERSION}; got {version}; prepare the corpus anew"
        )
    return told


def check_file(path: Path, facts: dict[str, Any], verify: bool) -> None:
    """Raise unless a file has the size, and if verify the digest, that it was written with."""
    size = _present(path).stat().st_size
    if size != facts["size"]:
        raise ValueError(
            f"data: {path} is broken: it must have {facts['size']} bytes; got {size};"
            " prepare the corpus anew"
        )
    if verify and file_digest(path) != facts["sha256"]:
        raise ValueError(
            f"data: {path} is broken: its bytes changed since it was written; prepare the corpus"
            " anew"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"data: {path} is missing; prepare the corpus anew")
    return path


def _map(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"data: {path} is broken; prepare the corpus anew") from None
