"""Modules that patch was not told of: it takes those that compute what an op does, no others."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import layers, patch
from fastgpt.ops.ffn import ACTIVATIONS, activate
from fastgpt.patching.feed_forward import activation_module
from tests.foreign import C, NanoMLP, NanoNorm


class MyNorm(nn.Module):
    """One that has its epsilon under a name of its own, and another class name."""

    def __init__(self, n: int, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(n)), nn.Parameter(torch.rand(n))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        u = x - x.mean(-1, keepdim=True)
        return u / (u.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt() * self.weight + self.bias


class Scale(nn.Module):
    """No norm, whatever its parameters look like."""

    def __init__(self, n: int = C) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OnePlusRMSNorm(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1.0 + self.weight, 1e-6)


class MyRMS(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Functional(nn.Module):
    def __init__(self, middle: Any = None, scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(C, 2 * C), nn.Linear(2 * C, C, bias=False), scale
        self.middle = nn.Identity() if middle is None else middle

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.gelu(self.a(x), approximate="tanh"))
        return self.b(y) * self.scale if self.scale != 1.0 else self.b(y)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(x) * torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


class Shifted(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(torch.relu(self.fc1(x + 1.0))))  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Does something beside computing its result, which must go on being done."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Mine(layers.LayerNorm):
    pass


class FasterNorm(MyNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)


@pytest.mark.parametrize(
    "module, replace, runs",
    [
        (MyNorm(C), {}, "layer_norm"),
        (MyNorm(C), {MyNorm: layers.LayerNorm}, "layer_norm"),
        (MyNorm(C), {MyNorm: None}, ""),
        (MyNorm(C), {MyNorm: FasterNorm}, "FasterNorm"),
        (MyRMS(), {}, ""),  # nothing in its name says norm
        (MyRMS(), {MyRMS: layers.RMSNorm}, "rms_norm"),
        (OnePlusRMSNorm(), {}, ""),
        (Scale(), {}, ""),
        (NanoNorm(C, bias=False), {}, "layer_norm"),
        (nn.LayerNorm(C), {}, "layer_norm"),
        (nn.LayerNorm((4, C), eps=1e-3), {}, "layer_norm"),
        (nn.LayerNorm(C, elementwise_affine=False), {}, "layer_norm"),
        (nn.RMSNorm(C), {}, "rms_norm"),
        (nn.RMSNorm(C, elementwise_affine=False), {}, "rms_norm"),
        (nn.BatchNorm1d(4), {}, ""),
        (nn.GroupNorm(2, 4), {}, ""),
        (Mine(C), {}, ""),
        (Functional(), {}, ""),  # nn.Identity is a step that is not expected
        (nn.Sequential(nn.Linear(C, 64), nn.ReLU(), nn.Linear(64, 8)), {}, "ffn (relu)"),
        (nn.Sequential(nn.Linear(C, 64), nn.Tanh(), nn.Linear(64, 8)), {}, ""),
        (nn.Sequential(nn.Linear(C, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 8)), {}, ""),
        (Gated(), {}, "ffn (gated relu)"),
        (Gated(), {Gated: layers.GatedMLP}, "ffn (gated relu)"),
        (NanoMLP(0.1), {NanoMLP: layers.MLP}, "ffn (gelu)"),
        (Functional(nn.Dropout()), {}, ""),
        (Functional(scale=2.0), {}, ""),
        (Shifted(), {}, ""),
        (Counting(), {}, ""),
        (nn.utils.parametrizations.weight_norm(nn.LayerNorm(C)), {}, "layer_norm"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)  # fmt: skip
def test_what_is_recognised_computes_the_same(module: nn.Module, replace: Any, runs: str) -> None:
    x = torch.randn(3, 4, C, requires_grad=True)
    module = copy.deepcopy(module).eval()
    before = module(x)
    grads = torch.autograd.grad(before.square().sum(), [x, *module.parameters()])
    report = patch(module, replace=replace)
    assert report.lines[0].runs == runs, report
    y = module(x)
    torch.testing.assert_close(y, before, atol=1e-5, rtol=1e-5)
    again = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(again, grads, atol=1e-4, rtol=1e-4)


def test_recognising_changes_no_buffer() -> None:
    module = Counting()
    patch(module)
    assert module.calls == 0
    module(torch.ones(1, C))
    assert module.calls == 1


def test_activations_are_known_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    known = {name: activation_module(ACT2FN[name]) for name in ACT2FN if name not in ("xielu",)}
    x = torch.randn(100, dtype=torch.float64) * 3
    for name, activation in known.items():
        if activation is not None:
            torch.testing.assert_close(ACT2FN[name](x), activate(x, activation))
    assert {n for n, a in known.items() if a == "gelu_tanh"} == {
        "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
    }  # fmt: skip
    assert {a for a in known.values() if a} == set(ACTIVATIONS)
