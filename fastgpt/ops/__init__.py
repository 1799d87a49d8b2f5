"""One op, one file: its specification in plain PyTorch, its registered ops, its public function."""

from fastgpt.ops.attention import attention, attention_ref
from fastgpt.ops.backend import Choice, explain, use
from fastgpt.ops.dropout import dropout_mask
from fastgpt.ops.ffn import ffn, ffn_ref
from fastgpt.ops.layer_norm import layer_norm, layer_norm_ref

__all__ = [
    "Choice",
    "attention",
    "attention_ref",
    "dropout_mask",
    "explain",
    "ffn",
    "ffn_ref",
    "layer_norm",
    "layer_norm_ref",
    "use",
]
