"""The folder of a run and those of its checkpoints: names, order, sums, what is kept."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

FORMAT, VERSION = "fastgpt", 2
CONFIG, TOKENIZER, TRAIN, SUMS = "config.json", "tokenizer.json", "train.json", "SHA256SUMS"
MODEL, OPTIMIZER = "model", "optimizer"
_STEP = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_SUM = re.compile(r"([0-9a-f]{64})  ([\w.-]+(?:/[\w.-]+)?)")  # one folder deep at most


def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a run's folder, the newest first, whether or not they are whole."""
    try:
        found = [p for p in Path(out).iterdir() if _STEP.fullmatch(p.name)]
    except OSError:
        return []
    return sorted(found, key=_order, reverse=True)


def _order(checkpoint: Path) -> tuple[int, int]:
    """Its step, and how often that was saved before."""
    match = _STEP.fullmatch(checkpoint.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def find(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint that a folder is, or the newest that it holds; `verify` tells if it is whole.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return folder
    if found := checkpoints(folder):
        return found[0]
    what = "got a folder without one" if folder.is_dir() else "there is no such folder"
    raise ValueError(f"checkpoint: {folder} must be a checkpoint or hold one; {what}")


def best(out: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the lowest held-out loss in a run's folder, if any has one."""
    return _best(checkpoints(out))


def _best(among: Iterable[Path]) -> Path | None:
    losses = {p: loss for p in among if (loss := _loss(p)) is not None}
    return min(losses, key=losses.__getitem__, default=None)


def _loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / TRAIN).read_text(encoding="utf-8")).get("held_out_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(loss) if isinstance(loss, int | float) else None


def verify(
    checkpoint: str | os.PathLike[str], rank: int = 0, world: int = 1, training: bool = True
) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if each file is as it was written.

    Args:
        checkpoint: its folder.
        rank, world: read only every world-th file, from the rank-th on, as one of many who share
            the work.
        training: also what only training needs, the optimizer and train.json.
    """
    checkpoint = Path(checkpoint)
    try:
        sums = _read_sums(checkpoint / SUMS)
        if unknown := sorted(_files(checkpoint) - sums.keys() - {SUMS}):
            return f"{SUMS} lacks {unknown[0]}"
        for name in (CONFIG, TOKENIZER):
            if name not in sums:
                return f"{SUMS} lacks {name}"
        if not training:
            sums = {k: v for k, v in sums.items() if k != TRAIN and Path(k).parts[0] != OPTIMIZER}
        for name in sorted(sums)[rank::world]:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != sums[name]:
                return f"{name} does not match {SUMS}"
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


def _files(checkpoint: Path) -> set[str]:
    """Names of files within, as the sums have them; hidden ones are the file manager's."""
    found = (p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
    return {p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)}


def _read_sums(path: Path) -> dict[str, str]:
    text = path.read_bytes().decode()
    sums = {m[2]: m[1] for line in text.split("\n") if (m := _SUM.fullmatch(line))}
    if _sums_text(sums) != text:
        raise ValueError(f"{SUMS} is not as it was written")
    return sums


def _sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_sums(checkpoint: Path, sums: dict[str, str]) -> None:
    (checkpoint / SUMS).write_bytes(_sums_text(sums).encode())


def begin(out: Path, step: int) -> Path:
    """A new hidden folder to make a checkpoint in; what torn saves have left is removed."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    name, n = f"step-{step:08d}", 0
    while (out / name).exists():
        n += 1
        name = f"step-{step:08d}.{n}"
    part = out / f".{name}"
    part.mkdir()
    return part


def commit(part: Path) -> Path:
    """Force a finished folder to disk and give it its name."""
    for path in (*part.rglob("*"), part):
        _sync(path)
    final = part.with_name(part.name.removeprefix("."))
    os.rename(part, final)
    _sync(final.parent)
    return final


def prune(newest: Path, keep: int, keep_best: bool, bad: Collection[Path]) -> None:
    """Remove the checkpoints beside the newest that need not be kept, and the bad ones.

    Others of its step and of later ones are of a run that was given up: this one has begun again
    before them.
    """
    found = checkpoints(newest.parent)
    before = [p for p in found if _order(p)[0] < _order(newest)[0] and p not in bad]
    good = [newest, *before]
    kept = {*good[:keep], _best(good) if keep_best else None}
    for old in found:
        if old not in kept:
            hidden = old.with_name(f".{old.name}.old")  # what can be seen is whole
            os.rename(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def dump(value: Any) -> str:
    """JSON, as the files of a checkpoint have it."""
    return json.dumps(value, indent=2) + "\n"


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror}"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
