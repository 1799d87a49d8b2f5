"""Checkpoints: folders that are written whole or not at all, and never run code when read.

    out/latest                 the name of the newest checkpoint, replaced in one step
    out/step-00001000/
        config.json            format, version, the model's configuration
        model.safetensors      weights, under the model's own names
        tokenizer.json
        optimizer.safetensors  moments and step counts: exp_avg.<parameter>, ...
        train.json             step, seconds, the run's configuration

A checkpoint is made in a hidden folder beside, forced to disk, and renamed; only then does
`latest` name it, and only then are older ones hidden and removed. A process killed at any moment
leaves the last complete one in place, and no torn one in sight.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer

FORMAT, VERSION = "fastgpt", 1
STEP = re.compile(r"step-\d{8,}(\.\d+)?")
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def save(
    out: str | os.PathLike[str],
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint into the folder out and make it the latest.

    Args:
        out: a folder; made if need be.
        step: names the checkpoint.
        model, tokenizer: what to keep.
        optimizer, state: what else training needs to go on; state is JSON.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full, the folder cannot be written; no part of a checkpoint is left.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    name = f"step-{step:08d}"
    final = next(p for p in _names(out / name) if not p.exists())
    part = out / f".{final.name}.{os.getpid()}"
    try:
        part.mkdir()
        weights = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
        save_file(weights, part / MODEL, metadata={"format": "pt"})
        config = {"format": FORMAT, "version": VERSION, "model": asdict(model.config)}
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(part / "tokenizer.json")
        if optimizer is not None:
            save_file(_optimizer_tensors(model, optimizer), part / OPTIMIZER)
        if state is not None:
            text = json.dumps(state, indent=2) + "\n"
            (part / "train.json").write_text(text, encoding="utf-8")
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        os.rename(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    pointer = out / f".latest.{os.getpid()}"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _sync(pointer)
    os.replace(pointer, out / "latest")
    _sync(out)
    for old in out.iterdir():
        if STEP.fullmatch(old.name) and old != final:
            hidden = out / f".{old.name}.old"  # what can be seen is whole
            os.rename(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    return final


def find(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint that a folder is, or the latest that it holds.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if (latest := _latest(folder)) is not None:
        return latest
    what = "got a folder without one" if folder.is_dir() else "there is no such folder"
    raise ValueError(f"checkpoint: {folder} must be a checkpoint or hold one; {what}")


def load(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[GPT, Tokenizer]:
    """Read model and tokenizer from a checkpoint, or from the latest in a run's folder.

    Raises:
        ValueError: it is no checkpoint of this library, or is damaged; the message says where.
    """
    folder = find(folder)
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT or not isinstance(config.get("model"), dict):
        raise ValueError(
            f'checkpoint: config.json must say "format": "{FORMAT}"; {folder} was made by'
            " something else"
        )
    if config.get("version") != VERSION:
        raise ValueError(
            f"checkpoint: {folder} must have version {VERSION}; got {config.get('version')!r}"
        )
    with _reading(folder):
        with torch.device("meta"):
            model = GPT(GPTConfig(**config["model"]))
        weights = _tensors(folder / MODEL, device)
        _same_names(folder / MODEL, model.state_dict(), weights)
        model.load_state_dict(weights, assign=True)
        for p in model.parameters():
            p.requires_grad_()
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"checkpoint: the tokenizer must fit the model's vocab_size {model.config.vocab_size};"
            f" got {tokenizer.vocab_size} ids in {folder}"
        )
    return model, tokenizer


def load_optimizer(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments into a new optimizer of the model's parameters."""
    with _reading(folder):
        tensors = _tensors(folder / OPTIMIZER, "cpu")
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            muon = f"momentum_buffer.{name}" in tensors
            keys = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")
            for key in keys:
                state[key] = tensors[f"{key}.{name}"].to(p.device)
            if state[keys[0]].shape != p.shape:
                raise ValueError(f"{OPTIMIZER} has another shape for {name}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        ValueError: there is no such file, or no such object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"checkpoint: {path} cannot be read; {error.strerror}") from None
    except ValueError:
        raise ValueError(f"checkpoint: {path} must be JSON; it is not") from None
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {path} must be a JSON object; got {type(value).__name__}")
    return value


def _names(path: Path) -> Iterator[Path]:
    yield path
    n = 1
    while True:
        yield path.with_name(f"{path.name}.{n}")
        n += 1


def _latest(out: Path) -> Path | None:
    try:
        name = (out / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = out / name
    return folder if folder.parent == out and (folder / "config.json").is_file() else None


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().contiguous().cpu()
    return tensors


def _tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    return load_file(path, device=str(device))


def _same_names(path: Path, want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
        raise ValueError(f"{path.name} must hold the model's weights; it {what}")
    for name, tensor in want.items():
        if tensor.shape != got[name].shape or not got[name].dtype.is_floating_point:
            raise ValueError(
                f"{path.name} must hold {name} as {tuple(tensor.shape)}; got"
                f" {got[name].dtype} {tuple(got[name].shape)}"
            )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say which checkpoint is broken, in one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {folder} is broken or foreign; {reason}") from None


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
