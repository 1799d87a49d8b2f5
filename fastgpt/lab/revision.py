"""Kernels as they were at a commit: the repository at that commit, unpacked beside."""

import atexit
import functools
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import fastgpt
from fastgpt.lab.launch import split


def _git(folder: Path, *words: str) -> bytes:
    """What git prints.

    Raises:
        ValueError: git is missing, or fails; says why.
    """
    try:
        made = subprocess.run(["git", "-C", str(folder), *words], capture_output=True)
    except FileNotFoundError:
        raise ValueError("lab: git is needed for NAME@REVISION; it was not found") from None
    if made.returncode != 0:
        why = made.stderr.decode(errors="replace").strip().splitlines() or ["nothing found"]
        raise ValueError(f"lab: git {' '.join(words)}, in {folder}: {why[-1]}")
    return made.stdout


@functools.cache
def _unpacked(root: Path, commit: str) -> Path:
    """The tree of a commit in a folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fastgpt-lab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", commit))) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _at(path: Path, commit: str) -> Path:
    root = Path(_git(path.parent, "rev-parse", "--show-toplevel").decode().strip()).resolve()
    exact = _git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    found = _unpacked(root, exact) / path.relative_to(root)
    if not found.exists():
        raise ValueError(f"lab: {path.relative_to(root)} is not in {commit}")
    return found


def kernel(reference: str, commit: str) -> str:
    """ "file.py:function" as the same function of the file at a commit.

    Raises:
        ValueError: the file is in no git repository, or not in that commit.
    """
    where, function = split(reference)
    if not where.endswith(".py"):
        raise ValueError(f"lab: a kernel at a revision is named by its file; got {reference!r}")
    return f"{_at(Path(where).resolve(), commit)}:{function}"


def own_kernels(commit: str) -> str:
    """The folder of fastgpt's own kernels at a commit of its repository."""
    folder = (Path(fastgpt.__file__).parent / "kernels").resolve()
    return str(_at(folder, commit))


@contextmanager
def taken(folder: str | None) -> Iterator[None]:
    """Inside, `fastgpt.kernels` is imported from folder; None changes nothing."""
    if folder is None:
        yield
        return
    before = {n: m for n, m in sys.modules.items() if n.startswith("fastgpt.kernels")}
    take(folder)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.startswith("fastgpt.kernels")]:
            del sys.modules[name]
        sys.modules |= before


def take(folder: str) -> None:
    """Import `fastgpt.kernels` from folder from now on."""
    for name in [n for n in sys.modules if n.startswith("fastgpt.kernels")]:
        del sys.modules[name]
    package = ModuleType("fastgpt.kernels")
    package.__path__ = [folder]
    sys.modules["fastgpt.kernels"] = package
    setattr(fastgpt, "kernels", package)  # noqa: B010
