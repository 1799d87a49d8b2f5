"""Documents to batches: sources, an honest held-out part, token shards on disk, packing, steps."""

from fastgpt.data.config import DataConfig
from fastgpt.data.corpus import Corpus, Part, Shard
from fastgpt.data.prepare import prepare
from fastgpt.data.sampler import Batch, Sampler
from fastgpt.data.text import (
    Batches,
    Tokens,
    read_text,
    read_tokens,
    split,
    tokenize,
    unigram_bits,
    write_tokens,
)

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "Part",
    "Sampler",
    "Shard",
    "Tokens",
    "prepare",
    "read_text",
    "read_tokens",
    "split",
    "tokenize",
    "unigram_bits",
    "write_tokens",
]
