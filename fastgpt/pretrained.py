"""Weights that other libraries saved, as a GPT of this one.

    here                          Hugging Face's Llama, model.layers.N.   GGUF, blk.N.
    wte                           model.embed_tokens                      token_embd
    h.N.ln_1                      input_layernorm                         attn_norm
    h.N.attn.c_attn               self_attn.{q,k,v}_proj, stacked         attn_{q,k,v}, stacked
    h.N.attn.c_proj               self_attn.o_proj                        attn_output
    h.N.ln_2                      post_attention_layernorm                ffn_norm
    h.N.mlp.{gate,up,down}_proj   mlp.{gate,up,down}_proj                 ffn_{gate,up,down}
    ln_f                          model.norm                              output_norm
    lm_head (config.tied=False)   lm_head                                 output

GGUF has the rows of attn_q and attn_k in the order of rotary embedding of neighbours, here and in
Hugging Face's layout they are in that of halves. Its quantised weights become float32.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgpt.model import GPT, GPTConfig

# Of one block, in Hugging Face's layout and in GGUF; c_attn's parts are stacked in this order.
_BLOCK = {
    "ln_1": (("input_layernorm",), ("attn_norm",)),
    "attn.c_attn": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attn_q", "attn_k", "attn_v"),
    ),
    "attn.c_proj": (("self_attn.o_proj",), ("attn_output",)),
    "ln_2": (("post_attention_layernorm",), ("ffn_norm",)),
    "mlp.gate_proj": (("mlp.gate_proj",), ("ffn_gate",)),
    "mlp.up_proj": (("mlp.up_proj",), ("ffn_up",)),
    "mlp.down_proj": (("mlp.down_proj",), ("ffn_down",)),
}
_OUTSIDE = {
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_f": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}


def load_llama(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT of variant "llama" from a GGUF file, or from a folder in Hugging Face's layout.

    Args:
        path: a .gguf file, whose quantised weights are dequantised (needs the package gguf); or a
            folder with the config.json and *.safetensors of a LlamaForCausalLM.
        dtype: of the weights.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: it is neither; another architecture, or a part of this one that GPT lacks;
            weights are missing, unknown, or of another shape.
        ImportError: a GGUF file without the package gguf.
    """
    path = Path(path)
    side = 0 if path.is_dir() else 1
    shape, theirs = _read_gguf(path) if side else _read_folder(path)
    try:
        config = GPTConfig(variant="llama", **shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_llama: {path} is of a shape that GPT lacks; {error}") from None
    with torch.device("meta"):
        model = GPT(config)
    weights = rename(theirs, config, side, str(path))
    for name, want in model.state_dict().items():
        if weights[name].shape != want.shape:
            raise ValueError(
                f"load_llama: {path} must hold {name} as {tuple(want.shape)};"
                f" got {tuple(weights[name].shape)}"
            )
    model.load_state_dict({n: t.to(dtype) for n, t in weights.items()}, assign=True)
    for p in model.parameters():
        p.requires_grad_()
    return model.eval()


def rename(
    theirs: Mapping[str, Tensor], config: GPTConfig, side: int = 0, source: str = "the state_dict"
) -> dict[str, Tensor]:
    """The weights of a Llama under this library's names.

    Args:
        theirs: Hugging Face's state_dict of a LlamaForCausalLM, or GGUF's tensors in the order of
            rows that is Hugging Face's.
        config: of the model.
        side: 0 for Hugging Face's names, 1 for GGUF's.
        source: what an error calls theirs.

    Raises:
        ValueError: a weight is missing, or there is one too many.
    """
    left = {name for name in theirs if not name.endswith("rotary_emb.inv_freq")}

    def take(name: str) -> Tensor:
        if f"{name}.weight" not in theirs:
            raise ValueError(f"load_llama: {source} must hold {name}.weight; it does not")
        left.discard(f"{name}.weight")
        return theirs[f"{name}.weight"]

    ours = {}
    for name, names in _OUTSIDE.items():
        if name == "lm_head" and config.tied:
            left.discard(f"{names[side]}.weight")  # a copy of wte
        else:
            ours[f"{name}.weight"] = take(names[side])
    for layer in range(config.n_layer):
        before = (f"model.layers.{layer}.", f"blk.{layer}.")[side]
        for name, parts in _BLOCK.items():
            taken = [take(before + part) for part in parts[side]]
            ours[f"h.{layer}.{name}.weight"] = taken[0] if len(taken) == 1 else torch.cat(taken)
    if left:
        raise ValueError(
            f"load_llama: {source} must hold the weights of a {config.n_layer}-layer Llama alone;"
            f" it has the unknown {min(left)}"
        )
    return ours


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder in Hugging Face's layout: what GPTConfig wants to know, and the state_dict."""
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise ValueError(
            f"load_llama: {path} must hold config.json and *.safetensors; it does not hold both"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        theirs: dict[str, Tensor] = {}
        for file in files:
            theirs |= load_file(file)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"load_llama: {path} is broken; {_line(error)}") from None
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        got = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"load_llama: {path} must be of model_type 'llama'; got {got!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = _count(config, "num_attention_heads", path)
    width = _count(config, "hidden_size", path)
    lacking = {
        "attention_bias": config.get("attention_bias") or False,
        "mlp_bias": config.get("mlp_bias") or False,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": config.get("head_dim") or width // heads,
    }
    _refuse(
        path, lacking, {"attention_bias": False, "mlp_bias": False, "rope_type": "default",
                        "head_dim": width // heads},
    )  # fmt: skip
    shape = {
        "block_size": _get(config, "max_position_embeddings", path),
        "vocab_size": _get(config, "vocab_size", path),
        "n_layer": _get(config, "num_hidden_layers", path),
        "n_head": heads,
        "n_embd": width,
        "activation": _get(config, "hidden_act", path),
        "n_kv_head": config.get("num_key_value_heads", heads),
        "n_inner": _get(config, "intermediate_size", path),
        "norm_eps": _get(config, "rms_norm_eps", path),
        "tied": config.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4)),
    }
    return shape, theirs


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of a GGUF file, its tensors dequantised, their rows in Hugging Face's order."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"load_llama: {path} cannot be read; {error.strerror}") from None
    if magic != b"GGUF":
        raise ValueError(f"load_llama: {path} must be a GGUF file or a folder; it begins {magic!r}")
    try:
        import gguf
    except ImportError:
        raise ImportError("load_llama: GGUF needs the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"load_llama: {path} is broken; {_line(error)}") from None
    if (got := fields.get("general.architecture")) != "llama":
        raise ValueError(f"load_llama: {path} must be of architecture 'llama'; got {got!r}")

    meta = {n.removeprefix("llama."): v for n, v in fields.items() if n.startswith("llama.")}
    heads = _count(meta, "attention.head_count", path)
    kv = _count({"attention.head_count_kv": heads} | meta, "attention.head_count_kv", path)
    width = _count(meta, "embedding_length", path)
    names = {tensor.name for tensor in reader.tensors}
    lacking = {
        "rope.scaling.type": meta.get("rope.scaling.type", "none"),
        "expert_count": meta.get("expert_count", 0),
        "rope.dimension_count": meta.get("rope.dimension_count", width // heads),
        "rope_freqs.weight": "rope_freqs.weight" in names,
    }
    _refuse(
        path, lacking, {"rope.scaling.type": "none", "expert_count": 0,
                        "rope.dimension_count": width // heads, "rope_freqs.weight": False},
    )  # fmt: skip
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
        raise ValueError(f"load_llama: {path} has a broken {tensor.name}; {_line(error)}") from None
    if "token_embd.weight" not in theirs:
        raise ValueError(f"load_llama: {path} must hold token_embd.weight; it does not")
    shape = {
        "block_size": _get(meta, "context_length", path),
        "vocab_size": theirs["token_embd.weight"].shape[0],
        "n_layer": _get(meta, "block_count", path),
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": kv,
        "n_inner": _get(meta, "feed_forward_length", path),
        "norm_eps": _get(meta, "attention.layer_norm_rms_epsilon", path),
        "tied": "output.weight" not in names,
        "rope_theta": meta.get("rope.freq_base", 1e4),
    }
    return shape, theirs


def _get(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise ValueError(f"load_llama: {path} must say {key}; it does not")
    return config[key]


def _count(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = _get(config, key, path)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"load_llama: {path} must say {key} as an int above 0; got {value!r}")
    return value


def _refuse(path: Path, got: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise for what GPT lacks."""
    for name, value in want.items():
        if got[name] != value:
            raise ValueError(f"load_llama: {path} must have {name} {value!r}; got {got[name]!r}")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
