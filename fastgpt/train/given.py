"""Weights that a run begins with rather than drawing them: fine-tuning."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from fastgpt.lora import merged_weights
from fastgpt.model import GPT
from fastgpt.train import checkpoint

TOKENIZER = "tokenizer.json"


def given_model(
    source: str | os.PathLike[str], *, dropout: float = 0.0, block_size: int | None = None
) -> GPT:
    """A model to fine-tune, its weights in float32 on the CPU, all of them trainable.

    Args:
        source: a checkpoint or the folder of a run, whose LoRA is merged; or whatever
            `GPT.from_pretrained` reads: a folder, a GGUF file, a name on the Hugging Face Hub.
        dropout: the model's.
        block_size: a shorter context than the model's, in which less is computed; learned positions
            past it are left out.

    Raises:
        ValueError: it is none of these, or broken, or its context is shorter than block_size.
        ImportError: gguf or huggingface_hub is needed and not installed.
    """
    if _is_checkpoint(source):
        model, _ = checkpoint.load(source)
    else:
        model = GPT.from_pretrained(source, dtype=torch.float32)
    longest = model.config.block_size
    if block_size is not None and not 1 <= block_size <= longest:
        raise ValueError(
            f"model: block_size must be at most the {longest} of {source}; got {block_size}"
        )
    config = replace(model.config, dropout=dropout, block_size=block_size or longest)
    weights = {name: t.float() for name, t in merged_weights(model).items()}
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size].clone()
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model


def given_tokenizer(source: str | os.PathLike[str]) -> Path:
    """The tokenizer.json beside given weights, or the GGUF file that they are in.

    Raises:
        ValueError: there is none.
    """
    folder = Path(source).expanduser()
    if _is_checkpoint(source):
        return checkpoint.find(source) / TOKENIZER
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if folder.is_dir() and (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    if not folder.exists():
        try:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(str(source), TOKENIZER))
        except (ImportError, OSError, ValueError):
            pass
    raise ValueError(
        f"model: {source} must hold {TOKENIZER}, or data.tokenizer name the one it was trained"
        " with; it holds none"
    )


def _is_checkpoint(source: str | os.PathLike[str]) -> bool:
    """Whether it is a checkpoint of this library, or holds one."""
    try:
        checkpoint.model_config(checkpoint.find(Path(source).expanduser()))
    except ValueError:
        return False
    return True
