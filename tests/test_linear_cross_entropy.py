"""linear_cross_entropy: specification, chunks, kernels, gradients, registered ops, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt.ops import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    register_flop_formulas,
    vocabulary,
)
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.linear_cross_entropy import GPU_BUDGET, LinearCrossEntropyFunction, chunk_rows
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0},
]
HOW = (-100, 0.1, 1e-3, 5.0)


def inputs(
    M: int, C: int, V: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
    bias: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    x = {"x": torch.randn(M, C, dtype=dtype, device=device)}
    x["weight"] = torch.randn(V, C, dtype=dtype, device=device)
    if bias:
        x["bias"] = torch.randn(V, dtype=dtype, device=device)
    target = torch.randint(V, (M,)).to(device)
    if M > 1:
        target[0] = -100
    return x, target


def on(path: str, target: Tensor, **kwargs: Any) -> Any:
    def op(**x: Tensor) -> Tensor:
        with fastgpt.use(path):
            return linear_cross_entropy(target=target, **x, **kwargs)

    return op


def factor(dtype: torch.dtype) -> float:
    """Where the vendor makes no float32 of 16-bit matrices, as on a CPU, gradients made in forward
    are rounded once before the incoming gradient scales them, and once after."""
    return 2.0 if dtype == torch.float32 else 3.0


def run(op: Any, x: dict[str, Tensor], dloss: Tensor | None = None) -> list[Tensor]:
    """The loss and its gradients by all inputs."""
    leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
    loss = op(**leaves)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), dloss)]


# ------------------------------------------------------------------ plain PyTorch


@settings(max_examples=20)
@given(
    M=st.integers(1, 9), V=st.integers(1, 20), chunk=st.sampled_from([None, 1, 4]),
    reduction=st.sampled_from(["mean", "sum", "none"]), bias=st.booleans(),
    options=st.sampled_from(OPTIONS),
)  # fmt: skip
def test_is_torchs_linear_and_cross_entropy(
    M: int, V: int, chunk: int | None, reduction: str, bias: bool, options: dict[str, Any]
) -> None:
    x, target = inputs(M, 6, V, torch.float64, bias=bias)
    kwargs = {"target": target, "reduction": reduction, **options}
    dloss = torch.randn(M if reduction == "none" else (), dtype=torch.float64)
    got = run(on("reference", chunk=chunk, **kwargs), x, dloss)
    want = run(partial(linear_cross_entropy_ref, **kwargs), x, dloss)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_plain_path_errs_no_more_than_torch(reduction: str, dtype: torch.dtype) -> None:
    x, target = inputs(40, 32, 77, dtype)
    kwargs = {"target": target, "reduction": reduction}
    ref = partial(linear_cross_entropy_ref, **kwargs)
    assert_matches(on("reference", chunk=16, **kwargs), ref, x, factor(dtype))


class Largest(TorchDispatchMode):
    """The most elements of a matrix that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.ndim == 2:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batch_and_time_and_never_more_than_a_tile_of_logits(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, target = inputs(60, 8, 300)
    flat = run(on("reference", target, reduction="none"), x, torch.ones(60))
    monkeypatch.setattr(vocabulary, "COLUMNS", 77)
    x["x"], target = x["x"].view(5, 12, 8), target.view(5, 12)
    dloss = torch.ones(5, 12) if reduction == "none" else None
    with Largest() as largest:
        got = run(on("reference", target, reduction=reduction, chunk=25), x, dloss)
    # A tile is 25 x 77; the weight and its gradient are 300 x 8.
    assert largest.numel == max(25 * 77, 300 * 8) < 60 * 300
    assert got[1].shape == (5, 12, 8)
    if reduction == "none":
        assert got[0].shape == (5, 12) and torch.allclose(got[0].flatten(), flat[0])
        for g, w in zip(got[1:], flat[1:], strict=True):
            assert torch.allclose(g.flatten(), w.flatten(), atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_for_backward(reduction: str) -> None:
    M, C, V = 8, 16, 50
    x, target = inputs(M, C, V, bias=False)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    given = {t.untyped_storage().data_ptr() for t in (*leaves.values(), target)}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        on("reference", target, reduction=reduction)(**leaves)
    assert sum(kept.values()) <= (4 * C * (M + V) if reduction == "mean" else 8 * M) + 16


def test_chunks_are_of_one_size_within_the_budget() -> None:
    for M in (1, 4096, 8192, 16384, 10**6):
        rows = chunk_rows(M, 50257, 2, GPU_BUDGET)
        assert rows * 50257 * 2 <= GPU_BUDGET
        assert M < 6000 or 4096 <= rows <= 8192
    assert chunk_rows(0, 50257, 2, GPU_BUDGET) == 1 and chunk_rows(5, 10**9, 4, GPU_BUDGET) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_under_autocast_as_linear_is_but_the_loss_is_float32(reduction: str) -> None:
    x, target = inputs(9, 16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *grads = run(on("reference", target, reduction=reduction),
                           x, torch.ones(9 if reduction == "none" else ()))  # fmt: skip
    half = {n: t.bfloat16() for n, t in x.items()}
    want, *theirs = run(partial(linear_cross_entropy_ref, target=target, reduction=reduction),
                        half, torch.ones(9 if reduction == "none" else ()))  # fmt: skip
    assert loss.dtype == torch.float32 and torch.allclose(loss, want, atol=1e-5)
    for g, w in zip(grads, theirs, strict=True):
        assert g.dtype == torch.float32 and torch.allclose(g, w.float(), atol=2e-2, rtol=2e-2)


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    x, target = inputs(8, 4, 10)
    x["x"].requires_grad_()
    register_flop_formulas()
    with FlopCounterMode(display=False) as count:
        on("reference", target)(**x).backward()
    assert x["weight"].grad is None and x["x"].grad is not None
    assert count.get_total_flops() == 2 * 2 * 8 * 4 * 10


@pytest.mark.parametrize("reduction, products", [("mean", 3), ("none", 4)])
def test_flops(reduction: str, products: int) -> None:
    x, target = inputs(8, 4, 10, bias=False)
    register_flop_formulas()
    with FlopCounterMode(display=False) as count:
        run(on("reference", target, reduction=reduction), x,
            torch.ones(8) if reduction == "none" else None)  # fmt: skip
    assert count.get_total_flops() == products * 2 * 8 * 4 * 10


def test_works_under_the_transforms_of_torch_func() -> None:
    x, target = inputs(5, 4, 7)
    grads = torch.func.grad(lambda x: on("reference", target)(**x))(x)
    want = run(partial(linear_cross_entropy_ref, target=target), x)[1:]
    assert all(torch.allclose(g, w) for g, w in zip(grads.values(), want, strict=True))


# ------------------------------------------------------------------ the kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "reduction, options", [("mean", {}), ("sum", OPTIONS[1]), ("none", OPTIONS[1])], ids=str
)
def test_kernel_matches(
    reduction: str, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    x, target = inputs(5, 16, 81, dtype, device)
    kwargs = {"target": target, "reduction": reduction, **options}
    ref = partial(linear_cross_entropy_ref, **kwargs)
    assert_matches(on("triton", chunk=3, **kwargs), ref, x, factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_matches_on_rows_of_several_blocks(reduction: str, device: str) -> None:
    x, target = inputs(2, 3, 8777, device=device)
    target[0] = 5000
    kwargs = {"target": target, "reduction": reduction, "label_smoothing": 0.1}
    ref = partial(linear_cross_entropy_ref, **kwargs)
    assert_matches(on("triton", **kwargs), ref, x)


@pytest.mark.gpu
@settings(max_examples=8 if INTERPRET else 3)
@given(data=st.data())
def test_kernel_matches_on_any_shape(data: st.DataObject, device: str) -> None:
    draw = data.draw
    M, C, V = draw(st.integers(1, 7)), draw(st.integers(1, 20)), draw(st.integers(1, 140))
    dtype, chunk = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, 1, 3]))
    x, target = inputs(M, C, V, dtype, device, bias=draw(st.booleans()))
    if draw(st.booleans()):
        x = {n: torch.stack([t, t], -1)[..., 1] for n, t in x.items()}  # no dimension contiguous
    kwargs = {"target": target, "reduction": draw(st.sampled_from(["sum", "none"]))}
    ref = partial(linear_cross_entropy_ref, **kwargs)
    assert_matches(on("triton", chunk=chunk, **kwargs), ref, x, factor(dtype))


@pytest.mark.gpu
def test_losses_do_not_depend_on_the_chunk(device: str) -> None:
    """On integers, whose products are exact in any order: the vendor's may change with the rows."""
    x, target = inputs(7, 8, 70, device=device)
    x = {n: t.round() for n, t in x.items()}
    whole, *others = (
        on("triton", target, reduction="none", chunk=chunk)(**x) for chunk in (None, 1, 2, 5)
    )
    assert all(torch.equal(whole, losses) for losses in others)


@pytest.mark.gpu
def test_dweight_is_added_in_float32(device: str) -> None:
    """In 16 bits a sum stops growing where one more chunk is less than half a step."""
    half = DTYPES[-1]
    x = {"x": torch.full((64, 1), 0.01, dtype=half, device=device)}
    x["weight"] = torch.zeros(2, 1, dtype=half, device=device)
    target = torch.zeros(64, dtype=torch.int64, device=device)
    _, _, dw = run(on("triton", target, reduction="sum", chunk=4), x)
    want = 64 * 0.5 * x["x"][0, 0].float()
    assert torch.allclose(dw[:, 0].float(), torch.stack([-want, want]).to(half).float())


@pytest.mark.gpu
def test_the_same_bits_twice_and_a_graph_kept(device: str) -> None:
    x, target = inputs(6, 8, 50, device=device)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    loss = on("triton", target, chunk=4)(**leaves)
    once, twice = (
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)
    )
    again = run(on("triton", target, chunk=4), x)
    assert torch.equal(loss, again[0])
    for a, b, c in zip(once, twice, again[1:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    x, target = inputs(4, 5, 12, device=device)

    def penalty(op: Any) -> Any:
        leaves = [t.clone().requires_grad_() for t in x.values()]
        loss = op(**dict(zip(x, leaves, strict=True)))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    want = penalty(partial(linear_cross_entropy_ref, target=target))
    for g, w in zip(penalty(on("triton", target)), want, strict=True):
        assert torch.allclose(g, w, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_nan_stays_in_its_row_of_dx(device: str) -> None:
    x, target = inputs(4, 5, 40, device=device)
    clean = run(on("triton", target), x)[1]
    x["x"][2, 1] = float("nan")
    loss, dx, *_ = run(on("triton", target), x)
    assert loss.isnan() and dx[2].isnan().all()
    assert torch.equal(dx[[0, 1, 3]], clean[[0, 1, 3]]) and (dx[0] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_counts(reduction: str, device: str) -> None:
    x, _ = inputs(3, 4, 9, device=device)
    target = torch.full((3,), -100, device=device)
    loss, *grads = run(on("triton", target, reduction=reduction), x)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.gpu
def test_empty(device: str) -> None:
    x, target = inputs(1, 3, 4, device=device)
    on("triton", target)(**x)  # the proof that kernels run in this mode
    x, target = inputs(0, 3, 4, device=device)
    loss, *grads = run(on("triton", target, reduction="sum"), x)
    assert loss == 0 and all((g == 0).all() for g in grads)


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("needs", [[True] * 3, [True, False, False], [False] * 3], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(needs: list[bool], bias: bool) -> None:
    x, target = inputs(5, 4, 9, bias=bias)
    needs = [*needs[:2], needs[2] and bias]
    args = (x["x"], x["weight"], x.get("bias"), target, *HOW, torch.float32, 2, needs, False, None)
    torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_fwd, args)
    stats = torch.ops.fastgpt.linear_cross_entropy_fwd(*args[:-3], [False] * 3, False, None)[1]
    back = (torch.randn(5), *args[:4], stats, *HOW, torch.float32, 2, needs, False)
    torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_bwd, back)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_function_gradcheck_and_double_backward(reduction: str) -> None:
    x, target = inputs(4, 3, 5, torch.float64)

    def f(*x: Tensor) -> Any:
        return LinearCrossEntropyFunction.apply(*x, target, HOW, reduction, torch.float64, 3, False)

    leaves = [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    def f(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
        return (linear_cross_entropy(x, weight, target, bias=bias),)

    calls = [inputs(M, 8, 16) for M in (4, 7, 12)]
    assert_one_graph(f, [{**x, "target": target} for x, target in calls])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_gradients_are_the_eager_ones(reduction: str) -> None:
    x, target = inputs(6, 8, 16)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction).sum()

    assert_compiled_gradients_match(loss, x)


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    x, w, t = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3, dtype=torch.int64)
    for args, kwargs, rule in [
        ((x, w.T, t), {}, r"weight \(V, C\), V and C at least 1; got x \(2, 3, 8\), weight \(8, 5"),
        ((x, w[:0], t), {}, "V and C at least 1"),
        ((x, w, t[0]), {}, r"target must be \(...\) for x \(..., C\); got"),
        ((x, w, t + 5), {}, r"targets must be -100 or in \[0, 5\); got 5"),
        ((x, w, t), {"bias": w[0]}, r"bias must be \(5,\); got \(8,\)"),
        ((x, w, t), {"chunk": 0}, "chunk must be None or at least 1; got 0"),
        ((x, w, t), {"reduction": "max"}, "reduction must be one of"),
        ((x, w.to("meta"), t), {}, "on one device; got x cpu, weight meta"),
    ]:
        with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{rule}"):
            linear_cross_entropy(*args, **kwargs)
    with pytest.raises(TypeError, match=r"must have one dtype; got x torch\.float32, weight"):
        linear_cross_entropy(x, w.half(), t)
    with pytest.raises(TypeError, match=r"x must have a floating dtype; got torch\.int64"):
        linear_cross_entropy(x.long(), w, t)
    with pytest.raises(TypeError, match="target must be int64 or int32"):
        linear_cross_entropy(x, w, t.float())
