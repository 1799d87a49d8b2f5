"""What one training step of GPT-2 takes besides its kernels' insides: launches, memory, host time.

**Launches.** Forward, backward, clipping of the gradients' norm and the optimizer run on the CPU
under a TorchDispatchMode. A call of an operator counts as one launch if it writes to an argument or
returns memory that none of its arguments has; allocation alone (`empty`) does not, nor do views,
shapes and reads of one number. So an operator that needs several kernels on a GPU (attention's and
layer norm's backward, the embedding's) counts once, which is kind to PyTorch; but the multi-tensor
operators of clipping and AdamW count as often as ATen launches them for GPT-2 small's parameters
(`pieces`), and both counts are given. A Triton kernel counts at each launch. Dropout is off,
parameters are bfloat16, without autocast.

**Bytes for backward** come from saved-tensor hooks on fake tensors (`fastgpt.lab.memory`): what a
third layer adds to two.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fastgpt.lab.compile import present
from fastgpt.lab.memory import of_model
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops import backend
from fastgpt.optim import AdamW

Step = Callable[[], Any]
_BLOCK = (3 * 768 * 768, 3 * 768, 768 * 768, 768, *(2 * (4 * 768 * 768,)), 4 * 768, *(5 * (768,)))
GPT2_SIZES = (50257 * 768, 1024 * 768, *(12 * _BLOCK), 768, 768)  # of its parameters, elements
PLAIN, HUGGING_FACE = "nanoGPT-like", "Hugging Face, SDPA"
PATCHED = "Hugging Face, Liger's layer norm and torch's GELU"
# They allocate, or write what is said of a tensor and not its elements.
NO_KERNEL = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach_", "set_",
    "resize_", "requires_grad_",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel on a GPU; `names` holds them in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.lists: list[int] = []  # of each multi-tensor operator, how many lists it works on

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgpt":  # its kernels are counted where they are launched
            kernel = torch.library.get_kernel(func, "CPU")
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return kernel.call_boxed(keys, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name not in NO_KERNEL and launches_kernel(func, (args, kwargs), out):
            self.names.append(str(func))
            lists = [a for a in (*args, *kwargs.values()) if isinstance(a, list | tuple)]
            if name.startswith(("_foreach", "_fused")):
                self.lists.append(sum(bool(a) and isinstance(a[0], Tensor) for a in lists))
        return out


def launches_kernel(func: Any, inputs: Any, out: Any) -> bool:
    """Whether an operator writes: to an argument, or to memory that no argument has."""
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return True
    known = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    return any(t.untyped_storage()._cdata not in known for t in made)


def pieces(sizes: Sequence[int], depth: int) -> int:
    """Launches of a multi-tensor operator: a launch takes so many tensors, and so many chunks.

    As ATen's MultiTensorApply.cuh: chunks of 65536 elements, 320 of them a launch, and at most 110,
    64, 48, 36 or 30 tensors where an operator works on 1, 2, 3, 4 or 5 lists.
    """
    most = (110, 64, 48, 36, 30)[min(depth, 5) - 1]
    launches = tensors = chunks = 0
    for n, size in enumerate(sizes):
        tensors += 1
        count = -(-size // 65536)
        for chunk in range(count):
            chunks += 1
            last = chunk == count - 1
            if chunks == 320 or (tensors == most and last) or (n == len(sizes) - 1 and last):
                launches += 1
                chunks, tensors = 0, 0 if last else 1
    return launches


@dataclass(frozen=True)
class Counted:
    """Launches of one step: of PyTorch's operators and of Triton kernels.

    Attributes:
        extra: launches beyond one of the multi-tensor operators, at GPT-2 small's sizes.
    """

    provider: str
    operators: int
    kernels: int
    extra: int = 0

    @property
    def launches(self) -> int:
        return self.operators + self.kernels

    @property
    def split(self) -> int:
        """With the multi-tensor operators as many times as they launch."""
        return self.launches + self.extra


@contextmanager
def nothing_runs() -> Iterator[list[str]]:
    """Inside, a Triton launch is noted by its kernel's name, and does nothing."""
    names: list[str] = []
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    with present("sm_90"):
        JITFunction.run = run
        try:
            yield names
        finally:
            JITFunction.run = real


@contextmanager
def as_on_a_gpu() -> Iterator[list[str]]:
    """Inside, fastgpt's ops take their kernels, which do nothing."""
    with nothing_runs() as names, backend.rehearsal(), backend.use("triton"):
        yield names


def count(provider: str, step: Step, kernels: bool = False) -> Counted:
    """Launches of a step. It runs once before, since an optimizer's first step makes its state."""
    context: AbstractContextManager[list[str]] = as_on_a_gpu() if kernels else nullcontext([])
    with context as found:
        step()
        found.clear()
        with Launches() as mode:
            step()
        extra = sum(pieces(GPT2_SIZES, max(1, depth)) - 1 for depth in mode.lists)
        return Counted(provider, len(mode.names), len(found), extra)


# Models


class Plain(nn.Module):
    """GPT-2 as nanoGPT writes it: layer norm, one product for q, k and v, SDPA, tanh GELU."""

    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, block: int) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.h = nn.ModuleList(
            nn.ModuleList(  # ln_1, qkv, out, ln_2, up, down
                [
                    nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width),
                    nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width),
                ]
            )
            for _ in range(layers)
        )  # fmt: skip
        self.ln_f = nn.LayerNorm(width)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        B, T = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        for block in self.h:
            ln_1, qkv, out, ln_2, up, down = list(block)  # type: ignore[call-overload]
            q, k, v = qkv(ln_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(B, T, -1))
            x = x + down(F.gelu(up(ln_2(x)), approximate="tanh"))
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def hugging_face(layers: int, heads: int, width: int, vocabulary: int, block: int) -> nn.Module:
    """Hugging Face's GPT-2 with SDPA, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=block, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(config)

        def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
            return self.model(idx, labels=targets).loss

    return Loss()


def with_liger(model: nn.Module) -> nn.Module:
    """Liger's layer norm in every place, as its patching would put it."""
    from liger_kernel.transformers import LigerLayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, LigerLayerNorm(child.normalized_shape[0], eps=child.eps))
            elif type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def ours(layers: int, heads: int, width: int, vocabulary: int, block: int, **how: Any) -> nn.Module:
    return GPT(GPTConfig(block, vocabulary, layers, heads, width, **how))


def in_bfloat16(make: Callable[[], nn.Module]) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be moved to a dtype
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


# Launches


def training_step(model: nn.Module, how: str) -> Step:
    """Forward, backward, clipping, AdamW, zero_grad. how: "foreach", "fused" or "own"."""
    idx = torch.zeros(1, 16, dtype=torch.int64)
    params = list(model.parameters())
    if how == "own":
        optimizer: Any = AdamW(params, lr=1e-3, max_grad_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(params, lr=1e-3, **{how: True})

    def step() -> None:
        model(idx, idx).backward()
        if how != "own":  # which clips by itself
            nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def launches(layers: int = 12) -> list[Counted]:
    """Launches of a step of GPT-2's depth; width and lengths, which do not matter, are small."""
    shape = (layers, 2, 32, 64, 16)
    rows = []
    makers: list[tuple[str, Callable[..., nn.Module]]] = [("nanoGPT-like", Plain)]
    if find_spec("transformers"):
        makers.append(("Hugging Face", hugging_face))
    for name, make in makers:
        for how in ("foreach", "fused"):
            torch.manual_seed(0)
            model = in_bfloat16(partial(make, *shape))
            rows.append(count(f"{name}, {how} AdamW", training_step(model, how)))
    model = in_bfloat16(partial(ours, *shape))
    rows.append(count("fastgpt", training_step(model, "own"), kernels=True))
    return rows


# Memory


def a_layers_bytes(make: Callable[..., nn.Module], kernels: bool = False, **how: Any) -> float:
    """Bytes for backward that one more layer of GPT-2 small adds, a token."""
    B, T, C = 2, 1024, 768

    def measured(layers: int) -> int:
        def build() -> tuple[nn.Module, Step]:
            model = in_bfloat16(lambda: make(layers, 12, C, 50257, T, **how))
            idx = torch.zeros(B, T, dtype=torch.int64)
            return model, lambda: model(idx, idx)

        with as_on_a_gpu() if kernels else nothing_runs():
            return of_model(build)

    return (measured(3) - measured(2)) / (B * T)


def recompute_levels() -> tuple[int, ...]:
    """The levels of GPTConfig.recompute, where there is such a thing."""
    return (0, 1, 2) if "recompute" in {f.name for f in fields(GPTConfig)} else ()


def saved() -> dict[str, float]:
    """Bytes saved for backward, a token and layer, of GPT-2 small in bfloat16."""
    found = {PLAIN: a_layers_bytes(Plain)}
    if find_spec("transformers"):
        found[HUGGING_FACE] = a_layers_bytes(hugging_face)
        if find_spec("liger_kernel"):

            def patched(*shape: int) -> nn.Module:
                return with_liger(hugging_face(*shape))

            found[PATCHED] = a_layers_bytes(patched)
    found["fastgpt"] = a_layers_bytes(ours, kernels=True)
    for level in recompute_levels()[1:]:
        found[f"fastgpt, recompute={level}"] = a_layers_bytes(ours, kernels=True, recompute=level)
    return found
