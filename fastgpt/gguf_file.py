"""GGUF files of Llamas: llama.cpp's format, with quantised weights and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastgpt.layouts import count, refuse, said


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The shape as GPTConfig takes it, and the tensors: dequantised, in float32.

    The rows of attn_q and attn_k are there in the order of rotary embedding of neighbours; here
    they come in Hugging Face's, that of halves.

    Raises:
        ValueError: no GGUF file, a broken one, another architecture, or what GPT lacks.
        ImportError: the package gguf is not installed.
    """
    reader, fields = _open(path, "from_pretrained")
    import gguf

    if (got := fields.get("general.architecture")) != "llama":
        raise ValueError(f"from_pretrained: {path} must be of architecture 'llama'; got {got!r}")

    source = str(path)
    meta = {n.removeprefix("llama."): v for n, v in fields.items() if n.startswith("llama.")}
    heads = count(meta, "attention.head_count", source)
    kv = count({"attention.head_count_kv": heads} | meta, "attention.head_count_kv", source)
    width = count(meta, "embedding_length", source)
    names = {tensor.name for tensor in reader.tensors}
    D = meta.get("attention.key_length", width // heads)
    has = {"rope.scaling.type": "none", "expert_count": 0, "rope.dimension_count": D,
           "attention.value_length": D, "rope_freqs.weight": False}  # fmt: skip
    got = {name: meta.get(name, value) for name, value in has.items()}
    refuse(source, got | {"rope_freqs.weight": "rope_freqs.weight" in names}, has)
    theirs = {}
    try:
        for tensor in reader.tensors:
            # A copy: what was not quantised is still in the file, mapped and not writable.
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).float()
            part = tensor.name.removesuffix(".weight").rpartition(".")[2]
            if part in ("attn_q", "attn_k"):
                h = heads if part == "attn_q" else kv
                values = rearrange(values, "(h r two) c -> (h two r) c", h=h, two=2)
            theirs[tensor.name] = values
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"from_pretrained: {path} has a broken {tensor.name}; {first_line(error)}"
        ) from None
    if "token_embd.weight" not in theirs:
        raise ValueError(f"from_pretrained: {path} must hold token_embd.weight; it does not")
    shape = {
        "variant": "llama",
        "block_size": said(meta, "context_length", source),
        "vocab_size": theirs["token_embd.weight"].shape[0],
        "n_layer": said(meta, "block_count", source),
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": kv,
        "n_head_dim": None if D * heads == width else D,
        "n_inner": said(meta, "feed_forward_length", source),
        "norm_eps": said(meta, "attention.layer_norm_rms_epsilon", source),
        "tied": "output.weight" not in names,
        "rope_theta": meta.get("rope.freq_base", 1e4),
    }
    return shape, theirs


# How the text is cut before the merges, by what llama.cpp calls it: numbers as they come, or each
# digit by itself; then GPT-2's words.
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS = {
    "gpt-2": WORDS,
    "smollm": {
        "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, WORDS],
    },
}  # fmt: skip
CONTROL = 3  # the kind of a token that stands for no text


def read_tokenizer(path: Path) -> str:
    """The tokenizer of a GGUF file as tokenizer.json has it.

    Raises:
        ValueError: no GGUF file, a broken one, or another tokenizer than byte-level BPE that cuts
            the text as one of CUTS.
        ImportError: the package gguf is not installed.
    """
    _, fields = _open(path, "tokenizer")
    meta = {n.removeprefix("tokenizer.ggml."): v for n, v in fields.items()}
    kind, cut = meta.get("model"), meta.get("pre")
    if kind != "gpt2" or cut not in CUTS:
        raise ValueError(
            f"tokenizer: of GGUF files only byte-level BPE, gpt2, cut as {', '.join(CUTS)} is"
            f" supported; got {kind}, {cut} in {path}"
        )
    tokens = meta["tokens"]
    kinds = meta.get("token_type", [1] * len(tokens))
    special = [
        {
            "id": id, "content": token, "special": True, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for id, (token, of) in enumerate(zip(tokens, kinds, strict=True)) if of == CONTROL
    ]  # fmt: skip
    model = {
        "type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in meta["merges"]],
    }  # fmt: skip
    return json.dumps({
        "version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": CUTS[cut],
        "post_processor": None, "decoder": WORDS, "model": model,
    })  # fmt: skip


def _open(path: Path, op: str) -> tuple[Any, dict[str, Any]]:
    """The file's reader, and its metadata."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"{op}: {path} cannot be read; {error.strerror}") from None
    if magic != b"GGUF":
        raise ValueError(f"{op}: {path} must be a GGUF file or a folder; it begins {magic!r}")
    try:
        import gguf
    except ImportError:
        raise ImportError(f"{op}: GGUF needs the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{op}: {path} is broken; {first_line(error)}") from None
    return reader, fields


def first_line(error: Exception) -> str:
    """Of an error's text, or its type's name."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
