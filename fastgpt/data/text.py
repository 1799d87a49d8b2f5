"""Texts in memory: read, divided into two parts, and what their symbols' frequencies tell."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.config import DataConfig
from fastgpt.data.division import Division
from fastgpt.data.documents import Source, cut, text_of


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: the file is empty, or not UTF-8 text; the message names the first bad byte.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return "".join(text_of(Source(str(path)), file))


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
    config = DataConfig(held_out=held_out)
    total = sum(map(len, documents))
    division = Division(config, seed, total)
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        for (segment,), part in division.text(cut(document)):
            parts[part].append(segment.text)
    if not all(parts):
        raise ValueError(
            f"split: a text must be long enough to hold some of it out; got {total} characters"
        )
    return parts


def unigram_bits(train: npt.NDArray[Any], held_out: npt.NDArray[Any], vocab_size: int) -> float:
    """Bits a symbol of held_out under the frequencies of train, each count raised by one."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[held_out].mean())
