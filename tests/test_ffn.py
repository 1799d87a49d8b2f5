"""ffn: specification, PyTorch path, kernels, registered ops, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.ops import ffn, ffn_ref, register_flop_formulas
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.ffn import ACTIVATIONS, FFNFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES


def inputs(
    M: int, C: int, F: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    x = {"x": torch.randn(M, C), "w1": torch.randn(F, C) * C**-0.5, "b1": torch.randn(F)}
    x |= {"w2": torch.randn(C, F) * F**-0.5, "b2": torch.randn(C)}
    return {n: t.to(device, dtype) for n, t in x.items()}


def kernel(**kwargs: Any) -> Any:
    def op(**x: Any) -> Tensor:
        with fastgpt.use("triton"):
            return ffn(x["x"], x["w1"], x.get("b1"), x["w2"], x.get("b2"), **kwargs)

    return op


def reference(**kwargs: Any) -> Any:
    def op(**x: Any) -> Tensor:
        return ffn_ref(x["x"], x["w1"], x.get("b1"), x["w2"], x.get("b2"), **kwargs)

    return op


# ------------------------------------------------------------------ the specification


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: str) -> None:
    x = inputs(5, 8, 6, dtype=torch.float64)
    u = x["x"] @ x["w1"].T + x["b1"]
    act = {
        "relu": u.clamp(min=0),
        "gelu": u * torch.special.ndtr(u),
        "gelu_tanh": u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
    }[activation]
    want = act @ x["w2"].T + x["b2"]
    assert torch.allclose(ffn_ref(**x, activation=activation), want, atol=1e-12)
    assert torch.allclose(ffn(**x, activation=activation), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(dtype: torch.dtype) -> None:
    loose = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2}
    x = [t.requires_grad_() for t in inputs(3, 4, 5, dtype=dtype).values()]
    assert torch.autograd.gradcheck(ffn, x, **({} if dtype == torch.float64 else loose))


# ------------------------------------------------------------------ the kernels

# The fused product takes 16-bit dtypes and up to 2048 columns; else the vendor's and a pointwise.
SHAPES = [(1, 1, 1), (5, 70, 33), (33, 24, 50), (70, 40, 33), (2, 2056, 9)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_matches(
    activation: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    x = inputs(*shape, dtype=dtype, device=device)
    assert_matches(kernel(activation=activation), reference(activation=activation), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_matches_without_biases(dtype: torch.dtype, device: str) -> None:
    x = inputs(9, 16, 20, dtype=dtype, device=device)
    del x["b1"], x["b2"]
    assert_matches(kernel(), reference(), x)


@pytest.mark.gpu
@settings(max_examples=15 if INTERPRET else 6)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    M, C, F = (draw(st.integers(1, 70)) for _ in range(3))
    x = inputs(M, C, F, dtype=draw(st.sampled_from(DTYPES)), device=device)
    for name in ("x", "w1", "w2"):
        how = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        if how == "transposed":
            x[name] = x[name].T.contiguous().T
        elif how == "sliced":
            x[name] = torch.cat([x[name]] * 2, 1)[:, 1 : 1 + x[name].shape[1]]
    kwargs = {"activation": draw(st.sampled_from(ACTIVATIONS)), "recompute": draw(st.booleans())}
    assert_matches(kernel(**kwargs), reference(activation=kwargs["activation"]), x)


@pytest.mark.gpu
def test_recompute_changes_what_is_kept_and_no_bit(device: str) -> None:
    x = inputs(9, 16, 64, dtype=DTYPES[-1], device=device)
    kept: list[int] = []
    grads = []
    for recompute in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        kept.append(0)

        def keep(t: Tensor) -> Tensor:
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = kernel(recompute=recompute)(**leaves)
        grads.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    assert kept[1] - kept[0] == 9 * 64
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
def test_expanded_gradient_and_leading_dimensions(device: str) -> None:
    x = inputs(6, 8, 12, device=device)
    x["x"] = x["x"].view(2, 3, 8)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    y = kernel()(**leaves)
    assert y.shape == (2, 3, 8)
    got = torch.autograd.grad(y.sum(), list(leaves.values()))
    want = torch.autograd.grad(reference()(**leaves).sum(), list(leaves.values()))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-5)


@pytest.mark.gpu
def test_large_pre_activations_stay_finite(device: str) -> None:
    x = inputs(4, 8, 8, device=device)
    x["x"] = x["x"] * 1e4
    for activation in ACTIVATIONS:
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        y = kernel(activation=activation)(**leaves)
        grads = torch.autograd.grad(y.sum(), list(leaves.values()))
        assert all(t.isfinite().all() for t in (y, *grads))
        assert torch.allclose(y, reference(activation=activation)(**x), rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
def test_gradients_that_are_not_needed_are_not_made(device: str) -> None:
    x = inputs(5, 8, 12, device=device)
    x["x"].requires_grad_()
    got = torch.autograd.grad(kernel()(**x).square().sum(), x["x"])[0]
    want = torch.autograd.grad(reference()(**x).square().sum(), x["x"])[0]
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    def penalty(op: Any) -> list[Tensor]:
        torch.manual_seed(1)
        x = {n: t.requires_grad_() for n, t in inputs(3, 4, 5, device=device).items()}
        grads = torch.autograd.grad(op(**x).square().sum(), list(x.values()), create_graph=True)
        total = sum((g.square().sum() for g in grads), torch.zeros((), device=device))
        return list(torch.autograd.grad(total, [x["x"], x["w1"], x["w2"]]))

    for got, want in zip(penalty(kernel()), penalty(reference()), strict=True):
        assert torch.allclose(got, want, atol=1e-2, rtol=1e-3)


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    x = inputs(70, 24, 40, dtype=torch.float16, device=device)
    leaves = {n: t.requires_grad_() for n, t in x.items()}

    def once() -> tuple[Tensor, ...]:
        y = kernel()(**leaves)
        return (y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values())))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_empty(dtype: torch.dtype, device: str) -> None:
    kernel()(**inputs(2, 3, 4, device=device))  # the proof that kernels run in this mode
    x = {n: t.requires_grad_() for n, t in inputs(0, 4, 6, dtype=dtype, device=device).items()}
    y = kernel()(**x)
    grads = torch.autograd.grad(y.sum(), list(x.values()))
    assert y.shape == (0, 4) and all((g == 0).all() for g in grads[1:])


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("save_act", [False, True])
def test_opcheck(activation: str, save_act: bool) -> None:
    x = inputs(3, 4, 5)
    args = (*x.values(), activation, True, save_act)
    torch.library.opcheck(torch.ops.fastgpt.ffn_fwd, args)
    y, pre, act = torch.ops.fastgpt.ffn_fwd(*args)
    rest = (torch.randn_like(y), x["x"], x["w1"], x["w2"], pre, act, activation)
    torch.library.opcheck(torch.ops.fastgpt.ffn_bwd, (*rest, [True] * 5))
    torch.library.opcheck(torch.ops.fastgpt.ffn_bwd, (*rest, [True, False, False, True, False]))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_function_gradcheck_and_double_backward(activation: str) -> None:
    x = [t.requires_grad_() for t in inputs(3, 4, 5, dtype=torch.float64).values()]
    f = partial(FFNFunction.apply)

    def op(*tensors: Tensor) -> Any:
        return f(*tensors, activation, True)

    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    def f(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        return (FFNFunction.apply(x, w1, b1, w2, b2, "gelu_tanh", True),)

    assert_one_graph(f, [inputs(M, 8, 12) for M in (3, 5, 8)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return FFNFunction.apply(x, w1, b1, w2, b2, "gelu_tanh", True).square().sum()

    assert_compiled_gradients_match(loss, inputs(4, 8, 12))


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()

    M, C, F = 3, 4, 5
    x = {n: t.requires_grad_() for n, t in inputs(M, C, F).items()}
    with FlopCounterMode(display=False) as counter:
        FFNFunction.apply(*x.values(), "relu", True).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * M * C * F)


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    x, w1, b1, w2, b2 = inputs(2, 4, 6).values()
    for args, kwargs, rule in [
        ((x, w1, b1, w2, b2), {"activation": "tanh"}, "activation must be one of gelu_tanh, gelu"),
        ((x, w1[:, :3], b1, w2, b2), {}, "columns of w1 must be the last dimension of x; got x"),
        ((x, w1, b1, w2[:, :3], b2), {}, "columns of w2 must be the rows of w1"),
        ((x, w1, b1[:2], w2, b2), {}, r"b1 must be \(6,\); got \(2,\)"),
        ((x, w1, b1, w2, b2[:2]), {}, r"b2 must be \(4,\); got \(2,\)"),
        ((x, w1[0], b1, w2, b2), {}, r"w1 \(F, C\)"),
        ((x, w1.to("meta"), b1, w2, b2), {}, "on one device; got x cpu, w1 meta"),
    ]:
        with pytest.raises(ValueError, match=f"ffn: .*{rule}"):
            ffn(*args, **kwargs)
    with pytest.raises(TypeError, match=r"one dtype; got x torch\.float32, w1 torch\.float16"):
        ffn(x, w1.half(), b1, w2, b2)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        ffn(x.long(), w1, b1, w2, b2)
