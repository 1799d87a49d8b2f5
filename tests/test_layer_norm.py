"""layer_norm: specification, PyTorch path, kernels, registered ops, errors."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.ops import dropout_mask, layer_norm, layer_norm_ref
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.layer_norm import LayerNormFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES


def inputs(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = True,
    residual: bool = False, x_bias: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    x = {"x": torch.randn(shape, dtype=dtype, device=device) * 2 + 1}
    x["weight"] = torch.randn(shape[-1], dtype=dtype, device=device)
    if bias:
        x["bias"] = torch.randn(shape[-1], dtype=dtype, device=device)
    if residual:
        x["residual"] = torch.randn(shape, dtype=dtype, device=device)
    if x_bias:
        x["x_bias"] = torch.randn(shape[-1], dtype=dtype, device=device)
    return x


def kernel(**kwargs: Any) -> Any:
    def op(**x: Tensor) -> Any:
        with fastgpt.use("triton"):
            return layer_norm(**x, **kwargs)

    return op


def joined(op: Any) -> Any:
    """(y, h) as one tensor, so that both carry gradient."""
    return lambda **x: torch.stack(op(**x))


# ------------------------------------------------------------------ the specification


def test_reference_is_torchs_layer_norm() -> None:
    x = inputs(2, 3, 17, dtype=torch.float64)
    want = F.layer_norm(x["x"], (17,), x["weight"], x["bias"], 1e-5)
    assert torch.allclose(layer_norm_ref(**x), want, atol=1e-12)


def test_residual_is_added_first_and_returned() -> None:
    x = inputs(4, 9, residual=True)
    y, h = layer_norm(**x)
    assert torch.equal(h, x["x"] + x["residual"])
    assert torch.equal(y, layer_norm(h, x["weight"], x["bias"]))


def test_the_bias_of_a_branch_is_added_before_dropout() -> None:
    x = inputs(40, 9, residual=True) | {"x": torch.zeros(40, 9)}
    _, h = layer_norm(**x, x_bias=torch.full((9,), 3.0), dropout_p=0.25)
    added = h - x["residual"]
    assert torch.allclose(added.abs() * (added - 4.0).abs(), torch.zeros(40, 9), atol=1e-4)
    assert 0.6 < (added > 1.0).double().mean() < 0.9


def test_the_stream_keeps_its_dtype_and_the_branch_its_own() -> None:
    x = inputs(4, 9)
    y, h = layer_norm(**x | {"x": x["x"].bfloat16()}, residual=torch.randn(4, 9))
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32


@given(rows=st.integers(1, 5), N=st.integers(1, 40), bias=st.booleans(), residual=st.booleans())
def test_plain_path_is_the_specification(rows: int, N: int, bias: bool, residual: bool) -> None:
    x = inputs(rows, N, dtype=torch.float64, bias=bias, residual=residual)
    with fastgpt.use("reference"):
        got, want = layer_norm(**x), layer_norm_ref(**x)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(dtype: torch.dtype) -> None:
    loose = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2}
    x = inputs(3, 5, dtype=dtype, residual=True, x_bias=True)
    seed = torch.tensor([9])

    def f(*tensors: Tensor) -> Any:
        return layer_norm_ref(**dict(zip(x, tensors, strict=True)), dropout_p=0.3, seed=seed)

    leaves = [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(f, leaves, **({} if dtype == torch.float64 else loose))


# ------------------------------------------------------------------ the kernels

# In the interpreter the widest row in registers is 128 columns, on a GPU and its double 8192.
SHAPES = [(1, 1), (3, 7), (2, 3, 128), (5, 127), (9, 129), (37, 96), (4, 300), (3, 768)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_matches(kernel(), layer_norm_ref, inputs(*shape, dtype=dtype, device=device))
    x = inputs(*shape, dtype=dtype, device=device, bias=False)
    assert_matches(kernel(eps=1e-2), partial(layer_norm_ref, eps=1e-2), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("x_bias", [False, True], ids=["", "x_bias"])
@pytest.mark.parametrize("shape", [(5, 33), (3, 300)], ids=str)
def test_kernel_matches_with_residual(
    shape: tuple[int, ...], x_bias: bool, dropout_p: float, dtype: torch.dtype, device: str
) -> None:
    x = inputs(*shape, dtype=dtype, device=device, residual=True, x_bias=x_bias)
    kwargs: dict[str, Any] = {"dropout_p": dropout_p}
    if dropout_p:
        kwargs["seed"] = torch.tensor([2**35 + 1], device=device)
    assert_matches(joined(kernel(**kwargs)), joined(partial(layer_norm_ref, **kwargs)), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_kernel_matches_on_rows_wider_than_registers(dropout_p: float, device: str) -> None:
    x = inputs(2, 8200, device=device, residual=True, x_bias=True)
    kwargs = {"dropout_p": dropout_p, "seed": torch.tensor([4], device=device)}
    assert_matches(joined(kernel(**kwargs)), joined(partial(layer_norm_ref, **kwargs)), x)


@pytest.mark.gpu
def test_half_branch_into_float_stream(device: str) -> None:
    """As under autocast: x of 16 bits, residual, weight and bias of 32."""
    half = DTYPES[-1]
    x = {"x": torch.randn(6, 40, device=device).to(half)}
    stream = inputs(6, 40, device=device, residual=True, x_bias=True)
    x |= {n: t for n, t in stream.items() if n != "x"}
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    y, h = kernel(dropout_p=0.2, seed=torch.tensor([1], device=device))(**leaves)
    assert y.dtype == half and h.dtype == torch.float32
    (y.float() * 3 + h).sum().backward()
    ref = {n: t.clone().requires_grad_() for n, t in x.items()}
    y2, h2 = layer_norm_ref(**ref, dropout_p=0.2, seed=torch.tensor([1], device=device))
    (y2.float() * 3 + h2).sum().backward()
    assert torch.allclose(h, h2, atol=3e-2 if half == torch.bfloat16 else 5e-3)
    for name, t in leaves.items():
        assert t.grad is not None and t.grad.dtype == t.dtype, name
        assert torch.allclose(t.grad, ref[name].grad, atol=3e-2, rtol=1e-2), name


@pytest.mark.gpu
@settings(max_examples=15 if INTERPRET else 6)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    shape = (*draw(st.lists(st.integers(1, 4), max_size=2)), draw(st.integers(1, 9)),
             draw(st.integers(1, 200)))  # fmt: skip
    dtype = draw(st.sampled_from(DTYPES))
    residual = draw(st.booleans())
    x_bias = residual and draw(st.booleans())
    bias = draw(st.booleans())
    x = inputs(*shape, dtype=dtype, device=device, bias=bias, residual=residual, x_bias=x_bias)
    for name in ("x", "residual"):
        if name not in x:
            continue
        how = draw(st.sampled_from(["contiguous", "sliced", "N not contiguous", "rows reversed"]))
        if how == "sliced":
            x[name] = torch.cat([x[name]] * 2, -1)[..., 1 : 1 + shape[-1]]
        elif how == "N not contiguous":
            x[name] = x[name].transpose(-1, -2).contiguous().transpose(-1, -2)
        elif how == "rows reversed" and len(shape) > 2:
            x[name] = x[name].transpose(0, 1).contiguous().transpose(0, 1)
    op, ref = (joined(kernel()), joined(layer_norm_ref)) if residual else (kernel(), layer_norm_ref)
    assert_matches(op, ref, x)


@pytest.mark.gpu
def test_expanded_input_and_gradient(device: str) -> None:
    row = torch.randn(1, 24, device=device, requires_grad=True)
    w = torch.randn(24, device=device, requires_grad=True)
    got = torch.autograd.grad(kernel()(x=row.expand(6, 24), weight=w).sum(), [row, w])
    want = torch.autograd.grad(layer_norm_ref(row.expand(6, 24), w).sum(), [row, w])
    for g, e in zip(got, want, strict=True):
        assert torch.allclose(g, e, atol=1e-5)


@pytest.mark.gpu
def test_statistics_are_float32_where_the_mean_is_large(device: str) -> None:
    half = DTYPES[-1]
    x = (torch.randn(4, 64, device=device) + 30).to(half)
    weight = torch.ones(64, dtype=half, device=device)
    assert_matches(kernel(), layer_norm_ref, {"x": x, "weight": weight})


@pytest.mark.gpu
def test_the_norm_is_of_the_stream_as_it_is_stored(device: str) -> None:
    x = inputs(9, 100, dtype=torch.float16, device=device, residual=True)
    y, h = kernel()(**x)
    assert torch.equal(y, kernel()(x=h, weight=x["weight"], bias=x["bias"]))


@pytest.mark.gpu
def test_only_the_stream_carries_gradient(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in inputs(3, 16, device=device, residual=True).items()}
    _, h = kernel()(**x)
    got = torch.autograd.grad(h.sum(), [x["x"], x["residual"]])
    assert all((g == 1).all() for g in got)


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    def penalty(op: Any) -> list[Tensor]:
        torch.manual_seed(1)
        given = inputs(3, 8, device=device, residual=True, x_bias=True)
        x = {n: t.requires_grad_() for n, t in given.items()}
        y, h = op(**x)
        loss = (y.sin() * h).sum()
        grads = torch.autograd.grad(loss, list(x.values()), create_graph=True)
        return list(torch.autograd.grad(
            sum((g.square().sum() for g in grads), torch.zeros((), device=device)),
            [x["x"], x["residual"], x["weight"], x["x_bias"]],
        ))  # fmt: skip

    for got, want in zip(penalty(kernel()), penalty(layer_norm_ref), strict=True):
        assert torch.allclose(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_a_shift_of_a_row_changes_nothing(device: str) -> None:
    x = inputs(3, 50, device=device)
    shifted = x | {"x": x["x"] + 100.0}
    assert torch.allclose(kernel()(**shifted), kernel()(**x), atol=1e-3)


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in inputs(70, 40, device=device).items()}

    def once() -> tuple[Tensor, ...]:
        y = kernel()(**x)
        return (y, *torch.autograd.grad(y.square().sum(), list(x.values())))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [6, 200])
def test_a_nan_or_inf_in_one_row_stays_in_that_row(bad: float, N: int, device: str) -> None:
    x = inputs(4, N, device=device)
    x["x"][2, 1] = bad
    y = kernel()(**{n: t.requires_grad_() for n, t in x.items()})
    y.backward(torch.ones_like(y))
    for t in (y, x["x"].grad):
        assert t is not None
        assert t.isfinite().all(1).tolist() == [True, True, False, True]


@pytest.mark.gpu
def test_equal_and_denormal_rows(device: str) -> None:
    """A row without variance is the bias; one of denormals is as small as the reference's."""
    w, bias = torch.randn(96, device=device), torch.randn(96, device=device)
    x = torch.tensor([1e4, 3.3, -7e-3, 0.0], device=device)[:, None].expand(4, 96)
    assert torch.allclose(kernel()(x=x, weight=w, bias=bias), bias.expand(4, 96), atol=1e-3)
    tiny = torch.randn(2, 96, device=device) * 1e-39
    assert torch.allclose(kernel()(x=tiny, weight=w), layer_norm_ref(tiny, w), atol=1e-37, rtol=0)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    for N in (20, 100, 300):
        x = inputs(7, N, device=device)
        whole = kernel()(**x)
        for part in (slice(0, 1), slice(2, 7)):
            assert torch.equal(whole[part], kernel()(**x | {"x": x["x"][part]}))


@pytest.mark.gpu
def test_sums_over_many_rows_lose_no_more_than_float32_must(device: str) -> None:
    """Gradients of one sign, so that nothing cancels: each program's sum is short, not all of M."""
    M = 400
    h, dy = torch.randn(M, 4, device=device), torch.rand(M, 4, device=device) + 1.0
    mean, rstd = h.mean(-1), torch.rsqrt(h.var(-1, correction=0) + 1e-5)
    back = torch.ops.fastgpt.layer_norm_bwd
    _, _, dweight, dbias, _ = back(dy, None, h, h[0], True, mean, rstd, 0.0, None, h.dtype)
    xhat = (h.double() - mean[:, None]) * rstd[:, None]
    dw, db = (dy * xhat).sum(0), dy.double().sum(0)
    assert ((dbias - db).abs() / db).max() < 1e-6
    assert ((dweight - dw).abs() / (dy * xhat).abs().sum(0)).max() < 1e-6


@pytest.mark.gpu
def test_the_gradient_of_a_bias_has_that_biases_dtype(device: str) -> None:
    """A norm of float32 after a product of 16 bits, with a bias of the norm and without."""
    half = DTYPES[-1]
    b = torch.randn(40, device=device).to(half).requires_grad_()
    for bias in (True, False):
        x = inputs(6, 40, device=device, residual=True, bias=bias)
        y, h = kernel()(**x, x_bias=b)
        (got,) = torch.autograd.grad((y.sin() + h).sum(), b)
        y, h = layer_norm_ref(**x, x_bias=b)
        (want,) = torch.autograd.grad((y.sin() + h).sum(), b)
        assert got.dtype == half and torch.allclose(got, want, atol=5e-2, rtol=1e-2)


@pytest.mark.gpu
def test_empty(device: str) -> None:
    kernel()(**inputs(1, 3, device=device))  # the proof that kernels run in this mode
    x = inputs(0, 6, device=device, residual=True, x_bias=True)
    x = {n: t.requires_grad_() for n, t in x.items()}
    y, h = kernel()(**x)
    grads = torch.autograd.grad(y.sum() + h.sum(), list(x.values()))
    assert y.shape == (0, 6) and all((g == 0).all() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in x.values()]


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_offsets_beyond_32_bits(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**10, np.float16))  # only touched pages are real
    x = room.as_strided((3, 40), (2**30, 1)).copy_(torch.randn(3, 40))
    w = torch.randn(40).half()
    assert torch.equal(kernel()(x=x, weight=w), kernel()(x=x.contiguous(), weight=w))


@pytest.mark.gpu
def test_dropout_drops_the_elements_its_mask_says(device: str) -> None:
    x = inputs(7, 40, device=device) | {"x": torch.ones(7, 40, device=device)}
    seed = torch.tensor([3], device=device)
    _, h = kernel(residual=torch.zeros(7, 40, device=device), dropout_p=0.25, seed=seed)(**x)
    assert torch.allclose(h, dropout_mask(seed, (7, 40), 0.25) / 0.75)


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(residual: bool, dropout_p: float, bias: bool) -> None:
    if dropout_p and not residual:
        return
    seed = torch.tensor([5]) if dropout_p else None
    x = inputs(2, 3, 8, bias=bias, residual=residual, x_bias=residual)
    res, x_bias = x.get("residual"), x.get("x_bias")
    args = (x["x"], res, x["weight"], x.get("bias"), 1e-5, dropout_p, seed, x_bias)
    torch.library.opcheck(torch.ops.fastgpt.layer_norm_fwd, args)
    y, h, mean, rstd = torch.ops.fastgpt.layer_norm_fwd(*args)
    h = h if residual else x["x"]
    dh = torch.randn_like(h) if residual else None
    back = (
        torch.randn_like(y), dh, h, x["weight"], bias, mean, rstd, dropout_p, seed, y.dtype,
        None if x_bias is None else x_bias.dtype,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastgpt.layer_norm_bwd, back)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_function_gradcheck_and_double_backward(dropout_p: float) -> None:
    given = inputs(3, 4, dtype=torch.float64, residual=True, x_bias=True)
    x = [t.requires_grad_() for t in given.values()]
    seed = torch.tensor([2]) if dropout_p else None

    def f(x: Tensor, w: Tensor, b: Tensor, r: Tensor, xb: Tensor) -> Any:
        return LayerNormFunction.apply(x, r, w, b, 1e-5, dropout_p, seed, xb)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_function_takes_one_row_without_a_batch() -> None:
    x = [t.requires_grad_() for t in inputs(4, dtype=torch.float64, residual=True).values()]

    def f(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Any:
        return LayerNormFunction.apply(x, r, w, b, 1e-5, 0.0, None)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("asking", ["x", "weight", "bias", "residual", "x_bias", "x bias"])
def test_double_backward_of_what_asks_for_it_alone(asking: str) -> None:
    x = inputs(3, 4, dtype=torch.float64, residual=True, x_bias=True)
    leaves = [t.requires_grad_(name in asking.split()) for name, t in x.items()]

    def f(*wanted: Tensor) -> Any:
        given = iter(wanted)
        x, w, b, r, xb = (next(given) if t.requires_grad else t for t in leaves)
        return LayerNormFunction.apply(x, r, w, b, 1e-5, 0.0, None, xb)

    assert torch.autograd.gradgradcheck(f, [t for t in leaves if t.requires_grad])


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return LayerNormFunction.apply(x, x.sin(), weight, bias, 1e-5, 0.0, None)

    assert_one_graph(f, [inputs(rows, 16) for rows in (3, 5, 8)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x_bias: Tensor) -> Tensor:
        y, h = LayerNormFunction.apply(x, residual, weight, bias, 1e-5, 0.0, None, x_bias)
        return y.square().sum() + h.sin().sum()

    assert_compiled_gradients_match(loss, inputs(4, 16, residual=True, x_bias=True))


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    x, w = torch.zeros(2, 3, 8), torch.zeros(8)
    for args, kwargs, rule in [
        (
            (x, torch.zeros(7)),
            {},
            r"weight must be \(8,\), the last dimension of x; got weight \(7,",
        ),
        ((x, w, torch.zeros(1)), {}, r"bias must be \(8,\)"),
        ((x, w), {"residual": torch.zeros(3, 8)}, "residual must have x's shape; got residual"),
        ((x, w), {"dropout_p": 0.1}, "dropout_p needs residual"),
        ((x, w), {"x_bias": w}, "x_bias needs residual; got x_bias alone"),
        ((x, w), {"residual": x, "x_bias": w[:7]}, r"x_bias must be \(8,\), the last"),
        ((x, w), {"residual": x, "dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\); got 1.5"),
        ((torch.zeros(3, 0), torch.zeros(0)), {}, "last dimension of at least 1"),
        ((x, w.to("meta")), {}, "on one device; got x cpu, weight meta"),
    ]:
        with pytest.raises(ValueError, match=f"layer_norm: .*{rule}"):
            layer_norm(*args, **kwargs)
    with pytest.raises(
        TypeError, match=r"layer_norm: x must have a floating dtype; got torch\.int64"
    ):
        layer_norm(x.long(), w)
    with pytest.raises(TypeError, match="weight and bias must have one dtype"):
        layer_norm(x, w, w.half())
