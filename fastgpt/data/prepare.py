"""Text to token shards on disk, one shard in memory at a time; stopped at any moment it goes on.

The stream of documents is a function of the files, the configuration and the seed, and a shard is a
stretch of it. So one that is there already need not be made again: the stream is read past it.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.config import DataConfig
from fastgpt.data.corpus import (
    HELD_OUT,
    MANIFEST,
    PARTS,
    TOKENIZER,
    TRAIN,
    VERSION,
    Corpus,
    check_file,
    file_digest,
    read_manifest,
)
from fastgpt.data.division import Divided, Division, divided
from fastgpt.data.documents import Document, Source, format_of, size_of
from fastgpt.tokenizer import Tokenizer

PROGRESS = "progress.jsonl"  # what is prepared, then a line a shard
BATCH = 2**21  # bytes of text that are encoded at once
FREE = ("packing",)  # of a configuration: of no matter to the shards


def prepare(
    config: DataConfig, out: str | os.PathLike[str], seed: int = 0, progress: bool = True
) -> Corpus:
    """Read documents, divide them, train a tokenizer on the training part, and write token shards.

    What was begun in out and stopped, by a kill as well, is gone on with; a finished corpus of the
    same files and configuration is opened as it is. A second process waits for the first.

    Args:
        config: of the data. If config.files is one folder with a finished corpus, it is opened.
        out: the folder of the corpus.
        seed: of the division.
        progress: whether to show a bar on standard error.

    Raises:
        ValueError: a file is no such data, the data is too little to hold some of it out, or out
            holds a corpus that was prepared from something else.
        OSError: a file cannot be read or written.
        ImportError: the package tokenizers, tqdm or datasets is needed and not installed.
    """
    if not config.files:
        raise ValueError("data: files must name at least one; got none")
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    if len(config.files) == 1 and (Path(config.files[0]) / MANIFEST).is_file():
        return Corpus.open(config.files[0], tokenizer)
    for name in config.sources:
        if not (Path(out) / MANIFEST).is_file():
            size_of(config, name)  # before anything is made
    Path(out).mkdir(parents=True, exist_ok=True)
    with _alone(Path(out)):
        return _Preparation(config, Path(out), seed, tokenizer, progress).run()


class _Preparation:
    """One call of prepare."""

    def __init__(
        self, config: DataConfig, out: Path, seed: int, tokenizer: Tokenizer | None, progress: bool
    ) -> None:
        self.config, self.out, self.seed, self.tokenizer = config, out, seed, tokenizer
        self.progress = progress
        self.sizes: list[int | None] = []
        self.changed: list[int] = []  # when each file was, in ns
        settings = {k: v for k, v in asdict(config).items() if k not in FREE}
        if tokenizer is not None:
            settings |= {"tokenizer": tokenizer.fingerprint, "vocab_size": None}
        self.asked: dict[str, Any] = json.loads(json.dumps({**settings, "seed": seed}))

    def run(self) -> Corpus:
        if (self.out / MANIFEST).is_file():
            self._compare(read_manifest(self.out))
            return Corpus.open(self.out, self.tokenizer)
        self.sizes = [size_of(self.config, name) for name in self.config.sources]
        self.changed = [
            0 if size is None else Path(name).stat().st_mtime_ns
            for name, size in zip(self.config.sources, self.sizes, strict=True)
        ]
        done = self._begun()
        tokenizer = self._tokenizer()
        division, sources = self._division(), self._sources()
        shards = _Shards(self.out, tokenizer, done, self.config.shard_bytes)
        for one in self._documents(division, sources, "tokens"):
            shards.add(one)
        entries = shards.finish()
        self._write_manifest(tokenizer, entries, division, sources)
        (self.out / PROGRESS).unlink()
        return Corpus.open(self.out)

    def _compare(self, told: dict[str, Any]) -> None:
        """Raise unless a finished corpus is what is asked for."""
        for name, value in self.asked.items():
            if told["asked"].get(name) != value:
                raise ValueError(
                    f"data: {self.out} holds a corpus prepared with {name}"
                    f" {told['asked'].get(name)!r}; got {value!r}; name another folder"
                )
        for source in told["sources"]:
            path = Path(source["name"])
            if format_of(self.config, source["name"]) == "dataset" or not path.is_file():
                continue  # not to be had here any more: the corpus is
            now = path.stat()
            same = now.st_size == source["read"] and (
                now.st_mtime_ns == source["changed"] or file_digest(path) == source["sha256"]
            )
            if not same:
                raise ValueError(
                    f"data: {source['name']} changed since {self.out} was prepared from it; name"
                    " another folder"
                )

    def _begun(self) -> list[dict[str, Any]]:
        """The shards that are there of a preparation of the same; what is of another is deleted."""
        path = self.out / PROGRESS
        head = json.dumps({"asked": self.asked, "sizes": self.sizes, "changed": self.changed})
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        done: list[dict[str, Any]] = []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    shard = json.loads(line)
                    for entry in shard["made"]:
                        for name, facts in entry["files"].items():
                            check_file(self.out / name, facts, verify=True)
                except (ValueError, KeyError, TypeError):
                    break  # cut short by a kill, or never wholly on the disk
                done.append(shard)
        kept = {name for shard in done for entry in shard["made"] for name in entry["files"]}
        for pattern in (*(f"{part}-*.npy" for part in PARTS), ".*.part"):
            for file in self.out.glob(pattern):
                if file.name not in kept:
                    file.unlink()
        if not lines or lines[0] != head:
            (self.out / TOKENIZER).unlink(missing_ok=True)
        text = "".join(line + "\n" for line in [head, *map(json.dumps, done)])
        write_whole(path, text.encode())
        return done

    def _tokenizer(self) -> Tokenizer:
        path = self.out / TOKENIZER
        if path.is_file():
            return Tokenizer.load(path)
        tokenizer = self.tokenizer
        if tokenizer is None:
            stream = self._documents(self._division(), self._sources(), "tokenizer")
            texts = (
                segment.text
                for one in stream
                if not one.held_out
                for segment in one.document
                if not segment.markup
            )
            tokenizer = Tokenizer.train(texts, self.config.vocab_size)
        write_whole(path, tokenizer.to_json().encode())
        return tokenizer

    def _division(self) -> Division:
        text = [
            size or 0
            for name, size in zip(self.config.sources, self.sizes, strict=True)
            if format_of(self.config, name) == "text"
        ]
        return Division(self.config, self.seed, sum(text))

    def _sources(self) -> list[Source]:
        return [Source(name) for name in self.config.sources]

    def _documents(self, division: Division, sources: list[Source], what: str) -> Iterator[Divided]:
        """All documents, with a bar of the bytes read."""
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(
                "data: needs the package tqdm; pip install 'fastgpt-triton[train]'"
            ) from None
        total = None if None in self.sizes else sum(size or 0 for size in self.sizes)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=what, leave=False, file=sys.stderr,
            disable=not self.progress, mininterval=0.2 if sys.stderr.isatty() else 15.0, delay=1.0,
        ) as bar:  # fmt: skip
            yield from divided(
                self.config, division, sources,
                lambda: bar.update(sum(source.read for source in sources) - bar.n),
            )  # fmt: skip

    def _write_manifest(
        self, tokenizer: Tokenizer, entries: list[dict[str, Any]], division: Division,
        sources: list[Source],
    ) -> None:  # fmt: skip
        counts = {
            part: {
                key: sum(e[key] for e in entries if e["part"] == part)
                for key in ("documents", "tokens", "learned", "bytes")
            }
            for part in PARTS
        }
        for part, name in ((TRAIN, "training"), (HELD_OUT, "held-out")):
            if not counts[part]["tokens"]:
                raise ValueError(
                    "data: there must be enough to hold some of it out, and to train on; got no"
                    f" {name} part of {sum(c['documents'] for c in counts.values())} documents"
                )
        told = {
            "version": VERSION,
            "asked": self.asked,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "sources": [
                {
                    "name": source.name,
                    "read": source.read,
                    "changed": changed,
                    "sha256": source.digest.hexdigest(),
                }
                for source, changed in zip(sources, self.changed, strict=True)
            ],
            "repeats_dropped": division.dropped,
            "counts": counts,
            "shards": entries,
        }
        write_whole(self.out / MANIFEST, json.dumps(told, indent=1, ensure_ascii=False).encode())


class _Shards:
    """Writes documents as shards, but for those that are there already.

    Args:
        out: the folder.
        tokenizer: of the ids.
        done: what is told of the shards that are there.
        size: bytes of text after which a shard ends, both parts together.
    """

    def __init__(
        self, out: Path, tokenizer: Tokenizer, done: list[dict[str, Any]], size: int
    ) -> None:
        self.out, self.tokenizer, self.size = out, tokenizer, size
        self.entries = [entry for shard in done for entry in shard["made"]]
        self._there = len(done)
        self.number, self._bytes = 0, 0
        self._waiting: list[Divided] = []
        self._waiting_bytes = 0
        self._parts = {name: _Growing() for name in PARTS}
        self._dtype = np.uint16 if len(tokenizer.token_bytes) <= 2**16 else np.uint32
        self._markup = lru_cache(maxsize=256)(tokenizer.markup)

    def add(self, one: Divided) -> None:
        n = sum(len(segment.text.encode()) for segment in one.document)
        if self.number >= self._there:
            self._waiting.append(one)
            self._waiting_bytes += n
            if self._waiting_bytes >= BATCH:
                self._encode()
        self._bytes += n
        if self._bytes >= self.size:
            self._end()

    def finish(self) -> list[dict[str, Any]]:
        """Write what is left; what is told of all shards."""
        self._end()
        return self.entries

    def _encode(self) -> None:
        plain = [s.text for one in self._waiting for s in one.document if not s.markup]
        encoded = iter(self.tokenizer.encode_all(plain))
        for document, held_out in self._waiting:
            ids = [self._markup(s.text) if s.markup else next(encoded) for s in document]
            self._parts[HELD_OUT if held_out else TRAIN].add(
                document, ids, self.tokenizer.eos, self._dtype
            )
        self._waiting, self._waiting_bytes = [], 0

    def _end(self) -> None:
        if self.number >= self._there:
            self._encode()
            made = []
            for part, growing in self._parts.items():
                if growing.ends:
                    name = f"{part}-{self.number:05d}"
                    made.append({"part": part, **growing.write(self.out, name)})
            self._parts = {name: _Growing() for name in PARTS}
            self._note(made)
            self.entries += made
        self.number, self._bytes = self.number + 1, 0

    def _note(self, made: list[dict[str, Any]]) -> None:
        with open(self.out / PROGRESS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"made": made}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class _Growing:
    """A shard that grows."""

    def __init__(self) -> None:
        self.tokens: list[npt.NDArray[Any]] = []
        self.learn: list[npt.NDArray[np.bool_]] = []
        self.ends: list[int] = []
        self.bytes = 0

    def add(self, document: Document, ids: list[list[int]], eos: int | None, dtype: type) -> None:
        """Append a document by the ids of its segments, and the end of text if there is one."""
        flags = [np.full(len(i), s.learn) for i, s in zip(ids, document, strict=True)]
        if eos is not None:
            ids, flags = [*ids, [eos]], [*flags, np.ones(1, np.bool_)]
        tokens = np.concatenate([np.array(i, dtype) for i in ids])
        self.tokens.append(tokens)
        self.learn.append(np.concatenate(flags))
        self.ends.append(len(tokens) + (self.ends[-1] if self.ends else 0))
        self.bytes += sum(len(segment.text.encode()) for segment in document)

    def write(self, out: Path, name: str) -> dict[str, Any]:
        """Write the arrays, each file whole or not at all; what is told of them."""
        learn = np.concatenate(self.learn)
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": np.concatenate(self.tokens),
            "ends": np.array(self.ends, np.int64),
        }
        if not learn.all():
            arrays["learn"] = np.packbits(learn)
        files = {}
        for kind, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            data = file.getvalue()
            write_whole(out / f"{name}.{kind}.npy", data)
            digest = hashlib.sha256(data).hexdigest()
            files[f"{name}.{kind}.npy"] = {"size": len(data), "sha256": digest}
        return {
            "tokens": len(learn), "documents": len(self.ends), "learned": int(learn.sum()),
            "bytes": self.bytes, "files": files,
        }  # fmt: skip


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within, no other process prepares in this folder; it waits."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(out / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
