"""A linear layer of 8 or 4 bits a weight: the op, the float layer, PyTorch's own kernels, torchao.

All multiply by one matrix, that of the quantised weights: the float layer holds it as numbers. On a
CPU the op is its reference, and `fastgpt.quantized`'s layer is what is meant to be fast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.bench.case import Case, compiled, optional, size_of
from fastgpt.ops import quantized_linear, quantized_linear_ref
from fastgpt.ops.quantized_linear import dequantize
from fastgpt.quantized import GROUP, Int4Linear, Int8Linear, quantize_int4, quantize_int8


def sizes(device: str) -> list[dict[str, int]]:
    """GPT-2's products of one token, of eight, of a prompt; a wide model's of one."""
    if device != "cuda":
        return [{"M": M, "N": 2304, "K": 768, "bits": bits} for M in (1, 8) for bits in (8, 4)]
    one = [(2304, 768, 8), (768, 3072, 8), (50257, 768, 8), (12288, 4096, 8), (12288, 4096, 4)]
    return [
        *({"M": 1, "N": N, "K": K, "bits": bits} for N, K, bits in one),
        *({"M": M, "N": 3072, "K": 768, "bits": bits} for M in (1, 8, 64, 512) for bits in (8, 4)),
        *({"M": M, "N": 12288, "K": 4096, "bits": 8} for M in (8, 512)),
    ]


def case(device: str, dtype: torch.dtype, *, M: int, N: int, K: int, bits: int) -> Case:
    w = torch.randn(N, K) * K**-0.5
    q, scale = (t.to(device) for t in (quantize_int8 if bits == 8 else quantize_int4)(w))
    wide = dequantize(q, scale, dtype)
    inputs = {"x": torch.randn(M, K, device=device, dtype=dtype)}
    plain = partial(quantized_linear_ref, weight=q, scale=scale)
    providers: dict[str, Callable[..., Tensor]] = {
        "fastgpt": partial(quantized_linear, weight=q, scale=scale),
        "torch": plain,
        "float": partial(F.linear, weight=wide),
        "compiled": compiled(plain),
    }
    if device == "cpu" and dtype != torch.float32:  # which rounds x to bytes, or to bfloat16
        providers["layer"] = (Int8Linear if bits == 8 else Int4Linear)(q, scale)
    packed, absent = _packed(q, scale, bits, device, dtype)
    torchao, missing = _torchao(wide, bits, device)
    moved = sum(map(size_of, (q, scale, inputs["x"]))) + M * N * dtype.itemsize
    return Case(
        "quantized_linear", {"M": M, "N": N, "K": K, "bits": bits}, providers | packed | torchao,
        inputs, "torch", flops=2 * M * N * K, tokens=M,
        traffic=(moved, 0), absent=absent | missing, has_backward=False,
    )  # fmt: skip


def _packed(
    q: Tensor, scale: Tensor, bits: int, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """PyTorch's own kernel, which is torchao's for 4 bits too, if it takes such tensors."""
    name, N, K = "packed", len(q), q.shape[1] * 8 // bits
    if dtype != torch.bfloat16:
        return {}, {name: "it is made for bfloat16"}
    if bits == 8:
        scales = scale.to(dtype)
        return {name: lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scales)}, {}
    if K % 128 or N % 16:
        return {}, {name: "it wants K a multiple of 128, N of 16"}
    step, low = scale.float().unbind(-1)
    grid = torch.stack((step, low + 8 * step), -1).transpose(0, 1).contiguous().to(dtype)
    if device == "cuda":
        # Here the even column is in the high half.
        laid = torch.ops.aten._convert_weight_to_int4pack((q << 4) | (q >> 4), 8)
        return {name: lambda x: torch.ops.aten._weight_int4pack_mm(x, laid, GROUP, grid)}, {}
    ints = torch.stack((q & 15, q >> 4), -1).flatten(1).int()
    laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints, 1)
    return {name: lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, laid, GROUP, grid)}, {}


def _torchao(
    wide: Tensor, bits: int, device: str
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """torchao's layer of 8 bits, compiled as it is meant to be."""
    if bits != 8:
        return {}, {}
    found: list[Any] = []

    def call(x: Tensor) -> Tensor:
        if not found:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            layer = nn.Sequential(nn.Linear(wide.shape[1], wide.shape[0], False, "meta"))
            layer[0].weight = nn.Parameter(wide, False)
            quantize_(layer, Int8WeightOnlyConfig())
            found.append(compiled(layer))
        y: Tensor = found[0](x)
        return y

    return optional({"torchao": ("torchao", call)}, device)
