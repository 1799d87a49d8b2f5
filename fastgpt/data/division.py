"""Documents into a training and a held-out part, honestly: what is held out was never seen."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastgpt.data.config import DataConfig
from fastgpt.data.documents import (
    Document,
    Segment,
    Source,
    cut,
    format_of,
    paragraphs,
    records,
    rows,
    separated,
)

PIECE = 8192  # characters: the most of a text that is held out, or not, as one
REPEATED = 40  # characters: a paragraph at least this long that recurs is no accident


class Divided(NamedTuple):
    """A document and its part.

    Attributes:
        document: of one or more segments.
        held_out: whether it is not to be trained on.
    """

    document: Document
    held_out: bool


class Division:
    """Divides a stream of documents into two parts, and drops what recurs in it before it does.

    Units are drawn one in 1 / held_out, at a random place in each such stretch of them, so that the
    part is spread over the whole. A unit is a record, or a piece of a text file: these are long,
    and are cut at the end of a paragraph. What recurs is known by a 64-bit digest; each takes some
    100 bytes of memory.

    Args:
        config: its deduplicate, held_out and held_out_files.
        seed: of the draw.
        total: bytes of all text files; pieces are the smaller the less there is.

    Attributes:
        held_out: the part of all that comes; None if it is drawn.
        dropped: paragraphs and documents that were left out, as they had come before.
    """

    def __init__(self, config: DataConfig, seed: int, total: int) -> None:
        self.config = config
        self.held_out: bool | None = None
        self.dropped = 0
        self.piece = min(PIECE, max(64, total // 100))
        self._by_paragraph = config.deduplicate in ("auto", "paragraphs")  # in plain text
        self._seen: dict[int, bool] = {}
        self._draws = _draws(config.held_out, seed)

    def text(self, stream: Iterable[str]) -> Iterator[Divided]:
        """The documents of a text file: neighbouring pieces in one part are one.

        Args:
            stream: its paragraphs.
        """
        made, part = "", False  # the document that grows, and its part
        for piece in self._pieces(stream):
            held_out = self._place(piece)
            if held_out is None:
                continue
            if held_out != part and made:
                yield Divided((Segment(made),), part)
                made = ""
            made, part = made + piece, held_out
        if made.strip():
            yield Divided((Segment(made),), part)

    def _pieces(self, stream: Iterable[str]) -> Iterator[str]:
        rest = ""
        for paragraph in stream:
            if not (self._by_paragraph and self._repeats(paragraph)):
                *whole, rest = pieces(rest + paragraph, self.piece)
                yield from whole
        if rest:
            yield rest

    def records(self, stream: Iterator[Document]) -> Iterator[Divided]:
        """Documents that stay whole. Those with one prompt are in one part."""
        for document in stream:
            if not any(segment.learn for segment in document):
                continue
            prompt = tuple(s.text for s in document if not s.learn)
            if self.config.deduplicate == "none":
                held_out = self._follow(prompt or document)
            elif self._seen_before(("whole", *document)):
                continue
            else:
                document = self._without_repeats(document)
                if not document:
                    continue
                held_out = self._follow(prompt) if prompt else self._draw()
            yield Divided(document, held_out)

    def _without_repeats(self, document: Document) -> Document:
        if self.config.deduplicate != "paragraphs" or len(document) != 1:
            return document
        paragraphs = cut(document[0].text)
        kept = [p for p in paragraphs if not self._repeats(p)]
        text = "".join(kept)
        if len(kept) < len(paragraphs):
            text = text.rstrip("\r\n")
        return (Segment(text),) if text.strip() else ()

    def _place(self, piece: str) -> bool | None:
        """The part of a piece of text; None if it is dropped."""
        if self.config.deduplicate == "none":
            return self._follow(piece)
        if self.config.deduplicate == "documents" and self._seen_before(piece):
            return None
        return self._draw()

    def _draw(self) -> bool:
        return next(self._draws) if self.held_out is None else self.held_out

    def _repeats(self, paragraph: str) -> bool:
        core = paragraph.strip()
        return len(core) >= REPEATED and self._seen_before(core)

    def _seen_before(self, what: object) -> bool:
        key = _digest(what)
        if seen := key in self._seen:
            self.dropped += 1
        self._seen[key] = False
        return seen

    def _follow(self, what: object) -> bool:
        """The part in which this came first; a draw if it did not."""
        key = _digest(what)
        if key not in self._seen:
            self._seen[key] = self._draw()
        return self._seen[key]


def pieces(document: str, size: int) -> list[str]:
    """Cut a document into pieces of at most size characters, at a paragraph's end if it can."""
    made = []
    start = 0
    while len(document) - start > size:
        end = start + size
        for mark in ("\n\n", "\n", "。", ". ", " "):
            at = document.rfind(mark, start + size // 2, end)
            if at >= 0:
                end = at + len(mark)
                break
        made.append(document[start:end])
        start = end
    made.append(document[start:])
    return made


def _digest(what: object) -> int:
    text = what if isinstance(what, str) else repr(what)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _draws(share: float, seed: int) -> Iterator[bool]:
    """True for one in 1 / share, at a random place in each such stretch."""
    rng = np.random.default_rng(seed)
    unit, stretch = 0, 0
    at = rng.random() / share
    while True:
        unit += 1
        hit = at < unit
        while at < unit:
            stretch += 1
            at = (stretch + rng.random()) / share
        yield hit


def divided(
    config: DataConfig, division: Division, sources: list[Source],
    on_read: Callable[[], None] = lambda: None,
) -> Iterator[Divided]:  # fmt: skip
    """All documents of config.sources in their order, each with its part.

    Args:
        config: of the data.
        division: a new one.
        sources: of config.sources, as they were never read.
        on_read: called after each document.
    """
    for n, source in enumerate(sources):
        if config.held_out_files:
            division.held_out = n < len(config.held_out_files)
        kind = format_of(config, source.name)
        if kind == "text" and config.separator is None:
            stream = division.text(text for _, text in paragraphs(source, None))
        elif kind == "text":
            stream = division.records(separated(source, config.separator or ""))
        else:
            read = records if kind == "jsonl" else rows
            stream = division.records(read(source, config))
        for one in stream:
            on_read()
            if one.held_out and division.held_out is False:
                division.dropped += 1  # it is what the held-out files have
                continue
            yield one
