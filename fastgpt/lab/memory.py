"""Bytes that an op or a model keeps for its backward pass, measured on fake tensors.

Autograd's saved-tensor hooks see every tensor that is kept. Counted is what its storage takes,
each storage once, without parameters and their views. Fake tensors have shapes and storages
but no memory: a model of any size is measured in a second. They are on the device cpu, because
on a fake cuda device autograd ends the process.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module

from fastgpt import ops
from fastgpt.lab.cases import Sizes
from fastgpt.lab.launch import DTYPES
from fastgpt.lab.result import Saved
from fastgpt.ops import backend

Call = Callable[[], Any]


def saved_bytes(call: Call, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that call() keeps for backward, without those of parameters.

    Args:
        call: runs a forward pass and returns its outputs, which stay alive while it is counted.
        parameters: what is there anyway.
    """
    known = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = call()
    total = sum(kept.values())
    del outputs
    return total


def of_model(build: Callable[[], tuple[Module, Call]]) -> int:
    """Bytes that a model keeps for one backward pass.

    Args:
        build: makes the model and the call of it; runs under fake tensors.
    """
    with FakeTensorMode():
        model, call = build()
        return saved_bytes(call, model.parameters())


def _op(name: str, s: Sizes) -> tuple[Call, list[Tensor]]:
    """A call of an op on fake tensors and its parameters."""
    dtype = DTYPES[s["dtype"]]

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    if name == "attention":
        q, k, v = leaf(s["B"], s["T"], 3, s["H"], s["D"]).unbind(2)
        return lambda: ops.attention(q, k, v, dropout_p=s["dropout_p"]), []
    if name == "layer_norm":
        x, h = leaf(s["M"], s["N"]), leaf(s["M"], s["N"])
        w, b = (leaf(s["N"], dtype=torch.float32) for _ in range(2))
        res = h if s["residual"] else None
        return lambda: ops.layer_norm(x, w, b, residual=res, dropout_p=s["dropout_p"]), [w, b]
    if name == "rms_norm":
        x, h, w = leaf(s["M"], s["N"]), leaf(s["M"], s["N"]), leaf(s["N"])
        return lambda: ops.rms_norm(x, w, residual=h, dropout_p=s["dropout_p"]), [w]
    if name == "embedding":
        wte, wpe = leaf(s["V"], s["C"]), leaf(s["T"], s["C"])
        ids = torch.zeros(s["B"], s["T"], dtype=torch.int64)
        return lambda: ops.embedding(ids, wte, wpe, dropout_p=s["dropout_p"]), [wte, wpe]
    if name.endswith("cross_entropy"):
        target = torch.zeros(s["M"], dtype=torch.int64)
        options = {"label_smoothing": s["label_smoothing"], "z_loss": s["z_loss"]}
        options["softcap"] = s["softcap"] or None
        if name == "cross_entropy":
            logits = leaf(s["M"], s["V"])
            return lambda: ops.cross_entropy(logits, target, **options), []
        x, w = leaf(s["M"], s["C"]), leaf(s["V"], s["C"])
        return lambda: ops.linear_cross_entropy(x, w, target, **options), [w]
    if name == "rotary":
        B, T, H, G, D = s["B"], s["T"], s["H"], s["Hkv"], s["D"]
        q, k, _ = leaf(B, T, H + 2 * G, D).split([H, G, G], 2)
        cos, sin = (torch.empty(T, D // 2) for _ in range(2))
        wq, wk = (leaf(D) if s["norm"] == "rms" else None for _ in range(2))
        weights = [w for w in (wq, wk) if w is not None]
        return lambda: ops.rotary(q, k, cos, sin, q_weight=wq, k_weight=wk), weights
    if name == "quantized_linear":
        row, bits, group = leaf(s["M"], s["K"]), s["bits"], s["group"] or 32
        byte = torch.int8 if bits == 8 else torch.uint8
        weight = torch.zeros(s["N"], s["K"] * bits // 8, dtype=byte)
        groups = s["K"] // group
        shape = (s["N"], groups, 2) if bits == 4 else (s["N"], groups) if s["group"] else (s["N"],)
        scale = torch.zeros(shape)
        return lambda: ops.quantized_linear(row, weight, scale), [weight, scale]
    x = leaf(s["M"], s["C"])
    w1, b1, w2, b2 = (
        leaf(*shape) for shape in ((s["F"], s["C"]), (s["F"],), (s["C"], s["F"]), (s["C"],))
    )
    return lambda: ops.ffn(x, w1, b1, w2, b2, activation=s["activation"]), [w1, b1, w2, b2]


def of_op(name: str, sizes: Sizes) -> list[Saved]:
    """What an op of fastgpt keeps, if it has a backward: by its kernels, and in plain PyTorch."""
    if name in ("adamw", "attention_decode"):
        return []
    shape = ", ".join(f"{k}={v}" for k, v in sizes.items())
    rows = []
    for provider in ("fastgpt", "PyTorch"):
        with FakeTensorMode(), _path(provider):
            call, parameters = _op(name, sizes)
            rows.append(Saved(name, shape, provider, saved_bytes(call, parameters)))
    return rows


def gpt2(B: int = 8, T: int = 1024) -> list[Saved]:
    """What GPT-2 small keeps for a training step in bfloat16: by the kernels, in plain PyTorch."""
    from fastgpt.model import GPT, GPTConfig

    def build() -> tuple[Module, Call]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be moved to a dtype
        try:
            model = GPT(GPTConfig.preset("gpt2"))
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros(B, T, dtype=torch.int64)
        return model, lambda: model(ids, ids)

    rows = []
    for provider in ("fastgpt", "PyTorch"):
        with _path(provider):
            rows.append(Saved("GPT-2 124M", f"B={B}, T={T}, bf16", provider, of_model(build)))
    return rows


class _path:
    """The path of a provider: kernels as on a GPU, or plain PyTorch."""

    def __init__(self, provider: str) -> None:
        self.contexts = (
            (backend.rehearsal(), backend.use("triton"))
            if provider == "fastgpt"
            else (backend.use("reference"),)
        )

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)
