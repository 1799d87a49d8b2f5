"""ffn: specification, PyTorch path, kernels, registered ops, errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.kernels import product, tiles, tuned
from fastgpt.kernels.ffn import _rows as rows
from fastgpt.ops import ffn, ffn_ref, register_flop_formulas
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.ffn import ACTIVATIONS, FFNFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES, SANITIZED


def inputs(
    M: int, C: int, F: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
    gated: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    x = {"x": torch.randn(M, C), "w1": torch.randn(F, C) * C**-0.5, "b1": torch.randn(F)}
    x |= {"w2": torch.randn(C, F) * F**-0.5, "b2": torch.randn(C)}
    if gated:
        x |= {"w_gate": torch.randn(F, C) * C**-0.5, "b_gate": torch.randn(F)}
    return {n: t.to(device, dtype) for n, t in x.items()}


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the sanitizer, which takes a second for a tile of a GPU's, the interpreter's tiles."""
    if SANITIZED and "real_tiles" not in request.keywords:
        monkeypatch.setattr(tiles, "_FFN", dict.fromkeys(tiles._FFN, tiles._FFN["interpreter"]))
        monkeypatch.setattr(tuned, "_chosen", {})


def function(x: dict[str, Tensor], activation: str = "gelu_tanh", recompute: int = 1) -> Tensor:
    """The autograd function, where `ffn` takes plain PyTorch."""
    names = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate")
    y: Tensor = FFNFunction.apply(*map(x.get, names), activation, recompute)
    return y


def kernel(**kwargs: Any) -> Any:
    def op(**x: Any) -> Tensor:
        with fastgpt.use("triton"):
            return ffn(**dict.fromkeys(("b1", "b2")) | x, **kwargs)

    return op


def reference(**kwargs: Any) -> Any:
    def op(**x: Any) -> Tensor:
        return ffn_ref(**dict.fromkeys(("b1", "b2")) | x, **kwargs)

    return op


# ------------------------------------------------------------------ the specification


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: str, gated: bool) -> None:
    x = inputs(5, 8, 6, dtype=torch.float64, gated=gated)
    u = z = x["x"] @ x["w1"].T + x["b1"]
    if gated:
        u = x["x"] @ x["w_gate"].T + x["b_gate"]
    act = {
        "relu": u.clamp(min=0),
        "silu": u / (1 + torch.exp(-u)),
        "gelu": u * torch.special.ndtr(u),
        "gelu_tanh": u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
    }[activation]
    want = (act * z if gated else act) @ x["w2"].T + x["b2"]
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
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_kernel_matches(
    activation: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    x = inputs(*shape, dtype=dtype, device=device)
    assert_matches(kernel(activation=activation), reference(activation=activation), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 70, 33), (20, 2056, 9)], ids=str)
def test_gated_kernel_matches(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    x = inputs(*shape, dtype=dtype, device=device, gated=True)
    assert_matches(kernel(activation="silu"), reference(activation="silu"), x)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_matches_without_biases(dtype: torch.dtype, gated: bool, device: str) -> None:
    x = inputs(65, 16, 20, dtype=dtype, device=device, gated=gated)
    x = {name: t for name, t in x.items() if not name.startswith("b")}
    assert_matches(kernel(), reference(), x)


@pytest.mark.gpu
@settings(max_examples=10 if INTERPRET else 4)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    M, C, F = (draw(st.integers(1, 70)) for _ in range(3))
    dtype, gated = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    x = inputs(M, C, F, dtype=dtype, device=device, gated=gated)
    for name in ("x", "w1", "w2", "w_gate")[: 4 if gated else 3]:
        how = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        if how == "transposed":
            x[name] = x[name].T.contiguous().T
        elif how == "sliced":
            x[name] = torch.cat([x[name]] * 2, 1)[:, 1 : 1 + x[name].shape[1]]
    kwargs = {
        "activation": draw(st.sampled_from(ACTIVATIONS)), "recompute": draw(st.integers(0, 2))
    }  # fmt: skip
    assert_matches(kernel(**kwargs), reference(activation=kwargs["activation"]), x)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_recompute_changes_what_is_kept_and_no_bit(gated: bool, device: str) -> None:
    x = inputs(9, 16, 64, dtype=DTYPES[-1], device=device, gated=gated)
    kept: list[int] = []
    grads = []
    for recompute in (2, True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        kept.append(0)

        def keep(t: Tensor) -> Tensor:
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = kernel(recompute=recompute)(**leaves)
        grads.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    assert kept[1] - kept[0] == 9 * 64 * (2 if gated else 1)
    assert kept[2] - kept[1] == 9 * 64
    for each in zip(*grads, strict=True):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])


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


WAYS = {"descriptors": (True, True), "interleaved": (False, True), "pointers": (False, False)}


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["descriptors", "pointers"])
def test_weights_kept_as_in_by_out_are_read_in_place(
    how: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' Conv1D keeps them. The gradients lie in memory as they do."""
    monkeypatch.setattr(product, "has_tma", lambda: how == "descriptors")
    x = inputs(35, 40, 48, dtype=torch.float16, device=device)
    assert_matches(kernel(), reference(), x | {n: x[n].T.contiguous().T for n in ("w1", "w2")})
    leaves = {n: t.T.contiguous().requires_grad_() for n, t in x.items() if n in ("w1", "w2")}
    views = {n: t.T for n, t in leaves.items()}
    copied: list[tuple[int, ...]] = []
    whole = Tensor.contiguous

    def noted(t: Tensor) -> Tensor:
        copied.append(tuple(t.shape))
        return whole(t)

    monkeypatch.setattr(Tensor, "contiguous", noted)
    y = kernel()(**x | views)
    grads = torch.autograd.grad(y.sum(), list(views.values()))
    assert not {(48, 40), (40, 48)} & set(copied)
    for g, view in zip(grads, views.values(), strict=True):
        assert g.stride() == view.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_load_gives_the_product(
    how: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in zip(("has_tma", "interleaves"), WAYS[how], strict=True):
        monkeypatch.setattr(product, name, lambda answer=answer: answer)
    x = inputs(35, 40, 48, dtype=torch.float16, device=device, gated=True)
    assert product.how_to_load(x["x"], x["w1"], x["w_gate"]) == how
    assert_matches(kernel(activation="silu"), reference(activation="silu"), x)


def test_descriptors_are_for_aligned_rows_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "has_tma", lambda: True)
    x = torch.empty(8, 64, dtype=torch.bfloat16)
    assert product.how_to_load(x, x) == product.how_to_load(x[:, 8:40], x) == "descriptors"
    for other in (x[:, 1:9], torch.empty_like(x[:, :60]), x[:1].expand(8, 64)):
        assert product.how_to_load(other, x) == "pointers"


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    far = torch.empty(256, 2**23, device="meta")[:, :8]
    assert rows(far).stride(0) == 8
    near = torch.empty(256, 4096, device="meta")
    assert rows(near) is near


@pytest.mark.gpu
@pytest.mark.parametrize("C", [24, 2056])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_keeps_to_itself(bad: float, C: int, device: str) -> None:
    """The last row too, which rows beyond the edge read again."""
    x = inputs(5, C, 9, dtype=torch.float16, device=device, gated=True)
    for row in (1, 4):
        for activation in ("relu", "silu") if row == 1 else ("gelu_tanh",):
            spoilt = x | {"x": x["x"].clone()}
            spoilt["x"][row, 3] = bad
            others = torch.arange(5) != row
            got = []
            for each in (x, spoilt):
                leaf = each["x"].clone().requires_grad_()
                y = kernel(activation=activation)(**each | {"x": leaf})
                got.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
            for clean, other in zip(*got, strict=True):
                assert torch.equal(clean[others.to(device)], other[others.to(device)])
            assert not got[1][0][row].isfinite().any()


@pytest.mark.gpu
def test_rows_do_not_depend_on_the_others(device: str) -> None:
    x = inputs(40, 24, 20, dtype=torch.float16, device=device, gated=True)
    whole = kernel()(**x)
    parts = [kernel()(**x | {"x": rows}) for rows in x["x"].split((1, 32, 7))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.gpu
def test_denormal_numbers_pass(device: str) -> None:
    x = inputs(2, 8, 8, device=device)
    x["x"] = x["x"] * 1e-39
    x["b1"] = torch.zeros_like(x["b1"])
    for activation in ("gelu_tanh", "silu"):
        assert_matches(kernel(activation=activation), reference(activation=activation), x)


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
    x = inputs(5, 8, 12, device=device, gated=True)
    for name in x:
        one = x | {name: x[name].clone().requires_grad_()}
        got = torch.autograd.grad(kernel()(**one).square().sum(), one[name])[0]
        want = torch.autograd.grad(reference()(**one).square().sum(), one[name])[0]
        assert torch.allclose(got, want, atol=1e-3), name


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    def penalty(op: Any) -> list[Tensor]:
        torch.manual_seed(1)
        x = inputs(3, 4, 5, device=device, gated=True)
        x = {n: t.requires_grad_() for n, t in x.items()}
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


@pytest.mark.parametrize(
    ("activation", "recompute", "gated"),
    [("gelu_tanh", 1, False), ("relu", 0, False), ("gelu", 2, True), ("silu", 0, True)],
)
def test_opcheck(activation: str, recompute: int, gated: bool) -> None:
    x = inputs(3, 4, 5, gated=gated)
    w1, b1, w2, gate = x["w1"], x["b1"], x["w2"], (x.get("w_gate"), x.get("b_gate"))
    args = (x["x"], w1, b1, w2, x["b2"], *gate, activation, recompute < 2, recompute < 1)
    torch.library.opcheck(torch.ops.fastgpt.ffn_fwd, args)
    y, pre, h = torch.ops.fastgpt.ffn_fwd(*args)
    rest = (torch.randn_like(y), x["x"], w1, b1, w2, *gate, pre, h, activation)
    for needs in ([True] * 5, [True, False, False, True, False]):
        both = [*needs, gated, gated and needs[1]]
        torch.library.opcheck(torch.ops.fastgpt.ffn_bwd, (*rest, both))
    turned = x["x"].T.contiguous().T
    torch.library.opcheck(torch.ops.fastgpt.ffn_bwd, (rest[0], turned, *rest[2:], both))
    w1, w2 = w1.T.contiguous().T, w2.T.contiguous().T
    rest = (torch.randn_like(y), x["x"], w1, b1, w2, *gate, pre, h, activation)
    torch.library.opcheck(torch.ops.fastgpt.ffn_bwd, (*rest, both))


@pytest.mark.parametrize(
    ("activation", "recompute", "gated"),
    [("gelu_tanh", 0, False), ("gelu", 0, True), ("silu", 0, False), ("silu", 2, True)],
)
def test_function_gradcheck_and_double_backward(
    activation: str, gated: bool, recompute: int
) -> None:
    x = inputs(3, 4, 5, dtype=torch.float64, gated=gated)

    def op(*tensors: Tensor) -> Tensor:
        return function(dict(zip(x, tensors, strict=True)), activation, recompute)

    leaves = [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_to_one_graph_for_three_row_counts(gated: bool) -> None:
    def f(**x: Tensor) -> Any:
        return (function(x),)

    assert_one_graph(f, [inputs(M, 8, 12, gated=gated) for M in (3, 5, 8)])


@pytest.mark.parametrize("recompute", [1, 2])
def test_compiled_gradients_are_the_eager_ones(recompute: int) -> None:
    x = inputs(4, 8, 12, gated=recompute == 2)

    def loss(*tensors: Tensor) -> Tensor:
        return function(dict(zip(x, tensors, strict=True)), recompute=recompute).square().sum()

    assert_compiled_gradients_match(loss, x)


@pytest.mark.parametrize("recompute", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_of_the_products(gated: bool, recompute: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()

    M, C, F = 3, 4, 5
    x = {n: t.requires_grad_() for n, t in inputs(M, C, F, gated=gated).items()}
    with FlopCounterMode(display=False) as counter:
        function(x, "relu", recompute).sum().backward()
    weights = 3 if gated else 2
    products = 3 * weights + (weights - 1 if recompute == 2 else 0)
    assert counter.get_total_flops() == products * (2 * M * C * F)


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
        ((x, w1, b1, w2, b2), {"recompute": 3}, "recompute must be 0, 1 or 2; got 3"),
        ((x, w1, b1, w2, b2), {"w_gate": w2}, r"w_gate must .* w1, \(6, 4\); got \(4, 6\)"),
        ((x, w1, b1, w2, b2), {"w_gate": w1, "b_gate": b2}, r"b_gate must be \(6,\); got"),
        ((x, w1, b1, w2, b2), {"b_gate": b1}, "b_gate is the bias of w_gate; got b_gate alone"),
    ]:
        with pytest.raises(ValueError, match=f"ffn: .*{rule}"):
            ffn(*args, **kwargs)
    with pytest.raises(TypeError, match=r"one dtype; got x torch\.float32, w1 torch\.float16"):
        ffn(x, w1.half(), b1, w2, b2)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        ffn(x.long(), w1, b1, w2, b2)
