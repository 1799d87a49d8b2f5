"""One op, one file: its specification in plain PyTorch, its registered ops, its public function."""

from fastgpt.ops.adamw import AdamWGroup, adamw, adamw_ref
from fastgpt.ops.attention import attention, attention_packed, attention_ref
from fastgpt.ops.attention_decode import attention_decode, attention_decode_ref
from fastgpt.ops.attention_varlen import attention_varlen, attention_varlen_ref
from fastgpt.ops.backend import Choice, explain, use
from fastgpt.ops.cross_entropy import cross_entropy, cross_entropy_ref
from fastgpt.ops.dropout import dropout_mask
from fastgpt.ops.embedding import embedding, embedding_ref
from fastgpt.ops.ffn import ffn, ffn_ref
from fastgpt.ops.layer_norm import layer_norm, layer_norm_ref
from fastgpt.ops.library import register_flop_formulas, teach_flop_counter
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from fastgpt.ops.quantized_linear import quantized_linear, quantized_linear_ref
from fastgpt.ops.rms_norm import rms_norm, rms_norm_ref
from fastgpt.ops.rotary import rotary, rotary_ref, rotary_table

__all__ = [
    "AdamWGroup",
    "Choice",
    "adamw",
    "adamw_ref",
    "attention",
    "attention_decode",
    "attention_decode_ref",
    "attention_packed",
    "attention_ref",
    "attention_varlen",
    "attention_varlen_ref",
    "cross_entropy",
    "cross_entropy_ref",
    "dropout_mask",
    "embedding",
    "embedding_ref",
    "explain",
    "ffn",
    "ffn_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "quantized_linear",
    "quantized_linear_ref",
    "register_flop_formulas",
    "rms_norm",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "rotary_table",
    "use",
]

teach_flop_counter()
