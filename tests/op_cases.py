"""Every op with its options on tiny inputs: the table that tests of torch's own tools walk over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import backend
from fastgpt.quantized import quantize_int4, quantize_int8

Inputs = dict[str, Tensor]
V, C = 11, 8  # vocabulary, width; a head has 8 elements


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        name: the op's, and what is peculiar.
        call: the public function with its options bound, on tensors by keyword.
        inputs: of a size n, which every test may choose: lengths and numbers of rows follow it.
        fixed: floating inputs that take no gradient.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[[int], Inputs]
    fixed: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return self.name.split()[0]

    def outputs(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        made = self.call(**inputs)
        return made if isinstance(made, tuple) else (made,)

    def leaves(self, n: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        """Inputs, those that take gradient in dtype and asking for it; a table may be float64."""
        made = {
            name: t.to(device, dtype if name in TABLE and dtype == torch.float64 else t.dtype)
            for name, t in self.inputs(n).items()
        }
        return {
            name: t.to(dtype).requires_grad_()
            if t.is_floating_point() and name not in self.fixed
            else t
            for name, t in made.items()
        }

    def wanted(self, inputs: Inputs) -> list[Tensor]:
        return [t for t in inputs.values() if t.requires_grad]


def _qkv(n: int, groups: int = 1) -> Inputs:
    q, k, v = (torch.randn(2, n, h, 8) for h in (2, 2 // groups, 2 // groups))
    return {"q": q, "k": k, "v": v}


def _scored(n: int) -> Inputs:
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, -1] = False
    return _qkv(n) | {
        "bias": torch.randn(2, n, n)[:, None],
        "alibi_slopes": torch.tensor([0.5, 0.25]),
        "key_mask": mask,
    }


def _documents(n: int) -> Inputs:
    return _qkv(n) | {"document_ids": (torch.arange(n) // 3).repeat(2, 1)}


def _packed(n: int) -> Inputs:
    q, k, v = (torch.randn(n + 4, 2, 8) for _ in range(3))
    ends = torch.tensor([0, n, n + 4], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": ends, "cu_seqlens_k": ends}


def _packed_attention(q: Tensor, cu_seqlens_q: Tensor, **rest: Tensor) -> Any:
    longest = max(q.shape[0] - 4, 4)
    return ops.attention_varlen(
        q, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=longest, max_seqlen_k=longest, **rest
    )


def _norm(n: int, *names: str) -> Inputs:
    shapes = {"x": (2, n, C), "residual": (2, n, C), "weight": (C,), "bias": (C,)}
    shapes["x_bias"] = (C,)
    return {name: torch.randn(shapes[name]) for name in ("x", "weight", *names)}


def _tables(n: int) -> Inputs:
    tables = {"wte": torch.randn(V, C), "wpe": torch.randn(40, C)}
    return {"idx": torch.randint(V, (2, n)), **tables}


def _turned(n: int, *names: str) -> Inputs:
    cos, sin = ops.rotary_table(n, 8)
    qk = {"q": torch.randn(2, n, 2, 8), "k": torch.randn(2, n, 1, 8), "cos": cos, "sin": sin}
    return qk | {name: torch.randn(8) for name in names}


def _ffn(n: int, *names: str) -> Inputs:
    F = 12
    shapes = {"x": (2, n, C), "w1": (F, C), "b1": (F,), "w2": (C, F), "b2": (C,)}
    shapes |= {"w_gate": (F, C), "b_gate": (F,)}
    return {name: torch.randn(shapes[name]) for name in ("x", "w1", "b1", "w2", "b2", *names)}


def _bytes(n: int, bits: int) -> Inputs:
    K = C if bits == 8 else 32
    w, x = torch.randn(V, K), {"x": torch.randn(2, n, K), "bias": torch.randn(V)}
    weight, scale = quantize_int8(w) if bits == 8 else quantize_int4(w)
    return x | {"weight": weight, "scale": scale}


def _targets(n: int) -> Tensor:
    target = torch.randint(V, (2, n))
    target[0, 0] = -100
    return target


def _logits(n: int) -> Inputs:
    return {"logits": torch.randn(2, n, V), "target": _targets(n)}


def _head(n: int, *names: str) -> Inputs:
    shapes = {"x": (2, n, C), "weight": (V, C), "bias": (V,)}
    made = {name: torch.randn(shapes[name]) for name in ("x", "weight", *names)}
    return made | {"target": _targets(n)}


def _seeded(inputs: Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    return lambda n: inputs(n) | {"seed": torch.tensor([7])}


CAPPED: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
TABLE = ("cos", "sin")
SLOPES = ("alibi_slopes",)
CASES = [
    Case("attention", ops.attention, _qkv),
    Case(
        "attention grouped, window, lse",
        partial(ops.attention, window=3, return_lse=True),
        partial(_qkv, groups=2),
    ),
    Case("attention bias, mask, softcap", partial(ops.attention, softcap=5.0), _scored, SLOPES),
    Case("attention documents", partial(ops.attention, causal=False), _documents),
    Case("attention dropout", partial(ops.attention, dropout_p=0.3), _seeded(_qkv)),
    Case(
        "attention packed",
        partial(ops.attention_packed, n_head=2),
        lambda n: {"qkv": torch.randn(2, n, 4, 8)},
    ),
    Case("attention_varlen", _packed_attention, _packed),
    Case("layer_norm", ops.layer_norm, lambda n: _norm(n, "bias")),
    Case(
        "layer_norm residual, dropout",
        partial(ops.layer_norm, dropout_p=0.3),
        _seeded(lambda n: _norm(n, "bias", "residual", "x_bias")),
    ),
    Case("rms_norm", ops.rms_norm, _norm),
    Case(
        "rms_norm residual, dropout",
        partial(ops.rms_norm, dropout_p=0.3),
        _seeded(lambda n: _norm(n, "residual", "x_bias")),
    ),
    Case("embedding", ops.embedding, _tables),
    Case("embedding dropout", partial(ops.embedding, dropout_p=0.3), _seeded(_tables)),
    Case("rotary", ops.rotary, _turned, TABLE),
    Case("rotary norm", ops.rotary, lambda n: _turned(n, "q_weight", "k_weight"), TABLE),
    Case("ffn", ops.ffn, _ffn),
    Case(
        "ffn gated, recompute",
        partial(ops.ffn, activation="silu", recompute=2),
        lambda n: _ffn(n, "w_gate", "b_gate"),
    ),
    Case("quantized_linear", ops.quantized_linear, partial(_bytes, bits=8), ("scale",)),
    Case(
        "quantized_linear 4 bits, activation",
        partial(ops.quantized_linear, activation="gelu"),
        partial(_bytes, bits=4),
        ("scale",),
    ),
    Case("cross_entropy", ops.cross_entropy, _logits),
    Case(
        "cross_entropy each row",
        partial(ops.cross_entropy, reduction="none", **CAPPED),
        _logits,
    ),
    Case("linear_cross_entropy", ops.linear_cross_entropy, _head),
    Case(
        "linear_cross_entropy each row",
        partial(ops.linear_cross_entropy, reduction="none", chunk=4, **CAPPED),
        lambda n: _head(n, "bias"),
    ),
]
NAMES = [case.name for case in CASES]


@contextmanager
def registered() -> Iterator[None]:
    """Inside, every op goes the way of its kernel: autograd Function and registered op, whose
    implementation, where there is no GPU, is plain PyTorch. Any dtype, float64 too."""
    chosen = mock.patch.object(backend, "kernel_chosen", lambda op, x, obstacle=None: True)
    with chosen, mock.patch.object(backend, "kernels_run", lambda x: True):
        yield


@contextmanager
def plain() -> Iterator[None]:
    """Inside, every op is plain PyTorch."""
    with ops.use("reference"):
        yield


PATHS = [plain, registered]
