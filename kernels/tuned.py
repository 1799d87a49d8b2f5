"""Tiles that were measured on the GPU at hand, in place of those of the tables in tiles.py.

There are none until `fastgpt.ops.tuning` has read the user's cache, before the first kernel on a
GPU. A tile is known by the name of the function that chooses it and by that function's arguments.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=Callable[..., Any])


@dataclass(frozen=True)
class Asked:
    """A tile that a launcher asked for: of which function, for which arguments, what it was."""

    function: str
    key: str
    tile: Any


_measured: dict[tuple[str, str], Any] = {}
_chosen: dict[tuple[Any, ...], Any] = {}  # so far: a launch has no time to choose again
_listeners: list[list[Asked]] = []


def tunable(choose: Choice, *, where: Callable[[], str]) -> Choice:
    """Let measured tiles take the place of those that a function of tiles.py chooses.

    A choice is made once for each chip, as where() names it, and the function's arguments.
    """
    signature = inspect.signature(choose)

    @functools.wraps(choose)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        asked = (choose.__name__, where(), args, *kwargs.items())
        tile = _chosen.get(asked)
        if tile is None or _listeners:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            key = ", ".join(f"{name}={value}" for name, value in bound.arguments.items())
            tile = _measured.get((choose.__name__, key)) or choose(*args, **kwargs)
            _chosen[asked] = tile
            for heard in _listeners:
                heard.append(Asked(choose.__name__, key, tile))
        return tile

    return chosen  # type: ignore[return-value]


def use_measured(tiles: Mapping[tuple[str, str], Any]) -> None:
    """From now on these tiles, by function and key, and no others that were measured."""
    _measured.clear()
    _measured.update(tiles)
    _chosen.clear()


@contextmanager
def measured(tiles: Mapping[tuple[str, str], Any]) -> Iterator[None]:
    """Inside, these tiles and no others that were measured; with {} those of the tables."""
    before = dict(_measured)
    use_measured(tiles)
    try:
        yield
    finally:
        use_measured(before)


@contextmanager
def listening() -> Iterator[list[Asked]]:
    """Inside, the tiles that launchers ask for are written down."""
    heard: list[Asked] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)
