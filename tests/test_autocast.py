"""Autocast and gradient scaling: dtypes are those that torch's own operators give."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt import GPT, GPTConfig, optim
from fastgpt.ops import backend
from tests.op_cases import CASES, C, Case, registered

LOW = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("x", "q", "k", "v", "logits")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _embedding(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return F.embedding(idx, wte) + wpe.narrow(0, 0, idx.shape[1])


def _ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


THEIRS: dict[str, Callable[..., Tensor]] = {
    "attention": _attention,
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias),
    "rms_norm": lambda x, weight: F.rms_norm(x, (C,), weight),
    "embedding": _embedding,
    "ffn": _ffn,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": lambda x, weight, target: _cross_entropy(F.linear(x, weight), target),
}
COMPARED = [case for case in CASES if case.name in THEIRS]


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, which turns itself off where there is no GPU."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 in", "16 bits in"])
@pytest.mark.parametrize("device", ["cpu", "fake cuda", "kernels on cpu"])
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_an_op_gives_the_dtype_of_torchs_own(
    case: Case, device: str, narrow: bool, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters are float32. On CUDA norms give float32, on CPUs what they were given."""
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    x = {name: t.detach() for name, t in case.leaves().items()}
    x |= {name: t.to(low) for name, t in x.items() if narrow and name in ACTIVATIONS}
    kind = "cuda" if "cuda" in device else "cpu"
    way: AbstractContextManager[object] = nullcontext()
    if kind == "cuda":
        way = FakeTensorMode()
    elif device != "cpu":
        way = registered()
    with way, autocast(kind, low):
        if kind == "cuda":
            x = {n: torch.empty(t.shape, dtype=t.dtype, device=kind) for n, t in x.items()}
        got, want = case.outputs(**x)[0], THEIRS[case.name](**x)
    assert got.dtype == want.dtype and got.device.type == kind


@pytest.mark.parametrize("low", LOW, ids=str)
def test_the_gradient_of_a_parameter_has_its_dtype(low: torch.dtype) -> None:
    for case in COMPARED:
        x = case.leaves()
        with registered(), autocast("cpu", low):
            (y, *_) = case.outputs(**x)
        for t in case.wanted(x):
            (grad,) = torch.autograd.grad(y.sum(), t, retain_graph=True)
            assert grad.dtype == t.dtype, case.name


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("path", [nullcontext, registered], ids=["plain", "kernels' way"])
def test_a_model_learns_with_a_scaled_loss(
    low: torch.dtype, path: Callable[[], AbstractContextManager[None]]
) -> None:
    """GradScaler, unscaled and clipped within the optimizer; a step with infinities is skipped."""
    model = GPT(GPTConfig(16, 31, n_layer=1, n_head=2, n_embd=16))
    optimizer = model.configure_optimizer(3e-2, max_grad_norm=1.0)
    assert isinstance(optimizer, optim.AdamW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randint(31, (4, 17))
    losses = []
    for n in range(12):
        with path(), torch.autocast("cpu", low):
            loss = model(x[:, :-1], x[:, 1:])
        scaler.scale(loss).backward()
        if n == 3 and model.ln_f.weight.grad is not None:
            before = model.wte.weight.detach().clone()
            model.ln_f.weight.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if n == 3:
            assert torch.equal(model.wte.weight, before)
            assert scaler.get_scale() == 2.0**9
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_recompute_makes_again_what_autocast_made() -> None:
    """Backward runs outside autocast: a norm's output must come back in the dtype it had."""
    grads = []
    for recompute in (1, 2):
        torch.manual_seed(0)
        model = GPT(GPTConfig(16, 31, 2, 2, 16, recompute=recompute))
        x = torch.randint(31, (2, 16))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, x)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)
