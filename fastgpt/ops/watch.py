"""Who looks on while attention runs: told of each call what went in and what came out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.ops.attention_reference import Extras


class Seen(NamedTuple):
    """One call of attention, as its path took it.

    Attributes:
        q, o: (B, Tq, H, D).
        k, v: (B, Tk, Hkv, D).
        lse: (B, H, Tq) where a kernel ran or it was asked for.
        scale: of q . k.
        left, right: how far a query sees on either side, -1 is no bound.
        extras: what else changes scores or hides keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor | None
    scale: float
    left: int
    right: int
    extras: Extras


Watcher = Callable[[Seen], None]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, watcher is told of every call of attention, but of those in a compiled graph."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(*call: object) -> None:
    """Of a call, as Seen's attributes. Nothing is computed, or kept, if nobody looks on."""
    if torch.compiler.is_compiling() or not _watchers:
        return
    for watcher in list(_watchers):
        watcher(Seen(*call))  # type: ignore[arg-type]
