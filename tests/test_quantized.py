"""Layers of 8 and 4 bits: near the float layer, exact about their own weights, moved and saved."""

import copy
import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgpt import quantized
from fastgpt.quantized import Int4Linear, Int8Embedding, Int8Linear, bytes_multiply_exactly
from tests.conftest import ROOT

LINEARS = (Int8Linear, Int4Linear)


def bound(x: Tensor, w: Tensor) -> Tensor:
    """(M, N): the most that rounding x to 255 steps of each row's range can change x w^T."""
    step = (x.amax(-1) - x.amin(-1)) / 255
    return (step / 2)[:, None] * w.abs().sum(-1)


@given(
    M=st.integers(1, 9), N=st.integers(1, 70), K=st.integers(1, 70),
    shift=st.sampled_from([0.0, 3.0, -50.0]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_int8_errs_as_far_as_rounding_does(
    M: int, N: int, K: int, shift: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear, x = nn.Linear(K, N, bias), torch.randn(M, K) + shift
    made = Int8Linear.of(linear)
    w = made.dequantized(torch.float64)
    step = linear.weight.double().abs().amax(1, keepdim=True) / 127
    assert bool(((w - linear.weight.double()).abs() <= step * 0.5001).all())
    gold = F.linear(x.double(), w, None if linear.bias is None else linear.bias.double())
    got = made(x)
    slack = 1e-5 * (x.double().abs() @ w.abs().t() + 1.0)
    assert bool(((got.double() - gold).abs() <= bound(x.double(), w) * 1.001 + slack).all())
    assert got.shape == (M, N) and got.dtype == x.dtype


@pytest.mark.parametrize("M", [1, 2, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, K", [(16, 32), (48, 96), (64, 256)])
def test_int4_is_the_product_of_its_weights(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(K, N)
    made, x = Int4Linear.of(linear).to(dtype), torch.randn(M, K).to(dtype)
    w = made.dequantized(torch.float64)
    groups = linear.weight.detach().view(N, -1, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (w - linear.weight.double()).abs().view(N, -1, 32).amax(-1)
    # A half step where the range is whole, 4.5 of them where a third of it was given up.
    assert bool((off <= 5.0 * step).all())
    assert (w - linear.weight.double()).norm() / linear.weight.double().norm() < 0.08
    gold = F.linear(x.double(), w, linear.bias.double())
    got = made(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), gold, rtol=0.03, atol=0.03)


def test_int4_takes_the_range_with_the_least_error() -> None:
    w = torch.randn(64, 256)
    whole = w.view(64, 8, 32)
    low = whole.amin(-1, keepdim=True)
    step = (whole.amax(-1, keepdim=True) - low) / 15
    plain = ((whole - low) / step).round() * step + low
    q, grid = quantized.quantize_int4(w)
    made = Int4Linear(q, grid).dequantized().view(64, 8, 32)
    assert (made - whole).square().sum() < 0.95 * (plain - whole).square().sum()


@pytest.mark.parametrize("kind", LINEARS)
def test_a_row_is_the_same_alone(kind: Any) -> None:
    made, x = kind.of(nn.Linear(64, 48)), torch.randn(7, 64) * torch.logspace(-3, 3, 7)[:, None]
    together = made(x)
    for row in range(7):
        alone = made(x[row : row + 1])[0]
        if kind is Int8Linear and bytes_multiply_exactly():
            assert torch.equal(alone, together[row])
        torch.testing.assert_close(alone, together[row], rtol=0.02, atol=1e-4 * 10.0 ** (row - 2))


@pytest.mark.parametrize("kind", LINEARS)
def test_rows_of_zeros_and_weights_of_zeros(kind: Any) -> None:
    linear = nn.Linear(32, 16)
    nn.init.zeros_(linear.weight)
    for x in (torch.zeros(3, 32), torch.randn(3, 32)):
        assert torch.equal(kind.of(linear)(x), linear.bias.detach().expand(3, 16))
    some = nn.Linear(32, 16)
    assert torch.equal(kind.of(some)(torch.zeros(3, 32)), some.bias.detach().expand(3, 16))


@pytest.mark.parametrize("kind", LINEARS)
def test_shapes_before_the_last_dimension_are_kept(kind: Any) -> None:
    made, x = kind.of(nn.Linear(32, 16)), torch.randn(2, 3, 32)
    assert made(x).shape == (2, 3, 16)
    strided = torch.randn(32, 3, 2).permute(2, 1, 0)
    assert torch.equal(made(strided), made(strided.contiguous()))
    assert made(x[:0]).shape == (0, 3, 16)


@pytest.mark.parametrize("kind", [*LINEARS, Int8Embedding])
def test_casts_leave_the_weights_and_copies_keep_them(kind: Any) -> None:
    embeds = kind is Int8Embedding
    made = kind.of(nn.Embedding(32, 32) if embeds else nn.Linear(32, 16))
    x = torch.arange(5) if embeds else torch.randn(2, 32)
    want = made(x)
    if embeds:
        made.product(torch.randn(1, 32))  # orders the weights
    for other in (copy.deepcopy(made), copy.deepcopy(made).bfloat16().float()):
        assert torch.equal(other.weight, made.weight) and torch.equal(other.scale, made.scale)
        assert other.scale.dtype == made.scale.dtype
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    fresh = kind.of(nn.Embedding(32, 32) if embeds else nn.Linear(32, 16))
    fresh(x)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), want)
    on_meta = copy.deepcopy(made).to("meta")
    assert on_meta.scale.dtype == made.scale.dtype
    on_meta.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(on_meta(x), want)


def test_an_embedding_looks_up_and_multiplies() -> None:
    table = nn.Embedding(50, 32)
    made, x = Int8Embedding.of(table), torch.randn(2, 3, 32)
    w = made.dequantized(torch.float64)
    assert torch.equal(made(torch.tensor([[4, 7]]))[0], made.dequantized()[[4, 7]])
    gold, far = x.double() @ w.t(), bound(x.double().flatten(0, 1), w).view(2, 3, 50)
    assert bool(((made.product(x).double() - gold).abs() <= far * 1.001 + 1e-5).all())


@pytest.mark.parametrize("sizes", [(33, 16), (32, 17)])
def test_int4_says_which_sizes_it_takes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^Int4Linear: in_features .*; got \d+ and \d+$"):
        Int4Linear.of(nn.Linear(*sizes))


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_cpu_whose_bytes_saturate_multiplies_numbers(isa: str) -> None:
    """oneDNN under an older instruction set, as on a CPU that has no more."""
    code = (
        "import torch\n"
        "from torch import nn\n"
        "from fastgpt.quantized import Int8Linear, bytes_multiply_exactly\n"
        "torch.manual_seed(0)\n"
        "linear, x = nn.Linear(64, 48), torch.randn(5, 64).abs()\n"
        "nn.init.uniform_(linear.weight, 0.9, 1.0)\n"
        "made = Int8Linear.of(linear)\n"
        "gold = x.double() @ made.dequantized(torch.float64).t() + linear.bias.double()\n"
        "off = ((made(x).double() - gold).abs().max() / gold.abs().max()).item()\n"
        "print(bytes_multiply_exactly(), off < 0.01)"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    run = [sys.executable, "-c", code]
    got = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=env)
    exact, near = got.stdout.split()
    assert near == "True", got.stderr
    if "fma" in torch.backends.cpu.get_cpu_capability().lower() or torch.cpu._is_avx512_supported():
        assert exact == "False"
