"""Linear layers and embeddings of 8 or 4 bits a weight, for models that only predict.

    int8   W[n, k] = scale[n] q[n, k],                       q in -127 .. 127, one scale a row
    int4   W[n, k] = scale[n, k // 32] q[n, k] + low[n, k // 32],   q in 0 .. 15, groups of 32

On a CPU that multiplies bytes exactly (VNNI, AMX) an int8 layer makes bytes of its input too, each
row by its own range: x[m, k] = lo[m] + step[m] p[m, k], p in 0 .. 255. The sums are integers,

    y[m, n] = scale[n] (step[m] sum_k p[m, k] q[n, k] + lo[m] sum_k q[n, k]) + bias[n]

A row does not depend on the rows beside it. Without VNNI such products saturate in silence
(vpmaddubsw): weights become numbers of x's dtype first. Where kernels run, x stays as it is and
weights become numbers in the kernel: `ops.quantized_linear`.

Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only
inference, 2018, https://arxiv.org/abs/1712.05877; rows of activations by their own range: Yao et
al., ZeroQuant, 2022, https://arxiv.org/abs/2206.01861.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.ops import backend
from fastgpt.ops.ffn import activate
from fastgpt.ops.quantized_linear import dequantize

GROUP = 32  # weights of int4 that share a scale
FEW = 16  # rows up to which int4 is multiplied as it is stored; with more it pays to unpack once


_zero = torch.zeros(1, dtype=torch.int64)


@lru_cache(maxsize=1)
def bytes_multiply_exactly() -> bool:
    """Whether this CPU's products of bytes are exact, found by one of the largest there are."""
    try:
        one = torch.full((64, 64), 127, dtype=torch.int8)
        got = _product(one.new_full((1, 64), 255, dtype=torch.uint8), _packed(one), torch.ones(64))
    except (AttributeError, RuntimeError, NotImplementedError):  # torch without oneDNN
        return False
    return bool((got == 64 * 127 * 255).all())


def _packed(weight: Tensor) -> Tensor:
    """(N, K) int8 in the order that the CPU's instructions want."""
    return torch.ops.onednn.qlinear_prepack(weight, None)  # type: ignore[no-any-return]


def _product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """(M, K) uint8 and packed (N, K) int8 -> (M, N) float32, each column times its scale."""
    return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]
        x, 1.0, 0, packed, scale, _zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def rows_product(
    x: Tensor, packed: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None
) -> Tensor:
    """(M, K) -> (M, N) of x's dtype: the formula above, for a layer's `ordered` weights."""
    wide = x if x.dtype == torch.float32 else x.float()
    lo = wide.amin(-1, True)
    step = wide.amax(-1, True).sub_(lo).clamp_min_(1e-30).mul_(1 / 255)
    y = _product(wide.sub(lo).div_(step).round_().to(torch.uint8), packed, scale)
    y = y.mul_(step).addcmul_(lo, sums)
    y = y if bias is None else y.add_(bias)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> q (N, K) int8 and scale (N,) float32: each row's largest magnitude is 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> q (N, K / 2) uint8, the even column in the low half, and (N, K / 32, 2) bfloat16,
    scale and low of each group.

    Of ranges from 1 down to 0.7 of a group's own that with the least squared error is taken.
    """
    N, K = weight.shape
    w = weight.detach().float().view(N, K // GROUP, GROUP)
    least, most = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best = torch.full_like(least, torch.inf)
    q, grid = torch.zeros_like(w), torch.zeros(N, K // GROUP, 2)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        low = (least * shrink).bfloat16().float()
        scale = ((most - least) * (shrink / 15)).bfloat16().float()
        tried = ((w - low) / scale.clamp_min(1e-30)).round().clamp(0, 15)
        error = (tried * scale + low - w).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        q = torch.where(better, tried, q)
        grid = torch.where(better, torch.cat((scale, low), -1), grid)
    even, odd = q.view(N, K // 2, 2).to(torch.uint8).unbind(-1)
    return even | odd << 4, grid.bfloat16()


class Quantized(nn.Module):
    """What the layers here share: weights that are buffers, which no cast of the module changes.

    `weight` is what state_dict has. On a CPU the integers may lie in another order, that of
    `_order`, in place of it or beside it.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self._ordered: tuple[Tensor, Tensor] | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, (N, K)."""
        return dequantize(self.weight, self.scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        scale = self.scale
        self._ordered = None
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # .bfloat16() and the like
            moved = self.scale.to(scale.dtype) if scale.is_meta else scale.to(self.weight.device)
            self.scale = moved
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ordered = None
        super()._load_from_state_dict(*args)

    def copies(self) -> tuple[Tensor, ...]:
        """What is kept beside the weights, once they were multiplied by on a CPU."""
        return self._ordered or ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ordered": None}

    def extra_repr(self) -> str:
        N, K = self.shape
        return f"in_features={K}, out_features={N}"

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weights: (N, K)."""
        raise NotImplementedError


class _Int8(Quantized):
    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.weight.shape
        return N, K

    def product(
        self, x: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """f(x W^T + bias): (..., K) -> (..., N) of x's dtype; f one of `ops.ffn`'s, or none."""
        if backend.kernels_run(x):
            return ops.quantized_linear(x, self.weight, self.scale, bias, activation=activation)
        y = self._product(x, bias)
        return y if activation is None else activate(y, activation)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not (x.device.type == "cpu" and bytes_multiply_exactly()):
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
            return y if bias is None else y + bias
        packed, sums = self.ordered()
        flat = x.reshape(-1, x.shape[-1])
        y = rows_product(flat, packed, self.scale, sums, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def ordered(self) -> tuple[Tensor, Tensor]:
        """The weights in the order of the CPU's instructions, and scale[n] sum_k q[n, k]."""
        if self._ordered is None:
            with torch.inference_mode(False), torch.no_grad():
                sums = self.weight.sum(1, dtype=torch.int32) * self.scale
                self._ordered = _packed(self.weight), sums
        return self._ordered


class Int8Linear(_Int8):
    """y = x W^T + bias, the weights of 8 bits: in place of nn.Linear, without gradient.

    Args:
        weight: (N, K) int8.
        scale: (N,) float32.
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """The same layer, each row of weights rounded to multiples of 1/127 of its largest."""
        return cls(*quantize_int8(linear.weight), linear.bias)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x: (..., K) -> (..., N) of x's dtype, f(y) if there is an activation f."""
        return self.product(x, self.bias, activation)


class Int8Embedding(_Int8):
    """Rows of 8 bits a weight, looked up, or multiplied by as the output layer is.

    Args:
        weight: (V, C) int8.
        scale: (V,) float32.
    """

    @classmethod
    def of(cls, embedding: nn.Embedding) -> "Int8Embedding":
        return cls(*quantize_int8(embedding.weight))

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (...) -> (..., C) float32."""
        return F.embedding(idx, self.weight) * F.embedding(idx, self.scale[:, None])


class Int4Linear(Quantized):
    """y = x W^T + bias, the weights of 4 bits: in place of nn.Linear, without gradient.

    Few rows are multiplied in bfloat16 on a CPU, whatever the dtype of x.

    Args:
        weight: (N, K / 2) uint8, two weights a byte, the even column in the low half.
        scale: (N, K / 32, 2) bfloat16, scale and low of each group.
        bias: (N,) or None.

    Raises:
        ValueError: K is no multiple of 32, or N none of 16.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int4Linear":
        N, K = linear.weight.shape
        if K % GROUP or N % 16:
            raise ValueError(
                "Int4Linear: in_features must be a multiple of 32 and out_features of 16;"
                f" got {K} and {N}"
            )
        return cls(*quantize_int4(linear.weight), linear.bias)

    @property
    def shape(self) -> tuple[int, int]:
        N, half = self.weight.shape
        return N, 2 * half

    def _integers(self) -> Tensor:
        """(N, K) uint8."""
        return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x: (..., K) -> (..., N) of x's dtype, f(y) if there is an activation f."""
        if backend.kernels_run(x):
            return ops.quantized_linear(
                x, self.weight, self.scale, self.bias, activation=activation
            )
        y = self._product(x)
        return y if activation is None else activate(y, activation)

    def _product(self, x: Tensor) -> Tensor:
        N, K = self.shape
        flat = x.reshape(-1, K)
        if x.device.type != "cpu" or flat.shape[0] > FEW:
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        if self._ordered is None:
            ints = self._integers().int()
            scale, low = self.scale.float().unbind(-1)
            grid = torch.stack((scale, low + 8 * scale), -1)  # torch counts from -8
            self._ordered = (
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints, 1),
                grid.transpose(0, 1).contiguous().bfloat16(),
            )
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat.bfloat16(), self._ordered[0], GROUP, self._ordered[1]
        )
        y = y.to(x.dtype).view(*x.shape[:-1], N)
        return y if self.bias is None else y + self.bias


def swap(module: nn.Module, to: str) -> None:
    """Put quantised layers in place of every nn.Linear in a module, and of an nn.Embedding wte.

    Args:
        module: changed in place.
        to: "int8", or "int4" of the layers inside blocks: embedding and output layer, lm_head, are
            int8 either way.

    Raises:
        ValueError: a layer's sizes do not fit int4; nothing is changed then.
    """
    made: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                four = to == "int4" and name != "lm_head"
                made.append((parent, name, (Int4Linear if four else Int8Linear).of(child)))
            elif type(child) is nn.Embedding and name == "wte":
                made.append((parent, name, Int8Embedding.of(child)))
    for parent, name, layer in made:
        setattr(parent, name, layer)
