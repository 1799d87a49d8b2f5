"""A model and its tokenizer, from whatever a command is given."""

import os
from pathlib import Path

import torch

from fastgpt import lora
from fastgpt.data.config import DataConfig
from fastgpt.data.corpus import read_manifest
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint
from fastgpt.train.checkpoint.folder import SUMS, TRAIN
from fastgpt.train.given import given_tokenizer

RUN = "run.yaml"


def read_model(
    source: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    *,
    texts: bool = True,
) -> tuple[GPT, Tokenizer | None]:
    """A model to generate with, LoRA merged into its weights, and its tokenizer.

    Args:
        source: a checkpoint or the folder of a run; or what `GPT.from_pretrained` takes: a folder,
            a GGUF file, a name on the Hugging Face Hub.
        tokenizer: a tokenizer.json; that of source if None.
        device: where the model is to be.
        texts: whether there must be a tokenizer; if not, it is None where none can be read.

    Raises:
        ValueError: it is none of these, or is broken, has no tokenizer, or the two do not fit.
        OSError: a file cannot be read.
    """
    own: Tokenizer | None = None
    if _is_run(source):
        model, own = checkpoint.load(source, device)
    else:
        model = GPT.from_pretrained(source).to(device)
    if tokenizer is not None:
        own = Tokenizer.load(tokenizer)
    elif own is None:
        try:
            own = Tokenizer.load(given_tokenizer(source))
        except (ValueError, ImportError) as error:
            if texts:
                raise ValueError(
                    f"generate: text needs a tokenizer, and {source} has none that can be read;"
                    f" name a tokenizer.json, or give ids ({error})"
                ) from None
    if any(lora.layers(model)):
        lora.merge(model)
    if model.dtype == torch.float16 and torch.device(device).type == "cpu":
        model.float()  # which a CPU computes faster and all of it
    if own is not None and own.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"model: the tokenizer must fit the vocab_size of {source},"
            f" {model.config.vocab_size}; it has {own.vocab_size} ids"
        )
    return model.eval(), own


def turn_of(source: str | os.PathLike[str]) -> str:
    """How a message of a chat is written: as in the data of a run, where source is one's; else as
    `DataConfig` has it."""
    default = DataConfig().turn
    if not _is_run(source):
        return default
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        return default
    run = checkpoint.find(Path(source).expanduser()).resolve().parent / RUN
    try:
        data = yaml.safe_load(run.read_text(encoding="utf-8"))["data"]
        if len(data["files"]) == 1 and Path(data["files"][0]).is_dir():
            data = read_manifest(Path(data["files"][0]))["asked"]
        return str(data["turn"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return default


def _is_run(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a checkpoint, or is one, be it broken."""
    folder = Path(source).expanduser()
    marks = (TRAIN, SUMS)
    return any((folder / name).exists() for name in marks) or bool(checkpoint.checkpoints(folder))
