"""The user's cache of measured tiles: what `fastgpt tune` wrote, read before the first kernel.

One JSON file. A set of tiles is for one GPU, one Triton and one fastgpt by name and version, and
is used with just these:

    {"fastgpt tiles": 1, "sets": [{"gpu": ..., "triton": ..., "fastgpt": ..., "tiles": [
        {"function": "layer_norm_tile", "key": "N=768, backward=False, dropout=False",
         "tile": {"type": "Tile", "block_m": 2, ...}, "seconds": ..., "default_seconds": ...}]}]}
"""

import json
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def versions(gpu: str) -> dict[str, str]:
    """What a set of tiles is for."""
    import triton

    from fastgpt import __version__

    return {"gpu": gpu, "triton": triton.__version__, "fastgpt": __version__}


def encode(tile: Any) -> dict[str, Any]:
    """A tile, or several in one, for JSON."""
    made: dict[str, Any] = {"type": type(tile).__name__}
    for f in fields(tile):
        value = getattr(tile, f.name)
        made[f.name] = encode(value) if is_dataclass(value) else value
    return made


def decode(said: dict[str, Any]) -> Any:
    """The tile that `encode` wrote.

    Raises:
        ValueError: it is none; says why.
    """
    from fastgpt.kernels import tiles

    if not isinstance(said, dict):
        raise ValueError(f"a tile must be an object; got {said!r}")
    kind = getattr(tiles, str(said.get("type")), None)
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise ValueError(f"there is no tile of type {said.get('type')!r}")
    values: dict[str, Any] = {}
    for name, value in said.items():
        if name == "type":
            continue
        if isinstance(value, dict):
            value = decode(value)
        elif name == "descriptors":
            if type(value) is not bool:
                raise ValueError(f"{name} must be true or false; got {value!r}")
        elif name != "basis" and (type(value) is not int or not 0 < value <= 1 << 20):
            raise ValueError(f"{name} must be a positive number; got {value!r}")
        values[name] = value
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"a {kind.__name__} has other fields; {error}") from None


def read(path: Path) -> list[dict[str, Any]]:
    """The sets of a cache; none if there is no file.

    Raises:
        ValueError: the file is no cache of this format, or a tile in it is none.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or said.get("fastgpt tiles") != FORMAT:
            raise ValueError(f"it is not a file of fastgpt's tiles, format {FORMAT}")
        for one in said["sets"]:
            for name in ("gpu", "triton", "fastgpt"):
                if not isinstance(one[name], str):
                    raise ValueError(f"{name} must be a name; got {one[name]!r}")
            for row in one["tiles"]:
                if not isinstance(row["function"], str) or not isinstance(row["key"], str):
                    raise ValueError(f"function and key must be names; got {row!r}")
                decode(row["tile"])
        sets: list[dict[str, Any]] = said["sets"]
        return sets
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"tune: {path} cannot be used; {why}") from None


def measured_for(sets: list[dict[str, Any]], gpu: str) -> dict[tuple[str, str], Any]:
    """The tiles of the set for a GPU, this Triton and this fastgpt, by function and key."""
    wanted = versions(gpu)
    return {
        (row["function"], row["key"]): decode(row["tile"])
        for one in sets
        if {name: one[name] for name in wanted} == wanted
        for row in one["tiles"]
    }


def load(path: Path) -> None:
    """Use what was measured on the current GPU; a file that is broken is ignored, with a warning.

    Where a process has several kinds of GPU, those of the first that runs a kernel are used.
    """
    from fastgpt.kernels import tuned

    try:
        sets = read(path)
        tuned.use_measured(measured_for(sets, torch.cuda.get_device_name()))
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; kernels use the tiles of fastgpt's tables", stacklevel=2)
