"""Documents from files and datasets, one at a time: text, JSONL, Hugging Face.

A plain text file comes paragraph by paragraph, however long it is. A record of JSONL or of a
dataset is one document and has `text`, or `prompt` and `completion`, or `messages`, a list of
{"role", "content"}.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastgpt.data.config import DataConfig

BLOCK = 2**20  # bytes read at once
LONGEST = 2**20  # characters: a paragraph longer than this is cut
BREAK = re.compile(r"(?:\r?\n){2,}")


class Segment(NamedTuple):
    """A stretch of a document.

    Attributes:
        text: of it.
        learn: whether its tokens take part in the loss.
        markup: whether special tokens in it count as such.
    """

    text: str
    learn: bool = True
    markup: bool = False


Document = tuple[Segment, ...]


@dataclass
class Source:
    """A file as it is read: how far, and the digest of what came.

    Attributes:
        name: as it was given.
        read: bytes so far.
        digest: SHA-256 of them.
    """

    name: str
    read: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def take(self, block: bytes) -> bytes:
        self.read += len(block)
        self.digest.update(block)
        return block


def format_of(config: DataConfig, name: str) -> str:
    """The format of one of config.files."""
    if config.format != "auto":
        return config.format
    return "jsonl" if Path(name).suffix in (".jsonl", ".ndjson") else "text"


def text_of(source: Source, file: BinaryIO) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, without a byte-order mark.

    Raises:
        ValueError: it is empty, or not UTF-8 text; the message names the first bad byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank = True
    while True:
        before, held = source.read, len(decoder.getstate()[0])
        block = source.take(file.read(BLOCK))
        if (nul := block.find(0)) >= 0:
            raise ValueError(
                f"text: {source.name} must be UTF-8 text; got a zero byte at offset {before + nul}"
            )
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: {source.name} must be UTF-8 text; got byte"
                f" 0x{error.object[error.start]:02x} at offset {before - held + error.start}"
            ) from None
        if before == 0:
            text = text.removeprefix("\ufeff")
        blank = blank and not text.strip()
        if text:
            yield text
        if not block:
            break
    if blank:
        raise ValueError(f"text: {source.name} must hold some text; got {source.read} bytes of it")


def paragraphs(source: Source, separator: str | None) -> Iterator[tuple[int, str]]:
    """The paragraphs of a text file, each with the blank lines after it, and the number of the
    document it is of. Together they are the text, but for the separators."""
    with open(source.name, "rb") as file:
        rest, document = "", 0
        kept = 0 if separator is None else len(separator) - 1  # may begin a separator
        for text in text_of(source, file):
            rest += text
            if separator is not None:
                *whole, rest = rest.split(separator)
                for one in whole:
                    for paragraph in cut(one):
                        yield document, paragraph
                    document += 1
            limit = max(0, len(rest) - kept)
            *complete, last = cut(rest[:limit]) or [""]
            for paragraph in complete:
                yield document, paragraph
            rest = last + rest[limit:]
        for paragraph in cut(rest):
            yield document, paragraph


def separated(source: Source, separator: str) -> Iterator[Document]:
    """The documents of a text file that has something between them, without blank lines around."""
    for _, parts in groupby(paragraphs(source, separator), key=lambda pair: pair[0]):
        if text := "".join(paragraph for _, paragraph in parts).strip("\r\n"):
            yield (Segment(text),)


def cut(text: str) -> list[str]:
    """A text's paragraphs, none of more than LONGEST characters."""
    ends = [m.end() for m in BREAK.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    parts, start = [], 0
    for end in ends:
        while end - start > LONGEST:
            parts.append(text[start : start + LONGEST])
            start += LONGEST
        if end > start:
            parts.append(text[start:end])
        start = end
    return parts


def records(source: Source, config: DataConfig) -> Iterator[Document]:
    """The documents of a JSONL file.

    Raises:
        ValueError: a line is no record, with its number; or there is none.
    """
    found = False
    with open(source.name, "rb") as file:
        for n, line in enumerate(file, 1):
            source.take(line)
            if not line.strip():
                continue
            where = f"jsonl: {source.name}, line {n}"
            try:
                record = json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} must be UTF-8; got byte 0x{line[error.start]:02x} at offset"
                    f" {error.start} of it"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} must be a JSON object; got {error.msg} at column {error.colno}"
                ) from None
            except (RecursionError, ValueError):  # too deep, a number of too many digits
                raise ValueError(f"{where} must be a JSON object that can be read") from None
            found = True
            yield document_of(where, record, config)
    if not found:
        raise ValueError(
            f"jsonl: {source.name} must hold at least one record; got {source.read} bytes"
        )


def document_of(where: str, record: object, config: DataConfig) -> Document:
    """A record as a document; where is what an error begins with.

    Raises:
        ValueError: it has no text, no prompt and completion, no messages, or they are no text.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} must be a JSON object; got {type(record).__name__}")
    if config.text_field in record:
        made: Document = (Segment(_string(where, record, config.text_field)),)
    elif "prompt" in record and "completion" in record:
        made = (
            Segment(_string(where, record, "prompt"), learn=False),
            Segment(_string(where, record, "completion")),
        )
    elif "messages" in record:
        made = tuple(chat(where, record["messages"], config.turn))
    else:
        raise ValueError(
            f"{where} must have {config.text_field}, or prompt and completion, or messages;"
            f" got {', '.join(map(str, record)) or 'nothing'}"
        )
    return tuple(segment for segment in made if segment.text)


def _string(where: str, record: Mapping[str, object], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string; got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key} must be valid Unicode; got a lone surrogate at character {error.start}"
        ) from None
    return value


def chat(where: str, messages: object, turn: str) -> Iterator[Segment]:
    """The segments of a conversation; turn as in `DataConfig`.

    Raises:
        ValueError: messages are no list of roles and contents; where is what it begins with.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one message")
    before, after = turn.split("{content}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: message {i} must have a role and content; got {message!r}")
        role = _string(where, message, "role")
        learn = role == "assistant"
        yield Segment(before.replace("{role}", role), learn=False, markup=True)
        yield Segment(_string(where, message, "content"), learn)
        yield Segment(after, learn, markup=True)


def rows(source: Source, config: DataConfig) -> Iterator[Document]:
    """The documents of a Hugging Face dataset, streamed.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: there is no such dataset, or a row of it is no record.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "data: a dataset needs the package datasets; pip install 'fastgpt-triton[data]'"
        ) from None
    name, _, split = source.name.partition("@")
    name, _, subset = name.partition(":")
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # a dozen types, some of them of its dependencies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"dataset: {source.name} cannot be read; {reason}") from None
    found = False
    for n, row in enumerate(data):
        found = True
        document = document_of(f"dataset: {source.name}, row {n}", row, config)
        source.take("".join(segment.text for segment in document).encode())
        yield document
    if not found:
        raise ValueError(f"dataset: {source.name} must hold at least one row")


def size_of(config: DataConfig, name: str) -> int | None:
    """Bytes of a file; None of a dataset.

    Raises:
        OSError: it cannot be read.
    """
    if format_of(config, name) == "dataset":
        return None
    with open(name, "rb") as file:
        return os.fstat(file.fileno()).st_size
