"""What `fastgpt tune` runs of each op: inputs of a size, and a call that carries gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt import ops

Sizes = dict[str, int]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Task:
    """An op to tune.

    Attributes:
        sizes: GPT-2's; a name to its default.
        small: such that the interpreter is done in seconds.
        shapes: of the inputs that have gradients if the value has, from the sizes.
        call: the op, on them and the others.
        other: inputs that have none, of dtypes of their own.
    """

    sizes: Sizes
    small: Sizes
    shapes: Callable[[Sizes], dict[str, tuple[int, ...]]]
    call: Callable[..., Tensor]
    other: Callable[[Sizes, str], dict[str, Tensor]] = lambda sizes, device: {}

    def inputs(self, sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The inputs, drawn so that products of them stay near 1."""
        made = {}
        for name, shape in self.shapes(sizes).items():
            scale = shape[-1] ** -0.5 if name.startswith("w") and len(shape) > 1 else 1.0
            made[name] = (torch.randn(shape, device=device) * scale).to(dtype)
        return made | self.other(sizes, device)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v)


@torch.no_grad()
def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> Tensor:
    return ops.attention_decode(q, k_cache, v_cache, lengths, k, v)


def _nearly_full(s: Sizes, device: str) -> dict[str, Tensor]:
    return {"lengths": torch.full((s["B"],), s["S"] - 1, dtype=torch.int32, device=device)}


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, h = ops.layer_norm(x, weight, bias, residual=residual)
    return torch.cat([y, h])


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y, h = ops.rms_norm(x, weight, residual=residual)
    return torch.cat([y, h])


def _ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return ops.ffn(x, w1, b1, w2, b2)


def _embedding(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return ops.embedding(idx, wte, wpe)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat(ops.rotary(q, k, cos, sin))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return ops.cross_entropy(logits, target, reduction="sum")


def _linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, target, reduction="sum")


def _quantized_linear(x: Tensor, bias: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """All rows, and one alone, which is another kernel's."""
    both = [ops.quantized_linear(rows, weight, scale, bias) for rows in (x, x[:1])]
    return torch.cat(both)


def _quantized(s: Sizes, device: str) -> dict[str, Tensor]:
    weight = torch.randint(-127, 128, (s["N"], s["K"]), device=device, dtype=torch.int8)
    return {"weight": weight, "scale": torch.full((s["N"],), s["K"] ** -0.5 / 74, device=device)}


def _ids(name: str, *shape: str) -> Callable[[Sizes, str], dict[str, Tensor]]:
    """Ids of a vocabulary, in a shape of these sizes."""

    def draw(s: Sizes, device: str) -> dict[str, Tensor]:
        return {name: torch.randint(s["V"], [s[n] for n in shape], device=device)}

    return draw


def _table(s: Sizes, device: str) -> dict[str, Tensor]:
    return dict(zip(("cos", "sin"), ops.rotary_table(s["T"], s["D"], device=device), strict=True))


@torch.no_grad()
def _adamw(p: Tensor, g: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    new = p.detach().clone()
    moments = [torch.zeros_like(p, dtype=wide) for _ in range(2)]
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    group = ops.AdamWGroup([new], [g.detach()], [moments[0]], [moments[1]], [step], lr=0.1)
    ops.adamw([group], torch.zeros(4, device=p.device), max_grad_norm=1.0)
    return new


TASKS = {
    "attention": Task(
        {"B": 8, "T": 1024, "H": 12, "D": 64},
        {"B": 1, "T": 40, "H": 1, "D": 16},
        lambda s: dict.fromkeys("qkv", (s["B"], s["T"], s["H"], s["D"])),
        _attention,
    ),
    "attention_decode": Task(
        {"B": 8, "S": 4096, "H": 12, "D": 64},
        {"B": 1, "S": 40, "H": 1, "D": 16},
        lambda s: {
            n: (s["B"], 1 if n in "qkv" else s["S"], s["H"], s["D"])
            for n in ("q", "k_cache", "v_cache", "k", "v")
        },
        _attention_decode,
        _nearly_full,
    ),
    "layer_norm": Task(
        {"M": 8192, "N": 768},
        {"M": 6, "N": 40},
        lambda s: dict.fromkeys(("x", "residual"), (s["M"], s["N"]))
        | dict.fromkeys(("weight", "bias"), (s["N"],)),
        _layer_norm,
    ),
    "rms_norm": Task(
        {"M": 8192, "N": 768},
        {"M": 6, "N": 40},
        lambda s: dict.fromkeys(("x", "residual"), (s["M"], s["N"])) | {"weight": (s["N"],)},
        _rms_norm,
    ),
    "ffn": Task(
        {"M": 8192, "C": 768, "F": 3072},
        {"M": 20, "C": 16, "F": 24},
        lambda s: {
            "x": (s["M"], s["C"]), "w1": (s["F"], s["C"]), "b1": (s["F"],),
            "w2": (s["C"], s["F"]), "b2": (s["C"],),
        },
        _ffn,
    ),
    "quantized_linear": Task(
        {"M": 8, "N": 3072, "K": 768},
        {"M": 5, "N": 40, "K": 32},
        lambda s: {"x": (s["M"], s["K"]), "bias": (s["N"],)},
        _quantized_linear,
        _quantized,
    ),
    "embedding": Task(
        {"B": 8, "T": 1024, "C": 768, "V": 50257},
        {"B": 2, "T": 5, "C": 20, "V": 7},
        lambda s: {"wte": (s["V"], s["C"]), "wpe": (s["T"], s["C"])},
        _embedding,
        _ids("idx", "B", "T"),
    ),
    "rotary": Task(
        {"B": 8, "T": 1024, "H": 12, "D": 64},
        {"B": 1, "T": 5, "H": 2, "D": 16},
        lambda s: dict.fromkeys("qk", (s["B"], s["T"], s["H"], s["D"])),
        _rotary,
        _table,
    ),
    "cross_entropy": Task(
        {"M": 8192, "V": 50257},
        {"M": 3, "V": 70},
        lambda s: {"logits": (s["M"], s["V"])},
        _cross_entropy,
        _ids("target", "M"),
    ),
    "linear_cross_entropy": Task(
        {"M": 8192, "C": 768, "V": 50257},
        {"M": 5, "C": 16, "V": 40},
        lambda s: {"x": (s["M"], s["C"]), "weight": (s["V"], s["C"])},
        _linear_cross_entropy,
        _ids("target", "M"),
    ),
    "adamw": Task(
        {"N": 1 << 24}, {"N": 100}, lambda s: dict.fromkeys(("p", "g"), (s["N"],)), _adamw
    ),
}  # fmt: skip
