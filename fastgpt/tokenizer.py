"""Byte-level byte-pair encoding: any Unicode text to ids and back, nothing lost.

Sennrich, Haddow, Birch, Neural machine translation of rare words with subword units, 2016,
https://arxiv.org/abs/1508.07909; on bytes as in GPT-2. The work is done by the `tokenizers`
package, and the file is its tokenizer.json.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fastgpt.gguf_file import read_tokenizer

EOS = "<|endoftext|>"
MIN_VOCAB = 257  # every byte, and EOS


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer: needs the package tokenizers; pip install 'fastgpt-triton[train]'"
        ) from None
    return tokenizers


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    GPT-2's table: printable bytes stand for themselves, the rest for characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A byte-level BPE vocabulary. `Tokenizer.train` and `Tokenizer.load` make one."""

    def __init__(self, inner: Any) -> None:
        # Text is text: the letters <|endoftext|> in it do not become the token.
        inner.encode_special_tokens = True
        self._inner = inner

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary: merge the most frequent pair of neighbours, again and again.

        Args:
            texts: what to learn from.
            vocab_size: the most ids, at least 257: every byte, and the end-of-text token. A short
                text may give fewer.

        Raises:
            ValueError: vocab_size is below 257.
            ImportError: the package tokenizers is not installed.
        """
        if vocab_size < MIN_VOCAB:
            raise ValueError(
                f"tokenizer: vocab_size must be at least {MIN_VOCAB}, every byte and the end of"
                f" text; got {vocab_size}"
            )
        t = _tokenizers()
        inner = t.Tokenizer(t.models.BPE())
        inner.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = t.decoders.ByteLevel()
        trainer = t.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=sorted(t.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json, or the tokenizer of a .gguf file.

        Raises:
            ValueError: the file is not that of a byte-level BPE tokenizer.
            OSError: it cannot be read.
            ImportError: the package tokenizers, or gguf, is needed and not installed.
        """
        if Path(path).suffix == ".gguf":
            text = read_tokenizer(Path(path)).encode()
        else:
            text = Path(path).read_bytes()
        try:
            inner = _tokenizers().Tokenizer.from_buffer(text)
            byte_level = "ByteLevel" in type(inner.decoder).__name__
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises no narrower type
            reason = str(error).splitlines()[0]
            raise ValueError(f"tokenizer: {path} is not a tokenizer.json; {reason}") from None
        if not byte_level:
            raise ValueError(
                "tokenizer: only byte-level BPE is supported;"
                f" got {type(inner.decoder).__name__} in {path}"
            )
        return cls(inner)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What a tokenizer.json holds."""
        return str(self._inner.to_str(pretty=False))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the end-of-text token among them."""
        return int(self._inner.get_vocab_size())

    @cached_property
    def eos(self) -> int | None:
        """The id of the end-of-text token, if there is one."""
        id = self._inner.token_to_id(EOS)
        return None if id is None else int(id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; `decode` gives the text back exactly.

        Raises:
            ValueError: text holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tokenizer: text must be valid Unicode; got a lone surrogate at character"
                f" {error.start}"
            ) from None
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def markup(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens stand for them, a template's."""
        self._inner.encode_special_tokens = False
        try:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        finally:
            self._inner.encode_special_tokens = True

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides on ids: what two tokenizers that encode alike share."""
        told = json.loads(self.to_json())
        for name in ("version", "truncation", "padding", "post_processor", "decoder"):
            told.pop(name, None)
        text = json.dumps(told, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; none for the end-of-text token and its like."""
        byte_of = _byte_of()
        added = self._inner.get_added_tokens_decoder()
        size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        table = [b""] * size
        for id in range(size):
            token = self._inner.id_to_token(id)
            if id in added:
                table[id] = b"" if added[id].special else token.encode()
            elif token is not None:
                table[id] = bytes(byte_of[c] for c in token)
        return table

    def name(self, id: int) -> str | None:
        """What the vocabulary calls an id: of a special token its name, as <|endoftext|>."""
        name = self._inner.id_to_token(id)
        return None if name is None else str(name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, character by whole character.

        A token may end within a UTF-8 character; its bytes are held back until the rest comes.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        table = self.token_bytes
        for id in ids:
            if not 0 <= id < len(table):
                raise ValueError(
                    f"tokenizer: an id must lie in the vocabulary, 0 to {len(table) - 1}; got {id}"
                )
            if text := decoder.decode(table[id]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
