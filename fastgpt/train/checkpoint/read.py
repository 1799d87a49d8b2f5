"""A model out of a checkpoint, by one process: to generate, to export."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastgpt import lora
from fastgpt.gguf_file import write_gguf
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.checkpoint.folder import (
    CONFIG,
    FORMAT,
    MODEL,
    TOKENIZER,
    VERSION,
    checkpoints,
    find,
    one_line,
    verify,
)  # fmt: skip

logger = logging.getLogger("fastgpt")


def load(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[GPT, Tokenizer]:
    """Read model and tokenizer from a checkpoint, or from the newest whole one in a run's folder.

    A run with LoRA gives a model with LoRA, which `fastgpt.lora.merge` makes plain.

    Raises:
        ValueError: it is no checkpoint of this library, or is damaged; the message says where.
    """
    folder = whole(folder)
    config = model_config(folder)
    with reading(folder):
        from fastgpt.train.checkpoint import tensors

        with torch.device("meta"):
            model = GPT(config)
            if adapted := read_json(folder / CONFIG).get("lora"):
                lora.rebuild(model, adapted)
        saved = tensors.index(folder / MODEL)
        dtypes = tensors.same(model.state_dict(), saved)
        weights = {
            name: torch.empty(t.shape, dtype=dtypes[name], device=device)
            for name, t in model.state_dict().items()
        }
        tensors.read(weights, folder / MODEL, saved)
        model.load_state_dict(weights, assign=True)
        tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"checkpoint: the tokenizer must fit the model's vocab_size {model.config.vocab_size};"
            f" got {tokenizer.vocab_size} ids in {folder}"
        )
    return model, tokenizer


def whole(folder: str | os.PathLike[str], training: bool = False) -> Path:
    """The checkpoint that a folder is, or the newest in it that is as it was written.

    Raises:
        ValueError: there is none.
    """
    newest = find(folder)
    if newest == Path(folder):
        model_config(newest)
        if wrong := verify(newest, training=training):
            raise ValueError(f"checkpoint: {newest} is damaged; {wrong}")
        return newest
    for candidate in checkpoints(folder):
        if (wrong := verify(candidate, training=training)) is None:
            return candidate
        logger.warning("checkpoint: %s is damaged and passed over; %s", candidate, wrong)
    raise ValueError(f"checkpoint: {folder} must hold a whole checkpoint; all are damaged")


def export(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a checkpoint's model in Hugging Face's layout: model.safetensors, config.json, and
    tokenizer.json; or as a GGUF file, llama.cpp's; with LoRA merged into its weights.

    Args:
        folder: a checkpoint, or the folder of a run, whose newest whole one is taken.
        out: a folder, made if need be; or the name of a file, which ends in .gguf.

    Raises:
        ValueError: it is no checkpoint of this library, or is damaged; the layout lacks its shape;
            its weights are int8 or int4.
        OSError: out cannot be written.
        ImportError: a GGUF file needs the package gguf, which is not installed.
    """
    model, tokenizer = load(folder)
    if (bits := model.config.quantized) is not None:
        raise ValueError(
            f"export: the weights must be floats, as other libraries read them; got {bits}; export"
            " the model that was compressed, or write these with fastgpt compress --out"
        )
    if Path(out).suffix == ".gguf":
        weights = lora.merged_weights(model)
        write_gguf(out, weights, model.config, tokenizer=tokenizer.to_json())
        return
    model.save_pretrained(out)
    tokenizer.save(Path(out) / TOKENIZER)


def model_config(folder: Path) -> GPTConfig:
    """The configuration of the model in a checkpoint.

    Raises:
        ValueError: it is no checkpoint of this library.
    """
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT or not isinstance(config.get("model"), dict):
        raise ValueError(
            f'checkpoint: {CONFIG} must say "format": "{FORMAT}"; {folder} was made by'
            " something else"
        )
    if config.get("version") != VERSION:
        raise ValueError(
            f"checkpoint: {folder} must have version {VERSION}; got {config.get('version')!r}"
        )
    with reading(folder):
        return GPTConfig(**config["model"])


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


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Say which checkpoint is broken, in one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint: {folder} is broken or foreign; {one_line(error)}") from None
