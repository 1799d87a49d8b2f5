"""Blocks of rows of a linear layer on a CPU give torch's numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import cpu_linear
from fastgpt.ops.cpu_linear import linear
from tests.check import assert_matches


def made(K: int, N: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    x = {"x": torch.randn(2, 391, K, dtype=dtype), "weight": torch.randn(N, K, dtype=dtype)}
    return x | ({"bias": torch.randn(N, dtype=dtype)} if bias else {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K, N", [(48, 12), (12, 48), (24, 24)])
def test_values_and_gradients_err_no_more_than_torch(K: int, N: int, bias: bool) -> None:
    def through(f: Any) -> Any:
        return lambda x, weight, bias=None: f(x, weight, bias)

    assert_matches(through(linear), through(F.linear), made(K, N, bias))


def test_under_autocast_weights_get_float32_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = made(48, 12, True, torch.float32).values()
    calls: list[Tensor] = []
    product = cpu_linear._product

    def counted(*args: Any) -> Tensor:
        calls.append(product(*args))
        return calls[-1]

    monkeypatch.setattr(cpu_linear, "_product", counted)
    grads = []
    for f in (F.linear, linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            y = f(*leaves)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads.append([t.grad for t in leaves])
    assert len(calls) == 2  # forward and the gradient of x
    for want, got in zip(*grads, strict=True):
        assert want is not None and got is not None and got.dtype == torch.float32
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_second_derivatives_are_torchs() -> None:
    second = []
    for f in (F.linear, linear):
        torch.manual_seed(0)
        x, weight, bias = (t.requires_grad_() for t in made(48, 12, True).values())
        (dx,) = torch.autograd.grad(f(x, weight, bias).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        second.append(weight.grad)
    assert second[0] is not None and second[1] is not None
    assert (second[1] - second[0]).float().norm() <= 2e-2 * second[0].float().norm()
