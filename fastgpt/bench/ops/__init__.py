"""One file an op, as everywhere: `sizes` it is timed at, and `case`, the providers at one size."""

from types import ModuleType

from fastgpt.bench.ops import (
    adamw,
    attention,
    attention_decode,
    cross_entropy,
    embedding,
    ffn,
    layer_norm,
    linear_cross_entropy,
    quantized_linear,
    rms_norm,
    rotary,
)

OPS: dict[str, ModuleType] = {
    "attention": attention,
    "attention_decode": attention_decode,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "ffn": ffn,
    "linear_cross_entropy": linear_cross_entropy,
    "cross_entropy": cross_entropy,
    "embedding": embedding,
    "rotary": rotary,
    "quantized_linear": quantized_linear,
    "adamw": adamw,
}
