"""GPT.from_pretrained and GPT.save_pretrained: folders in Hugging Face's layout, and GGUF files.

A folder holds config.json and the weights: model.safetensors, or the shards that
model.safetensors.index.json lists, or the same as pytorch_model.bin, of which nothing but tensors
is unpickled. A name that is no path is a model's on the Hugging Face Hub, whose files the package
huggingface_hub fetches. `fastgpt.layouts` has the names of the weights.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.gguf_file import first_line, read_gguf
from fastgpt.layouts import Layout, shape_from, shape_to, weights_from, weights_to
from fastgpt.lora import merged_weights
from fastgpt.model import GPT, GPTConfig

Find = Callable[[str], Path | None]  # a file of the folder by its name, if it is there


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
) -> GPT:
    """See `GPT.from_pretrained`."""
    where = str(source)
    local = Path(source).expanduser()
    layout: Layout = "gguf"
    if local.is_file():
        shape, theirs = read_gguf(local)
    else:
        find = _folder(local) if local.is_dir() else _hub(source, revision)
        layout, shape, theirs = _read(find, where)
    try:
        config = GPTConfig(**shape | {"dropout": dropout})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {where} is of a shape that GPT lacks; {error}"
        ) from None
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    weights = weights_from(theirs, config, shapes, layout, where)
    model.load_state_dict(weights, assign=True)
    if dtype is not None:
        model.to(dtype)
    for p in model.parameters():
        p.requires_grad_()
    return model.eval()


def save_pretrained(model: GPT, folder: str | os.PathLike[str], own: bool = False) -> None:
    """See `GPT.save_pretrained`."""
    folder = Path(folder).expanduser()
    ours = {name: t.detach().cpu() for name, t in merged_weights(model).items()}
    if model.config.quantized is None and not own:
        config, weights = shape_to(model.config), weights_to(ours, model.config)
    else:
        config = asdict(model.config) | {"model_type": "fastgpt"}
        config["tie_word_embeddings"] = config.pop("tied")
        weights = {f"gpt.{name}": t.contiguous() for name, t in ours.items()}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".save_pretrained.", dir=folder))
    try:
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (part / "config.json").write_text(text, encoding="utf-8")
        for name in ("model.safetensors", "config.json"):
            os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part)


def _folder(path: Path) -> Find:
    def find(name: str) -> Path | None:
        return path / name if (path / name).is_file() else None

    return find


def _hub(source: str | os.PathLike[str], revision: str | None) -> Find:
    """Files of a model on the Hugging Face Hub, or in its cache."""
    if isinstance(source, os.PathLike) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(f"from_pretrained: {source} cannot be read; No such file or directory")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise ImportError(
            f"from_pretrained: {source} is no folder or file here, and a name on the Hugging Face"
            " Hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from None

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(str(source), name, revision=revision))
        except EntryNotFoundError as error:  # of which being offline is a kind
            if isinstance(error, OSError) and name == "config.json":
                raise ValueError(_unreachable(source, error)) from None
            return None
        except (OSError, ValueError) as error:
            raise ValueError(_unreachable(source, error)) from None

    return find


def _unreachable(source: Any, error: Exception) -> str:
    return (
        f"from_pretrained: {source} is no folder or file here, and could not be had from the"
        f" Hugging Face Hub; {first_line(error)}"
    )


def _read(find: Find, source: str) -> tuple[Layout, dict[str, Any], dict[str, Tensor]]:
    """Whose names there are, the shape as GPTConfig takes it, and the state_dict."""
    try:
        file = find("config.json")
        config = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        shape = {} if file is None else shape_from(config, source)
        theirs = _weights(find, source)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, pickle.UnpicklingError,
            EOFError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # fmt: skip
        raise ValueError(f"from_pretrained: {source} is broken; {first_line(error)}") from None
    if file is None or theirs is None:
        raise ValueError(
            f"from_pretrained: {source} must hold config.json, and model.safetensors or"
            " pytorch_model.bin; it does not hold both"
        )
    return "fastgpt" if config["model_type"] == "fastgpt" else "hugging face", shape, theirs


def _weights(find: Find, source: str) -> dict[str, Tensor] | None:
    for name, load in (("model.safetensors", load_file), ("pytorch_model.bin", _unpickle)):
        if (file := find(name)) is not None:
            return load(file)
        if (index := find(f"{name}.index.json")) is None:
            continue
        theirs: dict[str, Tensor] = {}
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for shard in sorted(set(listed.values())):
            file = find(shard) if Path(shard).name == shard else None
            if file is None:
                raise ValueError(
                    f"from_pretrained: {source} must hold {shard}, which its index lists;"
                    " it does not"
                )
            theirs |= load(file)
        return theirs
    return None


def _unpickle(file: Path) -> dict[str, Tensor]:
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(theirs, dict) or not all(isinstance(t, Tensor) for t in theirs.values()):
        raise pickle.UnpicklingError(f"{file.name} must be a state_dict of tensors; it is not")
    return theirs
