"""Text to batches: UTF-8 files, an honest held-out part, arrays of ids, batches by step."""

import codecs
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

Tokens = npt.NDArray[Any]  # (n,) uint16 or uint32
PIECE = 8192  # characters: the most that is held out, or not, as one
REPEATED = 40  # characters: a paragraph at least this long that recurs is no accident


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: the file is empty, or not UTF-8 text; the message names the first bad byte.
        OSError: it cannot be read.
    """
    raw = Path(path).read_bytes()
    skip = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    if (nul := raw.find(0)) >= 0:
        raise ValueError(f"text: {path} must be UTF-8 text; got a zero byte at offset {nul}")
    try:
        text = raw[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + skip
        raise ValueError(
            f"text: {path} must be UTF-8 text; got byte 0x{raw[at]:02x} at offset {at}"
        ) from None
    if not text.strip():
        raise ValueError(f"text: {path} must hold some text; got {len(raw)} bytes of it")
    return text


def pieces(document: str, size: int) -> list[str]:
    """Cut a document into pieces of at most size characters, at a paragraph's end if it can."""
    cut = []
    start = 0
    while len(document) - start > size:
        end = start + size
        for mark in ("\n\n", "\n", "。", ". ", " "):
            at = document.rfind(mark, start + size // 2, end)
            if at >= 0:
                end = at + len(mark)
                break
        cut.append(document[start:end])
        start = end
    cut.append(document[start:])
    return cut


def split(
    documents: Sequence[str], held_out: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Divide documents into a training and a held-out part, at random.

    Long documents are cut into pieces first, so that both parts are drawn from all over the text.
    A paragraph that recurs is kept once, before the division: what is held out was never seen.

    Args:
        documents: texts.
        held_out: the share of characters to hold out, in (0, 1).
        seed: of the draw.

    Returns:
        The documents of the two parts. Neighbouring pieces in one part are one document again.

    Raises:
        ValueError: held_out is no such share, or the text is too short to divide.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"split: held_out must lie in (0, 1); got {held_out}")
    documents = _without_repeats(documents)
    total = sum(map(len, documents))
    size = min(PIECE, max(64, total // 100))
    cut = [(n, piece) for n, d in enumerate(documents) for piece in pieces(d, size)]
    chosen: set[int] = set()
    left = held_out * total
    for i in np.random.default_rng(seed).permutation(len(cut)):
        if left <= 0:
            break
        chosen.add(int(i))
        left -= len(cut[i][1])
    parts: tuple[list[str], list[str]] = ([], [])
    last: tuple[int, int] | None = None  # document and part of the piece before
    for i, (n, piece) in enumerate(cut):
        part = int(i in chosen)
        if last == (n, part):
            parts[part][-1] += piece
        else:
            parts[part].append(piece)
        last = (n, part)
    if not all(parts):
        raise ValueError(
            f"split: a text must be long enough to hold some of it out; got {total} characters"
        )
    return parts


def _without_repeats(documents: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            core = paragraph.strip()
            if len(core) < REPEATED or core not in seen:
                paragraphs.append(paragraph)
                seen.add(core)
        if text := "\n\n".join(paragraphs):
            kept.append(text)
    return kept


def tokenize(tokenizer: Tokenizer, documents: Sequence[str]) -> Tokens:
    """One array of the ids of all documents, each ended by the end-of-text token if there is one.

    Returns:
        (n,) uint16, or uint32 for a vocabulary of more than 65536.
    """
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    arrays = [np.array(ids + end, dtype) for ids in tokenizer.encode_all(documents)]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def write_tokens(path: str | os.PathLike[str], tokens: Tokens) -> None:
    """Write a token array as a .npy file, whole or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            np.save(file, tokens, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_tokens(path: str | os.PathLike[str]) -> Tokens:
    """Map a token array into memory; nothing is read until it is used.

    Raises:
        ValueError: the file is not a one-dimensional .npy of uint16 or uint32.
        OSError: it cannot be read.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"tokens: {path} is not a .npy file of numbers") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"tokens: {path} must hold one row of unsigned integers")
    return tokens


@dataclass(frozen=True)
class Batches:
    """Batches of windows of a token array; batch = f(seed, step), so there is no state to save.

    An epoch visits every window once, in an order of its own; windows do not overlap, and every
    epoch lays them out from another start.

    Attributes:
        tokens: (n,), n above block_size.
        block_size: tokens of a window, T.
        batch_size: windows of a batch, B.
        seed: of the order.
    """

    tokens: Tokens
    block_size: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.block_size:
            raise ValueError(
                f"text: it must be longer than the context, block_size {self.block_size} tokens;"
                f" got {len(self.tokens)} tokens"
            )

    @cached_property
    def per_epoch(self) -> int:
        """Windows of an epoch."""
        most = (len(self.tokens) - 1) // self.block_size
        return max(1, most - 1)  # one less than would fit, to have room to shift them

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """(per_epoch,) where the windows of an epoch start, in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        room = len(self.tokens) - 1 - self.per_epoch * self.block_size
        return rng.permutation(self.per_epoch) * self.block_size + rng.integers(0, room + 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, (B, T) int64 each; a target is the token after."""
        at = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, windows = np.divmod(at, self.per_epoch)
        starts = {int(e): self._epoch(int(e)) for e in set(epochs.tolist())}
        T = self.block_size
        rows = [
            self.tokens[(s := starts[int(e)][w]) : s + T + 1].astype(np.int64)
            for e, w in zip(epochs, windows, strict=True)
        ]
        both = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return both[:, :-1], both[:, 1:]


def unigram_bits(train: npt.NDArray[Any], held_out: npt.NDArray[Any], vocab_size: int) -> float:
    """Bits a symbol of held_out under the frequencies of train, each count raised by one."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[held_out].mean())
