"""cross_entropy: specification, kernels, edges, registered ops, errors."""

from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.ops import cross_entropy, cross_entropy_ref
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.cross_entropy import CrossEntropyFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0},
]
HOW = (-100, 0.1, 1e-3, 5.0)


def inputs(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", ignored: bool = True
) -> tuple[Tensor, Tensor]:
    """logits (..., V) and target (...), the first of them ignored."""
    logits = torch.randn(shape, dtype=dtype, device=device) * 3
    target = torch.randint(shape[-1], shape[:-1]).to(device)
    if ignored and target.numel() > 1:
        target.view(-1)[0] = -100
    return logits, target


def kernel(target: Tensor, **kwargs: Any) -> Any:
    def op(logits: Tensor) -> Tensor:
        with fastgpt.use("triton"):
            return cross_entropy(logits, target, **kwargs)

    return op


def both(op: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their sum."""
    leaf = logits.detach().requires_grad_()
    loss = op(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def check_columns_apart(device: str) -> None:
    """The gradient of some of the columns, with the statistics of all: a target among the others is
    no target to them."""
    logits, target = inputs(9, 70, device=device)
    how = (-100, 0.0, 0.0, 0.0)
    stats = import_module("fastgpt.ops.cross_entropy").forward_op(logits, target, *how)[1]
    backward = import_module("fastgpt.ops.cross_entropy").backward_op
    weights = torch.rand(9, device=device)
    whole = backward(weights, logits, target, stats, *how)
    for columns in (slice(0, 33), slice(33, 70)):
        own = torch.where(target == -100, target, target - columns.start)
        own = torch.where((own < 0) & (own != -100), 70, own)
        part = backward(weights, logits[:, columns].contiguous(), own, stats, *how)
        assert torch.allclose(part, whole[:, columns], atol=1e-6)


@pytest.mark.gpu
def test_columns_apart(device: str) -> None:
    check_columns_apart(device)


def test_columns_apart_without_a_kernel() -> None:
    check_columns_apart("cpu")


# ------------------------------------------------------------------ the specification


@given(
    rows=st.integers(1, 4), V=st.integers(1, 30), smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]), ignore_index=st.sampled_from([-100, 0]),
)  # fmt: skip
def test_is_torchs_cross_entropy(
    rows: int, V: int, smoothing: float, reduction: str, ignore_index: int
) -> None:
    logits, target = inputs(2, rows, V, dtype=torch.float64)
    target[target == -100] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    got = both(cross_entropy, logits, target, **options)
    want = both(
        lambda z: F.cross_entropy(z.flatten(0, 1), target.flatten(), **options), logits
    )  # fmt: skip
    assert torch.allclose(got[0].flatten(), want[0].flatten(), equal_nan=True)
    assert torch.allclose(got[1], want[1], equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options: dict[str, Any]) -> None:
    logits, target = inputs(6, 9, dtype=torch.float64, ignored=False)
    eps, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    softcap = options.get("softcap")
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = z.exp().sum(-1).log()
    chosen = z[torch.arange(6), target]
    want = lse - (1 - eps) * chosen - eps * z.mean(-1) + z_loss * lse**2
    assert torch.allclose(cross_entropy(logits, target, reduction="none", **options), want)


def test_losses_are_float32_and_a_target_may_be_int32() -> None:
    logits, target = inputs(3, 5, dtype=torch.bfloat16)
    loss = cross_entropy(logits, target.int())
    assert loss.dtype == torch.float32 and torch.equal(loss, cross_entropy(logits, target))


# ------------------------------------------------------------------ the kernels

# In the interpreter a block is of 8 pieces of 16 bytes: 32 columns in float32, 64 in float16.
SHAPES = [(2, 1), (2, 31), (2, 32), (2, 65), (1, 3, 200)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    logits, target = inputs(*shape, dtype=dtype, device=device)
    how = {"target": target, "reduction": "none"}
    assert_matches(kernel(**how), partial(cross_entropy_ref, **how), {"logits": logits})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_kernel_matches_with_options(
    options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    logits, target = inputs(3, 81, dtype=dtype, device=device)
    how = {"target": target, "reduction": "sum" if "softcap" in options else "mean", **options}
    assert_matches(kernel(**how), partial(cross_entropy_ref, **how), {"logits": logits})


@pytest.mark.gpu
@settings(max_examples=10 if INTERPRET else 4)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 150)))
    dtype = draw(st.sampled_from(DTYPES))
    logits, target = inputs(*shape, dtype=dtype, device=device)
    how = draw(st.sampled_from(["contiguous", "sliced", "padded", "transposed", "reversed"]))
    if how == "sliced":
        logits = torch.cat([logits] * 2, -1)[:, 1 : 1 + shape[1]]
    elif how == "padded":
        logits = F.pad(logits, (0, -shape[1] % 64), value=float("nan"))[:, : shape[1]]
    elif how == "transposed":
        logits = logits.T.contiguous().T
    elif how == "reversed":
        target = torch.stack([target, target], -1)[:, 1]
    options = draw(st.sampled_from(OPTIONS))
    kwargs = {"target": target, "reduction": "none", **options}
    assert_matches(kernel(**kwargs), partial(cross_entropy_ref, **kwargs), {"logits": logits})


@pytest.mark.gpu
def test_expanded_logits_and_gradient(device: str) -> None:
    row = torch.randn(1, 50, device=device, requires_grad=True)
    target = torch.tensor([3, 49, 0], device=device)
    (got,) = torch.autograd.grad(kernel(target)(row.expand(3, 50)), row)
    (want,) = torch.autograd.grad(F.cross_entropy(row.expand(3, 50), target), row)
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.gpu
def test_logits_are_left_as_they_are(device: str) -> None:
    logits, target = inputs(3, 70, device=device)
    before = logits.clone()
    both(kernel(target), logits)
    assert torch.equal(logits, before)


# ------------------------------------------------------------------ the edges


@pytest.mark.gpu
def test_logits_of_ten_thousand(device: str) -> None:
    """NumPy rounds the product inside an fma: in the interpreter exponents of 1e4 are coarse."""
    logits = torch.randn(3, 90, device=device) + torch.tensor([[1e4], [-1e4], [0.0]], device=device)
    logits[2, ::7] = 1e4
    target = torch.tensor([4, 89, 7], device=device)
    got = both(kernel(target, reduction="none"), logits)
    want = both(partial(cross_entropy_ref, target=target, reduction="none"), logits.double())
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g.double(), w, atol=3e-3 if INTERPRET else 1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [1e-3, 30.0, 1e6])
def test_a_softcap_of_any_size(softcap: float, device: str) -> None:
    logits, target = inputs(3, 40, device=device)
    how: dict[str, Any] = {"target": target, "softcap": softcap}
    assert_matches(kernel(**how), partial(cross_entropy_ref, **how), {"logits": logits}, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS[::4], ids=str)
def test_infinities_and_nan_stay_in_their_row(options: dict[str, Any], device: str) -> None:
    logits, target = inputs(6, 77, device=device, ignored=False)
    clean = both(kernel(target, reduction="none", **options), logits)
    odd = logits.clone()
    odd[0, 5] = float("nan")
    odd[1, 70] = float("inf")
    odd[2] = float("-inf")
    odd[3, ::2] = float("-inf")
    odd[4, target[4]] = float("-inf")
    got = both(kernel(target, reduction="none", **options), odd)
    want = both(partial(cross_entropy_ref, target=target, reduction="none", **options), odd)
    for g, w, c in zip(got, want, clean, strict=True):
        assert torch.equal(g[5], c[5])
        assert torch.equal(g.isnan(), w.isnan())
        assert torch.allclose(g, w, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.gpu
def test_an_ignored_row_has_no_loss_and_no_gradient_whatever_is_in_it(device: str) -> None:
    logits, target = inputs(3, 40, device=device)
    logits[0] = float("nan")
    loss, grad = both(kernel(target, z_loss=0.1, reduction="none"), logits)
    assert loss[0] == 0 and (grad[0] == 0).all() and grad[1:].isfinite().all()
    mean, _ = both(kernel(target), logits)
    assert torch.allclose(mean, F.cross_entropy(logits[1:], target[1:]))


@pytest.mark.gpu
def test_without_a_row_that_counts_the_mean_is_nan_and_the_gradient_zero(device: str) -> None:
    logits = torch.randn(2, 9, device=device)
    target = torch.full((2,), 7, device=device)
    loss, grad = both(kernel(target, ignore_index=7), logits)
    assert loss.isnan() and (grad == 0).all()
    assert both(kernel(target, ignore_index=7, reduction="sum"), logits)[0] == 0


@pytest.mark.gpu
def test_one_column_and_the_last_column(device: str) -> None:
    target = torch.zeros(3, dtype=torch.int64, device=device)
    loss, grad = both(kernel(target), torch.randn(3, 1, device=device))
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6
    logits = torch.randn(2, 65, device=device)
    last = torch.full((2,), 64, device=device)
    assert torch.allclose(kernel(last)(logits), F.cross_entropy(logits, last), atol=1e-6)


@pytest.mark.gpu
def test_a_target_out_of_range_gives_nan_and_reads_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("fastgpt.ops.cross_entropy")
    monkeypatch.setattr(module, "check_range", lambda *_: None)
    logits = torch.randn(3, 33, device=device)
    target = torch.tensor([33, -1, 5], device=device)
    loss, grad = both(kernel(target, reduction="none"), logits)
    assert loss[:2].isnan().all() and grad[:2].isnan().all()
    assert loss[2].isfinite() and grad[2].isfinite().all()


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    logits, target = inputs(5, 133, device=device)
    op = kernel(target, label_smoothing=0.1, z_loss=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(both(op, logits), both(op, logits), strict=True))


@pytest.mark.gpu
def test_a_row_has_the_same_loss_in_any_batch(device: str) -> None:
    logits, target = inputs(6, 96, device=device)
    losses = kernel(target, reduction="none")(logits)
    assert torch.equal(kernel(target[2:4], reduction="none")(logits[2:4]), losses[2:4])


@pytest.mark.gpu
def test_empty(device: str) -> None:
    kernel(torch.zeros(1, dtype=torch.int64, device=device))(torch.zeros(1, 3, device=device))
    target = torch.zeros(0, dtype=torch.int64, device=device)
    loss, grad = both(kernel(target), torch.zeros(0, 6, device=device))
    assert loss.isnan() and grad.shape == (0, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_offsets_beyond_32_bits(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**10, np.float16))  # only touched pages are real
    logits = room.as_strided((3, 40), (2**30, 1)).copy_(torch.randn(3, 40))
    target = torch.tensor([1, 39, 7])
    got, want = (both(kernel(target), z) for z in (logits, logits.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    logits, target = inputs(3, 20, device=device)
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 4.0}

    def penalty(op: Any) -> Tensor:
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(op(leaf), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    want = penalty(partial(cross_entropy_ref, target=target, **options))
    assert torch.allclose(penalty(kernel(target, **options)), want, atol=1e-5)


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("how", [(-100, 0.0, 0.0, 0.0), HOW], ids=str)
def test_opcheck(how: tuple[Any, ...]) -> None:
    logits, target = inputs(4, 9)
    padded = F.pad(logits, (0, 55))[:, :9]
    for z in (logits, padded):
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_fwd, (z, target, *how))
        losses, stats = torch.ops.fastgpt.cross_entropy_fwd(z, target, *how)
        back = (torch.ones_like(losses), z, target, stats, *how)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_bwd, back)


@pytest.mark.parametrize("how", [(-100, 0.0, 0.0, 0.0), HOW], ids=str)
def test_function_gradcheck_and_double_backward(how: tuple[Any, ...]) -> None:
    logits, target = inputs(3, 5, dtype=torch.float64)

    def f(z: Tensor) -> Any:
        return CrossEntropyFunction.apply(z, target, *how)

    assert torch.autograd.gradcheck(f, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(f, logits)


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    def f(logits: Tensor, target: Tensor) -> Any:
        return (CrossEntropyFunction.apply(logits, target, *HOW),)

    calls = [inputs(rows, 16) for rows in (3, 5, 8)]
    assert_one_graph(f, [{"logits": z, "target": t} for z, t in calls])


def test_compiled_gradients_are_the_eager_ones() -> None:
    logits, target = inputs(4, 16)

    def loss(z: Tensor) -> Any:
        return CrossEntropyFunction.apply(z, target, *HOW).sum() + cross_entropy(z, target)

    assert_compiled_gradients_match(loss, {"logits": logits})


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    z, t = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    for args, kwargs, rule in [
        ((z, t[0]), {}, r"target \(...\); got logits \(2, 3, 8\), target \(3,\)"),
        ((z[..., :0], t), {}, "V at least 1"),
        ((z, t + 8), {}, r"targets must be -100 or in \[0, 8\); got 8"),
        ((z, t - 1), {}, "got -1"),
        ((z, t), {"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]; got 1.5"),
        ((z, t), {"z_loss": -1.0}, "z_loss must be at least 0 and finite; got -1.0"),
        ((z, t), {"z_loss": float("nan")}, "z_loss must be at least 0 and finite; got nan"),
        ((z, t), {"softcap": 0.0}, "softcap must be None, or above 0 and finite; got 0.0"),
        ((z, t), {"softcap": float("inf")}, "above 0 and finite; got inf"),
        ((z, t), {"reduction": "max"}, "one of mean, sum, none; got 'max'"),
        ((z, t.to("meta")), {}, "on one device; got logits cpu, target meta"),
    ]:
        with pytest.raises(ValueError, match=f"cross_entropy: .*{rule}"):
            cross_entropy(*args, **kwargs)
    with pytest.raises(TypeError, match=r"target must be int64 or int32; got torch\.float32"):
        cross_entropy(z, z[..., 0])
    with pytest.raises(TypeError, match=r"logits must have a floating dtype; got torch\.int64"):
        cross_entropy(z.long(), t)
