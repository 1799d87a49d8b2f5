"""Tiny random models of many families, made by transformers, in pairs: eager and fastgpt."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from fastgpt import huggingface

huggingface.register()

VOCAB = 97
_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2, D 12": ("gpt2", _GPT2 | {"n_embd": 36, "n_head": 3}),
    "gpt2, scores by layer": ("gpt2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "llama, grouped": ("llama", _GROUPED),
    "mistral, window": ("mistral", _GROUPED | {"sliding_window": 4}),
    "phi-moe, window not passed on": (
        "phimoe", _GROUPED | {"num_local_experts": 2, "sliding_window": 4},
    ),
    "gemma 2, softcap, windows": (
        "gemma2",
        _GROUPED | {
            "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "llama 4, chunks": (
        "llama4_text",
        _GROUPED | {
            "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    "neox": ("gpt_neox", _SHAPE),
    "opt": ("opt", _SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "deepseek, D of v differs": (
        "deepseek_v3",
        _SHAPE | {
            "n_routed_experts": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16,
            "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
            "v_head_dim": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 2,
        },
    ),
}  # fmt: skip


def make(family: str, implementation: str, **changes: Any) -> Any:
    """A model of a family with the same weights in every implementation, in evaluation mode."""
    kind, shape = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape | changes)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, experts_implementation="eager"
    ).eval()
    for p in model.parameters():  # larger than at first: softmax is to be no mean
        p.data.mul_(3.0) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model


def prompts(side: str, B: int = 3, T: int = 11) -> tuple[Tensor, Tensor]:
    """Ids and their attention_mask; rows 0 and 1 are shorter, filled up on a side."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (B, T))
    mask = torch.ones_like(ids)
    for row, pads in ((0, 5), (1, 2)):
        if side == "left":
            mask[row, :pads] = 0
        elif side == "right":
            mask[row, -pads:] = 0
    return ids.masked_fill(mask == 0, 0), mask
