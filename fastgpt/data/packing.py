"""Documents into rows of one length with little padding, and none cut that fits in one.

Documents of one length are placed together, from the longest: each group goes to the rows with the
least room that it fits, so the work grows with the number of lengths, not of documents.

Krell et al., Efficient sequence packing without cross-contamination, 2021,
https://arxiv.org/abs/2107.02027, section 3 (there in another order: first the most room); best fit
first as in Ding et al., Fewer truncations improve language modeling, 2024,
https://arxiv.org/abs/2404.10830.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Kind = tuple[int, tuple[int, ...]]  # so many rows, each of stretches of these lengths


@dataclass(frozen=True)
class Packing:
    """Which stretches of the tokens make up each row.

    Attributes:
        rows: (R + 1,) row r has the stretches rows[r] .. rows[r + 1] - 1.
        starts: (S,) the first token of each stretch.
        lengths: (S,) how many tokens it has; those of a row are at most T together.
    """

    rows: Ints
    starts: Ints
    lengths: Ints


def stretches(ends: Ints, T: int) -> tuple[Ints, Ints]:
    """Documents as stretches of at most T inputs: their first tokens, and their lengths.

    A document of L tokens has L - 1 inputs, each with the token after it as its target. One of more
    than T is cut.

    Args:
        ends: (documents,) where each ends.
        T: inputs of a row.
    """
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    inputs = np.maximum(0, ends - begins - 1)
    parts = -(-inputs // T)  # how many of each document
    of = np.repeat(np.arange(len(ends)), parts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = begins[of] + number * T
    return starts, np.minimum(T, ends[of] - 1 - starts)


def pack(starts: Ints, lengths: Ints, T: int) -> Packing:
    """Fill rows of T with stretches.

    Args:
        starts: (S,) first tokens.
        lengths: (S,) in [1, T].
        T: of a row.
    """
    counts = np.bincount(lengths, minlength=T + 1)
    kinds: dict[int, list[Kind]] = {T: []}  # by the room that is left
    rooms = [T]  # those of kinds, sorted
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room = rooms[bisect_left(rooms, length)]
            # New rows take the place of the empty ones, of which there is no end.
            number, held = kinds[room].pop() if kinds[room] else (left, ())
            each = min(room // length, left)  # in one row: none has less room that fits
            used = min(number, left // each)
            if held and used < number:
                kinds[room].append((number - used, held))
            if not kinds[room] and room != T:
                del kinds[room]
                rooms.remove(room)
            rest = room - each * length
            if rest not in kinds:
                kinds[rest] = []
                insort(rooms, rest)
            kinds[rest].append((used, held + (length,) * each))
            left -= used * each
    return _laid_out(kinds, starts, lengths)


def _laid_out(kinds: dict[int, list[Kind]], starts: Ints, lengths: Ints) -> Packing:
    """Give each row of each kind stretches of the lengths it holds, in the order they come."""
    order = np.argsort(lengths, kind="stable")
    first = np.searchsorted(lengths[order], np.arange(int(lengths.max(initial=0)) + 2))
    taken = first.copy()  # how far the stretches of each length are given away
    widths, chosen = [], []
    for room in sorted(kinds):
        for number, held in kinds[room]:
            block = np.empty((number, len(held)), np.int64)
            for column, length in enumerate(held):
                at = taken[length]
                block[:, column] = order[at : at + number]
                taken[length] = at + number
            chosen.append(block.ravel())
            widths.append(np.full(number, len(held)))
    picked = np.concatenate([np.empty(0, np.int64), *chosen])
    rows = np.concatenate([np.zeros(1, np.int64), *widths]).cumsum()
    return Packing(rows, starts[picked], lengths[picked])
