"""rms_norm: specification, PyTorch path, kernels, registered ops, errors.

The kernels are layer_norm's: what does not depend on the mean is tested there.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.ops import layer_norm, rms_norm, rms_norm_ref
from fastgpt.ops.rms_norm import RMSNormFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES


def inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    residual: bool = False,
    x_bias: bool = False,
) -> dict[str, Tensor]:
    x = {"x": torch.randn(shape, dtype=dtype, device=device) * 2 + 1}
    x["weight"] = torch.randn(shape[-1], dtype=dtype, device=device)
    if residual:
        x["residual"] = torch.randn(shape, dtype=dtype, device=device)
    if x_bias:
        x["x_bias"] = torch.randn(shape[-1], dtype=dtype, device=device)
    return x


def kernel(**kwargs: Any) -> Any:
    def op(**x: Tensor) -> Any:
        with fastgpt.use("triton"):
            return rms_norm(**x, **kwargs)

    return op


def joined(op: Any) -> Any:
    """(y, h) as one tensor, so that both carry gradient."""
    return lambda **x: torch.stack(op(**x))


# ------------------------------------------------------------------ the specification


def test_reference_is_torchs_rms_norm() -> None:
    x = inputs(2, 3, 17, dtype=torch.float64)
    want = F.rms_norm(x["x"], (17,), x["weight"], 1e-6)
    assert torch.allclose(rms_norm_ref(**x), want, atol=1e-12)


def test_residual_is_added_first_and_returned() -> None:
    x = inputs(4, 9, residual=True)
    y, h = rms_norm(**x)
    assert torch.equal(h, x["x"] + x["residual"])
    assert torch.equal(y, rms_norm(h, x["weight"]))


def test_of_rows_without_mean_it_is_layer_norm() -> None:
    x = torch.randn(5, 32, dtype=torch.float64)
    x -= x.mean(-1, keepdim=True)
    w = torch.randn(32, dtype=torch.float64)
    assert torch.allclose(rms_norm(x, w, 1e-5), layer_norm(x, w, None, 1e-5), atol=1e-12)


@given(rows=st.integers(1, 5), N=st.integers(1, 40), residual=st.booleans())
def test_plain_path_is_the_specification(rows: int, N: int, residual: bool) -> None:
    x = inputs(rows, N, dtype=torch.float64, residual=residual)
    with fastgpt.use("reference"):
        got, want = rms_norm(**x), rms_norm_ref(**x)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-10)


# ------------------------------------------------------------------ the kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 128), (37, 96), (4, 300)], ids=str)
def test_kernel_matches(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = inputs(*shape, dtype=dtype, device=device)
    assert_matches(kernel(eps=1e-2), partial(rms_norm_ref, eps=1e-2), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, 33), (3, 300)], ids=str)
def test_kernel_matches_with_residual(
    shape: tuple[int, ...], dropout_p: float, dtype: torch.dtype, device: str
) -> None:
    x = inputs(*shape, dtype=dtype, device=device, residual=True, x_bias=dropout_p > 0.0)
    kwargs: dict[str, Any] = {"dropout_p": dropout_p}
    if dropout_p:
        kwargs["seed"] = torch.tensor([2**35 + 1], device=device)
    assert_matches(joined(kernel(**kwargs)), joined(partial(rms_norm_ref, **kwargs)), x)


@pytest.mark.gpu
@settings(max_examples=6)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    shape = (*draw(st.lists(st.integers(1, 4), max_size=2)), draw(st.integers(1, 150)))
    x = inputs(*shape, dtype=draw(st.sampled_from(DTYPES)), device=device)
    if draw(st.booleans()):
        x["x"] = torch.cat([x["x"]] * 2, -1)[..., 1 : 1 + shape[-1]]
    assert_matches(kernel(), rms_norm_ref, x)


@pytest.mark.gpu
def test_half_branch_into_float_stream(device: str) -> None:
    half = DTYPES[-1]
    x, w = torch.randn(6, 40, device=device).to(half), torch.randn(40, device=device)
    y, h = kernel()(x=x, weight=w, residual=torch.randn(6, 40, device=device))
    assert y.dtype == half and h.dtype == torch.float32
    assert torch.allclose(y.float(), rms_norm_ref(h, w).float(), atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
def test_expanded_input_and_gradient(device: str) -> None:
    row = torch.randn(1, 24, device=device, requires_grad=True)
    w = torch.randn(24, device=device, requires_grad=True)
    got = torch.autograd.grad(kernel()(x=row.expand(6, 24), weight=w).sum(), [row, w])
    want = torch.autograd.grad(rms_norm_ref(row.expand(6, 24), w).sum(), [row, w])
    for g, e in zip(got, want, strict=True):
        assert torch.allclose(g, e, atol=1e-5)


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    def penalty(op: Any) -> list[Tensor]:
        torch.manual_seed(1)
        given = inputs(3, 8, device=device, residual=True, x_bias=True)
        x = {n: t.requires_grad_() for n, t in given.items()}
        y, h = op(**x)
        loss = (y.sin() * h).sum()
        grads = torch.autograd.grad(loss, list(x.values()), create_graph=True)
        total = sum((g.square().sum() for g in grads), torch.zeros((), device=device))
        return list(torch.autograd.grad(total, list(x.values())))

    for got, want in zip(penalty(kernel()), penalty(rms_norm_ref), strict=True):
        assert torch.allclose(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in inputs(70, 40, device=device).items()}

    def once() -> tuple[Tensor, ...]:
        y = kernel()(**x)
        return (y, *torch.autograd.grad(y.square().sum(), list(x.values())))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
def test_empty(device: str) -> None:
    kernel()(**inputs(1, 3, device=device))  # the proof that kernels run in this mode
    x = {n: t.requires_grad_() for n, t in inputs(0, 6, device=device).items()}
    y = kernel()(**x)
    grads = torch.autograd.grad(y.sum(), list(x.values()))
    assert y.shape == (0, 6) and (grads[1] == 0).all()


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize(
    "residual, dropout_p", [(False, 0.0), (True, 0.0), (True, 0.5)], ids=["x", "residual", "drop"]
)
def test_opcheck(residual: bool, dropout_p: float) -> None:
    seed = torch.tensor([5]) if dropout_p else None
    x = inputs(2, 3, 8, residual=residual, x_bias=residual)
    x_bias = x.get("x_bias")
    args = (x["x"], x.get("residual"), x["weight"], 1e-6, dropout_p, seed, x_bias)
    torch.library.opcheck(torch.ops.fastgpt.rms_norm_fwd, args)
    y, h, rstd = torch.ops.fastgpt.rms_norm_fwd(*args)
    h = h if residual else x["x"]
    dh = torch.randn_like(h) if residual else None
    dtype = None if x_bias is None else x_bias.dtype
    back = (torch.randn_like(y), dh, h, x["weight"], rstd, dropout_p, seed, y.dtype, dtype)
    torch.library.opcheck(torch.ops.fastgpt.rms_norm_bwd, back)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_function_gradcheck_and_double_backward(dropout_p: float) -> None:
    given = inputs(3, 4, dtype=torch.float64, residual=True, x_bias=True)
    x = [t.requires_grad_() for t in given.values()]
    seed = torch.tensor([2]) if dropout_p else None

    def f(x: Tensor, w: Tensor, r: Tensor, xb: Tensor) -> Any:
        return RMSNormFunction.apply(x, r, w, 1e-6, dropout_p, seed, xb)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_function_takes_one_row_without_a_batch() -> None:
    x = [t.requires_grad_() for t in inputs(4, dtype=torch.float64, residual=True).values()]

    def f(x: Tensor, w: Tensor, r: Tensor) -> Any:
        return RMSNormFunction.apply(x, r, w, 1e-6, 0.0, None)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("asking", ["x", "weight", "residual", "x_bias"])
def test_double_backward_of_what_asks_for_it_alone(asking: str) -> None:
    x = inputs(3, 4, dtype=torch.float64, residual=True, x_bias=True)
    leaf = x[asking].requires_grad_()

    def f(_: Tensor) -> Any:
        args = x["x"], x["residual"], x["weight"], 1e-6, 0.0, None, x["x_bias"]
        return RMSNormFunction.apply(*args)

    assert torch.autograd.gradgradcheck(f, [leaf])


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    def f(x: Tensor, weight: Tensor) -> Any:
        return RMSNormFunction.apply(x, x.sin(), weight, 1e-6, 0.0, None)

    assert_one_graph(f, [inputs(rows, 16) for rows in (3, 5, 8)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y, h = RMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, None)
        return y.square().sum() + h.sin().sum()

    assert_compiled_gradients_match(loss, inputs(4, 16, residual=True))


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    x, w = torch.zeros(2, 3, 8), torch.zeros(8)
    for args, kwargs, rule in [
        ((x, torch.zeros(7)), {}, r"weight must be \(8,\), the last dimension of x; got weight"),
        ((x, w), {"residual": torch.zeros(3, 8)}, "residual must have x's shape; got residual"),
        ((x, w), {"dropout_p": 0.1}, "dropout_p needs residual; got dropout_p 0.1"),
        ((x, w), {"x_bias": w}, "x_bias needs residual; got x_bias alone"),
        ((x, w), {"residual": x, "dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\); got 1.5"),
        ((torch.zeros(3, 0), torch.zeros(0)), {}, "last dimension of at least 1"),
        ((x, w.to("meta")), {}, "on one device; got x cpu, weight meta"),
    ]:
        with pytest.raises(ValueError, match=f"^rms_norm: .*{rule}"):
            rms_norm(*args, **kwargs)
    with pytest.raises(TypeError, match=r"^rms_norm: x must have a floating dtype; got torch\.int"):
        rms_norm(x.long(), w)
    with pytest.raises(ValueError, match=r"^rms_norm: seed must be one int64"):
        rms_norm(x, w, residual=x, dropout_p=0.1, seed=torch.zeros(2))
