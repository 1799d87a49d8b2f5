"""GGUF files, llama.cpp's format: of Llamas, with quantised weights and a tokenizer, read; of both
variants, written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.layouts import count, refuse, said, shape_to, their_names

GPT2 = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


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


def write_gguf(
    file: str | os.PathLike[str], weights: Mapping[str, Tensor], c: GPTConfig,
    precision: str = "float32", tokenizer: str | None = None,
) -> None:  # fmt: skip
    """Write a GPT-2 or a Llama as llama.cpp takes it.

    Args:
        file: to write.
        weights: GPT's state_dict.
        c: the shape.
        precision: of the matrices: float32, float16, bfloat16, or int8, which is Q8_0.
        tokenizer: what the tokenizer.json of a byte-level BPE holds; None for a file without
            vocabulary.

    Raises:
        ValueError: llama.cpp has no such model.
        ImportError: the package gguf is not installed.
    """
    shape_to(c, "gguf")  # llama.cpp has no shape that Hugging Face's two lack
    want = {"activation": "silu" if c.llama else "gelu_tanh", "quantized": None, "window": None}
    refuse("the model", {n: getattr(c, n) for n in want}, want, "gguf")
    try:
        import gguf
    except ImportError:
        raise ImportError("gguf: needs the package gguf: pip install gguf") from None
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
    if precision not in kinds:
        raise ValueError(f"gguf: precision must be one of {', '.join(kinds)}; got {precision!r}")
    kind = gguf.GGMLQuantizationType[kinds[precision]]
    out = gguf.GGUFWriter(file, "llama" if c.llama else "gpt2")
    out.add_context_length(c.block_size)
    out.add_embedding_length(c.n_embd)
    out.add_feed_forward_length(c.inner)
    out.add_block_count(c.n_layer)
    out.add_head_count(c.n_head)
    out.add_vocab_size(c.vocab_size)
    if c.llama:
        out.add_head_count_kv(c.kv_heads)
        out.add_key_length(c.head_dim)
        out.add_value_length(c.head_dim)
        out.add_rope_dimension_count(c.head_dim)
        out.add_rope_freq_base(c.rope_theta)
        out.add_layer_norm_rms_eps(c.norm_eps)
    else:
        out.add_layer_norm_eps(c.norm_eps)
    _add_vocabulary(out, tokenizer, c.vocab_size)
    for name, tensor in _named(weights, c).items():
        values = tensor.detach().float().cpu().contiguous().numpy()
        if values.ndim < 2 or name == "position_embd.weight":
            out.add_tensor(name, values)
        else:
            out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _named(weights: Mapping[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """Under llama.cpp's names, a Llama's q and k with neighbours turned together."""
    made = {}
    if not c.llama:
        for name, tensor in weights.items():
            head, _, part = name.rpartition(".")
            if head.startswith("h."):
                _, layer, head = head.split(".", 2)
                made[f"blk.{layer}.{GPT2[head]}.{part}"] = tensor
            else:
                made[f"{GPT2[head]}.{part}"] = tensor
        return made
    kv = c.kv_heads
    for name, names in their_names(weights, c, "gguf").items():
        sizes = [n * c.head_dim for n in (c.n_head, kv, kv)]
        parts = weights[name].split(sizes) if len(names) == 3 else (weights[name],)
        for n, (theirs, tensor) in enumerate(zip(names, parts, strict=True)):
            if len(names) == 3 and n < 2:
                h = (c.n_head, kv)[n]
                tensor = rearrange(tensor, "(h two r) c -> (h r two) c", h=h, two=2)
            made[theirs] = tensor
    return made


def _add_vocabulary(out: Any, tokenizer: str | None, vocab_size: int) -> None:
    """The ids' tokens and merges, as llama.cpp's own converter writes GPT-2's."""
    if tokenizer is None:
        out.add_tokenizer_model("no_vocab")
        return
    told = json.loads(tokenizer)
    names = {id: token for token, id in told["model"]["vocab"].items()}
    special = {t["id"] for t in told["added_tokens"] if t["special"]}
    names |= {t["id"]: t["content"] for t in told["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]]
    normal, control, unused = 1, 3, 5  # gguf.TokenType
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([names.get(n, f"[unused{n}]") for n in range(vocab_size)])
    out.add_token_types(
        [control if n in special else normal if n in names else unused for n in range(vocab_size)]
    )
    out.add_token_merges(merges)
    if special:
        end = min(special)
        out.add_bos_token_id(end)
        out.add_eos_token_id(end)
    out.add_add_bos_token(False)
