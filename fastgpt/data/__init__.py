"""Documents to batches: sources, an honest held-out part, token shards on disk, packing, steps."""

from fastgpt.data.config import DataConfig
from fastgpt.data.corpus import Corpus, Part, Shard, Tokens
from fastgpt.data.prepare import prepare
from fastgpt.data.sampler import Batch, Sampler
from fastgpt.data.text import read_text, split, unigram_bits

__all__ = [
    "Batch",
    "Corpus",
    "DataConfig",
    "Part",
    "Sampler",
    "Shard",
    "Tokens",
    "prepare",
    "read_text",
    "split",
    "unigram_bits",
]
