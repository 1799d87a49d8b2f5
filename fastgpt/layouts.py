"""A GPT's shape and weights as other libraries' files have them, both ways.

    here                          GPT-2, transformer.      Llama, model.layers.N.       GGUF, blk.N.
    wte                           wte                      model.embed_tokens           token_embd
    wpe                           wpe
    h.N.ln_1                      h.N.ln_1                 input_layernorm              attn_norm
    h.N.attn.c_attn               h.N.attn.c_attn, turned  self_attn.{q,k,v}_proj       attn_{q,k,v}
    h.N.attn.c_proj               h.N.attn.c_proj, turned  self_attn.o_proj             attn_output
    h.N.ln_2                      h.N.ln_2                 post_attention_layernorm     ffn_norm
    h.N.mlp.{c_fc,c_proj}         h.N.mlp.{...}, turned
    h.N.mlp.{gate,up,down}_proj                            mlp.{gate,up,down}_proj      ffn_{...}
    ln_f                          ln_f                     model.norm                   output_norm
    lm_head (config.tied=False)   lm_head                  lm_head                      output

The second and the third column are Hugging Face's. What is turned is (in, out) there and (out, in)
here. Some files of GPT-2 lack the prefix transformer. c_attn's rows are q's, k's and v's, stacked.
A folder that FastGPTForCausalLM saved has our names behind gpt.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from fastgpt.config import GPTConfig

Layout = Literal["hugging face", "gguf", "fastgpt"]

# Hugging Face's name of an activation, and what else it calls the same function.
ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu": ("gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
_TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_LLAMA_BLOCK = {
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
_LLAMA_OUTSIDE = {
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_f": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}


def their_names(
    ours: Mapping[str, Any], config: GPTConfig, layout: Layout = "hugging face"
) -> dict[str, tuple[str, ...]]:
    """For each of our weights the names, one or three, that it has in the other layout."""
    if layout == "fastgpt":
        return {n: (f"gpt.{n}",) for n in ours}
    gguf = layout == "gguf"
    if not config.llama:
        return {n: (n if n.startswith("lm_head") else f"transformer.{n}",) for n in ours}
    names: dict[str, tuple[str, ...]] = {}
    for name in ours:
        part = name.removesuffix(".weight")
        if part in _LLAMA_OUTSIDE:
            names[name] = (f"{_LLAMA_OUTSIDE[part][gguf]}.weight",)
        else:
            _, layer, part = part.split(".", 2)
            before = f"blk.{layer}." if gguf else f"model.layers.{layer}."
            names[name] = tuple(f"{before}{p}.weight" for p in _LLAMA_BLOCK[part][gguf])
    return names


def weights_from(
    theirs: Mapping[str, Tensor],
    config: GPTConfig,
    shapes: Mapping[str, torch.Size],
    layout: Layout = "hugging face",
    source: str = "the state_dict",
) -> dict[str, Tensor]:
    """Weights under this library's names and in its order of dimensions, bit for bit.

    Args:
        theirs: a state_dict of Hugging Face's GPT-2 or Llama, or GGUF's tensors with the rows of
            attn_q and attn_k in Hugging Face's order.
        config: of the model.
        shapes: of the model's state_dict.
        layout: whose names they have.
        source: what an error calls theirs.

    Raises:
        ValueError: a weight is missing, unknown or of another shape, or the output layer is not
            the embedding although config ties them.
    """
    theirs, hugging_face = dict(theirs), layout == "hugging face"
    if hugging_face and not config.llama:
        masks = (".attn.bias", ".attn.masked_bias")  # buffers that older versions saved
        theirs = {_prefixed(n): t for n, t in theirs.items() if not n.endswith(masks)}
    left = {n for n in theirs if not n.endswith("rotary_emb.inv_freq")}
    ours = {}
    for name, names in their_names(shapes, config, layout).items():
        for part in names:
            if part not in theirs:
                raise ValueError(f"from_pretrained: {source} must hold {part}; it does not")
        left -= set(names)
        parts = [theirs[part] for part in names]
        turned = hugging_face and not config.llama and name.endswith(_TURNED)
        if any(t.ndim != len(shapes[name]) for t in parts):
            raise _misshapen(source, name, shapes[name], parts[0].shape)
        t = parts[0] if len(parts) == 1 else torch.cat(parts)
        t = t.t().contiguous() if turned else t
        if t.shape != shapes[name]:
            raise _misshapen(source, name, shapes[name], t.shape)
        ours[name] = t
    head = "output.weight" if layout == "gguf" else "lm_head.weight"
    if config.tied and head in left:
        left.discard(head)
        if not torch.equal(theirs[head], ours["wte.weight"]):
            raise ValueError(
                f"from_pretrained: {source} must have {head} equal to the embedding, to which its"
                " configuration ties it; it differs"
            )
    if left:
        kind = "Llama" if config.llama else "GPT-2"
        raise ValueError(
            f"from_pretrained: {source} must hold the weights of a {config.n_layer}-layer {kind}"
            f" alone; it has the unknown {min(left)}"
        )
    return ours


def weights_to(ours: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `weights_from`, for Hugging Face's two layouts."""
    theirs: dict[str, Tensor] = {}
    for name, names in their_names(ours, config).items():
        t = ours[name]
        if len(names) == 3:
            kv = config.kv_heads * config.head_dim
            parts = t.split([config.n_head * config.head_dim, kv, kv])
        else:
            parts = (t.t() if not config.llama and name.endswith(_TURNED) else t,)
        # Copies of one storage's parts: safetensors writes no tensors that share one.
        theirs |= {
            n: part.clone(memory_format=torch.contiguous_format)
            for n, part in zip(names, parts, strict=True)
        }
    return theirs


def _prefixed(name: str) -> str:
    own = name.startswith(("transformer.", "lm_head."))
    return name if own else f"transformer.{name}"


def _misshapen(source: str, name: str, want: torch.Size, got: torch.Size) -> ValueError:
    return ValueError(
        f"from_pretrained: {source} must hold {name} as {tuple(want)}; got {tuple(got)}"
    )


def shape_from(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What GPTConfig wants to know, of the config.json of a GPT-2, a Llama, a Mistral, which is a
    Llama with a window, or a FastGPTForCausalLM.

    Raises:
        ValueError: an architecture other than these, or a part of them that GPT lacks.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else type(config).__name__
    if kind == "gpt2":
        return _gpt2_shape(config, source)
    if kind in ("llama", "mistral"):
        return _llama_shape(config, source)
    if kind == "fastgpt":
        named = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
        return named | {"tied": config.get("tie_word_embeddings", True)}
    raise ValueError(
        f"from_pretrained: {source} must be of model_type 'gpt2', 'llama', 'mistral' or"
        f" 'fastgpt'; got {kind!r}"
    )


def _gpt2_shape(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    has = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
           "add_cross_attention": False}  # fmt: skip
    refuse(source, {name: config.get(name, value) for name, value in has.items()}, has)
    names = {
        "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
        "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner",
        "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings",
    }  # fmt: skip
    # GPTConfig's defaults are those of GPT2Config, which need not be written down.
    shape = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    return shape | {
        "variant": "gpt2",
        "activation": _activation(config.get("activation_function", "gelu_new"), source),
    }


def _llama_shape(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = count(config, "num_attention_heads", source)
    width = count(config, "hidden_size", source)
    has = {"attention_bias": False, "mlp_bias": False, "rope_type": "default"}
    head_dim = config.get("head_dim") or width // heads
    got = {
        "attention_bias": config.get("attention_bias") or False,
        "mlp_bias": config.get("mlp_bias") or False,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    refuse(source, got, has)
    return {
        "variant": "llama",
        "block_size": said(config, "max_position_embeddings", source),
        "vocab_size": said(config, "vocab_size", source),
        "n_layer": said(config, "num_hidden_layers", source),
        "n_head": heads,
        "n_embd": width,
        "activation": _activation(said(config, "hidden_act", source), source),
        "n_kv_head": config.get("num_key_value_heads", heads),
        "n_head_dim": None if head_dim * heads == width else head_dim,
        "n_inner": said(config, "intermediate_size", source),
        "norm_eps": said(config, "rms_norm_eps", source),
        "tied": config.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4)),
        "window": config.get("sliding_window") if config["model_type"] == "mistral" else None,
    }


def shape_to(c: GPTConfig, what: str = "save_pretrained") -> dict[str, Any]:
    """A config.json of Hugging Face's for the shape; what is who refuses it.

    Raises:
        ValueError: none of Hugging Face's GPT-2, Llama and Mistral has the shape.
    """
    activation = ACTIVATIONS[str(c.activation)][0]
    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "use_cache": True}
    if c.llama:
        refuse("the model", {"qk_norm": c.qk_norm}, {"qk_norm": False}, what)
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        if c.window is not None:
            kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
            common |= {"sliding_window": c.window}
        return common | kind | {
            "hidden_size": c.n_embd, "intermediate_size": c.inner, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim, "max_position_embeddings": c.block_size,
            "hidden_act": activation, "rms_norm_eps": c.norm_eps, "rope_parameters": rope,
            "rope_theta": c.rope_theta, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
    has = {
        "bias": True, "n_kv_head": c.n_head, "n_head x n_head_dim": c.n_embd, "window": None,
    }  # fmt: skip
    got = {
        "bias": c.bias, "n_kv_head": c.kv_heads, "n_head x n_head_dim": c.n_head * c.head_dim,
        "window": c.window,
    }  # fmt: skip
    refuse("the model", got, has, what)
    end = 50256 if c.vocab_size > 50256 else None
    return common | {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.block_size,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_inner,
        "activation_function": activation, "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip


def _activation(theirs: Any, source: str) -> str:
    for ours, names in ACTIVATIONS.items():
        if theirs in names:
            return ours
    known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
    raise ValueError(
        f"from_pretrained: {source} must have an activation of {known}; got {theirs!r}"
    )


def said(config: Mapping[str, Any], key: str, source: str) -> Any:
    """config[key], or an error."""
    if key not in config:
        raise ValueError(f"from_pretrained: {source} must say {key}; it does not")
    return config[key]


def count(config: Mapping[str, Any], key: str, source: str) -> int:
    """config[key] if it is an int above 0, or an error."""
    value = said(config, key, source)
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"from_pretrained: {source} must say {key} as an int above 0; got {value!r}"
        )
    return value


def refuse(
    source: str, got: Mapping[str, Any], want: Mapping[str, Any], what: str = "from_pretrained"
) -> None:
    """Raise for what GPT, or the other layout, lacks."""
    for name, value in want.items():
        if got[name] != value:
            raise ValueError(f"{what}: {source} must have {name} {value!r}; got {got[name]!r}")
