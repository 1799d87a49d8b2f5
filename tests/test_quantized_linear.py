"""quantized_linear: specification, PyTorch path, kernels, registered ops, layers, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgpt
from fastgpt.kernels import quantized_linear as kernels
from fastgpt.kernels import tiles, tuned
from fastgpt.lab import cases, traffic
from fastgpt.layers import MLP
from fastgpt.ops import quantized_linear, quantized_linear_ref, register_flop_formulas
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.ffn import ACTIVATIONS
from fastgpt.ops.quantized_linear import QuantizedLinearFunction, dequantize
from fastgpt.quantized import Int4Linear, Int8Embedding, Int8Linear, quantize_int4, quantize_int8
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES, HAS_CUDA, SANITIZED

KINDS = ["int8", "int8 groups", "int4"]


def weights(
    kind: str, N: int, K: int, device: str = "cpu", group: int = 32
) -> tuple[Tensor, Tensor]:
    """Weight and scale."""
    w = torch.randn(N, K) * K**-0.5
    if kind == "int8":
        made = quantize_int8(w)
    elif kind == "int4":
        made = quantize_int4(w)
        if group > 32:  # a group's scale and low stand for the groups beside it as well
            made = made[0], made[1][:, :: group // 32].contiguous()
    else:
        q, scale = quantize_int8(w.view(-1, group))
        made = q.view(N, K), scale.view(N, -1)
    return made[0].to(device), made[1].to(device)


def inputs(M: int, N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """What has a gradient."""
    made = {"x": torch.randn(M, K), "bias": torch.randn(N)}
    return {name: t.to(device, dtype) for name, t in made.items()}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the sanitizer, which takes a second for a tile of a GPU's, the interpreter's tiles."""
    if SANITIZED:
        small = (
            tiles.Tile(4, 128, 1, 1),
            tiles.ProductTile(16, 16, 4, 1, 32),
            tiles.Tile(8, 64, 1, 1),
        )
        for name, tile in zip(("row_tile", "tile", "unpack"), small, strict=True):
            name = "unpack_tile" if name == "unpack" else f"quantized_{name}"
            monkeypatch.setattr(kernels, name, lambda *_, tile=tile: tile)
        monkeypatch.setattr(tuned, "_chosen", {})


def kernel(weight: Tensor, scale: Tensor, **kwargs: Any) -> Any:
    def op(x: Tensor, bias: Tensor | None = None) -> Tensor:
        with fastgpt.use("triton"):
            return quantized_linear(x, weight, scale, bias, **kwargs)

    return op


def reference(weight: Tensor, scale: Tensor, **kwargs: Any) -> Any:
    def op(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return quantized_linear_ref(x, weight, scale, bias, **kwargs)

    return op


def assert_right(weight: Tensor, scale: Tensor, x: dict[str, Tensor], **kwargs: Any) -> None:
    assert_matches(kernel(weight, scale, **kwargs), reference(weight, scale, **kwargs), x)


# ------------------------------------------------------------------ the specification


def test_reference_is_the_formula() -> None:
    """Element by element, in plain Python."""
    q = torch.tensor([[1, -2, 3, -127], [0, 5, 127, 7]], dtype=torch.int8)
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
    one, two = torch.tensor([0.5, 2.0]), torch.tensor([[0.5, 0.25], [2.0, 4.0]])
    bias = torch.tensor([1.0, -1.0], dtype=torch.float64)
    want = [0.5 * (1 - 4 - 3 - 63.5) + 1, 2.0 * (10 - 127 + 3.5) - 1]
    assert quantized_linear_ref(x, q, one, bias).tolist() == [want]
    want = [0.5 * (1 - 4) + 0.25 * (-3 - 63.5), 2.0 * 10 + 4.0 * (-127 + 3.5)]
    assert quantized_linear(x, q, two).tolist() == [want]
    packed = torch.tensor([[0x21, 0xF0]], dtype=torch.uint8)  # 1, 2, 0, 15
    grid = torch.tensor([[[0.5, -1.0], [0.25, 2.0]]], dtype=torch.bfloat16)
    numbers = [0.5 - 1, 1.0 - 1, 2.0, 3.75 + 2]
    assert dequantize(packed, grid, torch.float64).tolist() == [numbers]
    y = quantized_linear(x, packed, grid, activation="relu")
    assert y.tolist() == [[max(0.0, -0.5 + 0.0 - 2.0 + 2.875)]]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_weights_are_the_ops(kind: str) -> None:
    linear = nn.Linear(64, 48)
    layer = (Int4Linear if kind == "int4" else Int8Linear).of(linear)
    w = layer.dequantized(torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    want = F.linear(x, w, linear.bias.double())
    torch.testing.assert_close(
        quantized_linear(x, layer.weight, layer.scale, linear.bias.detach().double()), want
    )
    torch.testing.assert_close(layer(x.float()).double(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    weight, scale = weights(kind, 5, 64)
    x = [t.requires_grad_() for t in inputs(3, 5, 64, torch.float64).values()]
    for path in (
        lambda x, bias: quantized_linear(x, weight, scale, bias, activation="silu"),
        lambda x, bias: QuantizedLinearFunction.apply(x, weight, scale, bias),
    ):
        assert torch.autograd.gradcheck(path, x)
        assert torch.autograd.gradgradcheck(path, x)


# ------------------------------------------------------------------ the kernels

# One row, few and more; of one and many tiles; K of one lane and of more than all lanes hold.
SHAPES = [(1, 1, 32), (1, 9, 288), (2, 17, 64), (8, 3, 96), (9, 16, 32), (37, 34, 96)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_matches(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    weight, scale = weights(kind, *shape[1:], device)
    assert_right(weight, scale, inputs(*shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 15, 17, 67])
@pytest.mark.parametrize("M", [1, 5])
def test_int8_takes_any_number_of_columns(M: int, K: int, dtype: torch.dtype, device: str) -> None:
    weight, scale = weights("int8", 18, K, device)
    assert_right(weight, scale, inputs(M, 18, K, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("kind, group", [("int8 groups", 16), ("int8 groups", 128), ("int4", 64)])
@pytest.mark.parametrize("M", [1, 6])
def test_groups_of_other_sizes(kind: str, group: int, M: int, device: str) -> None:
    for dtype in DTYPES:
        weight, scale = weights(kind, 7, 256, device, group)
        assert_right(weight, scale, inputs(M, 7, 256, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [1, 3])
def test_activation_and_bias_are_in_the_epilogue(M: int, activation: str, device: str) -> None:
    """Without a gradient in one op; with one, the op and PyTorch's activation."""
    weight, scale = weights("int4", 18, 64, device)
    x = inputs(M, 18, 64, torch.float16, device)
    with torch.no_grad():
        got = kernel(weight, scale, activation=activation)(**x)
    same = quantized_linear_ref(x["x"], weight, scale, x["bias"], activation=activation)
    wide = {name: t.double() for name, t in x.items()}
    gold = reference(weight, scale, activation=activation)(**wide)
    theirs = (same.double() - gold).abs().max()
    assert (got.double() - gold).abs().max() <= 2 * theirs + 1e-5
    assert_right(weight, scale, x, activation=activation)
    assert_right(weight, scale, {"x": x["x"]}, activation=activation)


@pytest.mark.gpu
@settings(max_examples=10 if INTERPRET else 4)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    M, N = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    K = draw(st.integers(1, 99)) if kind == "int8" else 32 * draw(st.integers(1, 4))
    x = inputs(M, N, K, dtype, device)
    how = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if how == "transposed":
        x["x"] = x["x"].T.contiguous().T
    elif how == "sliced":
        x["x"] = torch.cat([x["x"]] * 2, 1)[:, 1 : 1 + K]
    elif how == "expanded":
        x["x"] = x["x"][:1].expand(M, K)
    weight, scale = weights(kind, N, K, device)
    if draw(st.booleans()):  # a view: every second row, from an odd byte on
        weight = torch.cat([weight] * 2, 1).repeat_interleave(2, 0)[::2, 1:][:, : weight.shape[1]]
        scale = scale.repeat_interleave(2, 0)[::2]
    assert_right(weight, scale, x)


@pytest.mark.gpu
def test_programs_that_share_a_tile_add_in_order(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, to rounding, however many share it; and the same bits twice."""
    dtype = torch.float16
    weight, scale = weights("int4", 17, 224, device)
    x = inputs(5, 17, 224, dtype, device)
    for each in (1, 2, 100):
        monkeypatch.setattr(
            kernels, "quantized_splits", lambda _, blocks, __, each=each: (each, -(-blocks // each))
        )
        assert_right(weight, scale, x)
        first, second = (kernel(weight, scale, activation="gelu")(**x) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_the_vendors_product(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MANY", 3)
    weight, scale = weights(kind, 18, 64, device)
    for dtype in DTYPES:
        x = inputs(9, 18, 64, dtype, device)
        assert_right(weight, scale, x, activation="gelu_tanh")
        with torch.no_grad():
            got = kernel(weight, scale, activation="silu")(**x)
        want = reference(weight, scale, activation="silu")(**x)
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_weights_become_the_numbers_they_are(kind: str, device: str) -> None:
    weight, scale = weights(kind, 11, 96, device)
    for dtype in DTYPES:
        got = kernels.dequantize(weight, scale, dtype)
        want = dequantize(weight, scale, dtype)
        # A product and a sum are rounded once in the kernel, and twice in PyTorch.
        off = (got.double() - want.double()).abs()
        assert bool((off <= 2.0**-22 + torch.finfo(dtype).eps * want.double().abs()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [2, 40])
def test_a_row_that_is_not_finite_keeps_to_itself(kind: str, M: int, device: str) -> None:
    """The last row too, which rows beyond the edge read again."""
    weight, scale = weights(kind, 18, 64, device)
    x = inputs(M, 18, 64, torch.float16, device)
    clean = kernel(weight, scale)(**x)
    for row in (0, M - 1):
        spoilt = x["x"].clone()
        spoilt[row, 3] = float("nan")
        got = kernel(weight, scale)(spoilt, x["bias"])
        others = (torch.arange(M) != row).to(device)
        assert torch.equal(got[others], clean[others]) and bool(got[row].isnan().all())


@pytest.mark.gpu
def test_leading_dimensions_and_empty_input(device: str) -> None:
    weight, scale = weights("int4", 7, 64, device)
    x = torch.randn(2, 3, 64, device=device)
    y = kernel(weight, scale)(x)
    assert y.shape == (2, 3, 7)
    torch.testing.assert_close(y, quantized_linear_ref(x, weight, scale), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kernel(weight, scale)(x[0, 0]), y[0, 0], atol=1e-5, rtol=1e-5)
    none = x[:0].requires_grad_()
    y = kernel(weight, scale)(none)
    (dx,) = torch.autograd.grad(y.sum(), none)
    assert y.shape == (0, 3, 7) and dx.shape == none.shape


@pytest.mark.gpu
def test_layers_run_the_kernel(device: str) -> None:
    """And a feed-forward of theirs has its activation in the first one's epilogue, unless a hook
    is to see what that gives."""
    embedding = Int8Embedding.of(nn.Embedding(20, 32)).to(device)
    mlp: Any = MLP(32, n_inner=64)
    mlp.c_fc, mlp.c_proj = Int8Linear.of(mlp.c_fc), Int4Linear.of(mlp.c_proj)
    mlp = mlp.to(device)
    x = torch.randn(3, 32, device=device)
    with torch.no_grad():
        assert [c.path for c in fastgpt.explain(embedding.product, x)] == ["triton"]
        got: list[Tensor] = []
        choices = fastgpt.explain(lambda: got.append(mlp(x)))
        assert [(c.op, c.path) for c in choices] == [("quantized_linear", "triton")] * 2
        wide = MLP(32, n_inner=64).to(device)
        for name in ("c_fc", "c_proj"):
            part, ours = getattr(wide, name), getattr(mlp, name)
            part.weight.copy_(ours.dequantized())
            part.bias.copy_(ours.bias)
        with fastgpt.use("reference"):
            want = wide(x)
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
        seen: list[Tensor] = []
        mlp.c_fc.register_forward_hook(lambda module, args, y: seen.append(y))
        torch.testing.assert_close(mlp(x), got[0], atol=1e-5, rtol=1e-5)
        assert bool((seen[0] < -0.5).any())  # gelu gives no such numbers


@pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="counts in a process of its own")
def test_weights_are_read_once_as_they_are_stored() -> None:
    """By one row and by eight; x and what belongs to columns once a program."""
    N, K = 128, 1024
    for bits, scales in ((8, 4 * N), (4, 2 * 2 * N * K // 32)):
        launches = cases.launches(f"quantized_linear:M=8,N={N},K={K},bits={bits}", "sm_90")
        found, _ = traffic.measure(launches, "sm_90", timeout=60.0)
        loaded = {t.kernel.partition(".")[2]: t.loaded for t in found}
        stored = N * K * bits // 8 + scales
        assert loaded["_row_kernel"] == stored + 2 * N + N * (2 * K)  # N programs
        again = scales if bits == 8 else 0  # of a row, by each of two programs that share a tile
        assert loaded["_rows_kernel"] == stored + again + N // 64 * (8 * 2 * K)


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    weight, scale = weights(kind, 5, 64)
    x = inputs(3, 5, 64, torch.float32)
    for bias, activation in ((x["bias"], None), (None, "gelu")):
        args = (x["x"], weight, scale, bias, activation)
        torch.library.opcheck(torch.ops.fastgpt.quantized_linear_fwd, args)
    dy = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.fastgpt.quantized_linear_bwd, (dy, weight, scale))


def test_compiles_to_one_graph_for_three_row_counts() -> None:
    weight, scale = weights("int4", 5, 64)

    def f(x: Tensor, bias: Tensor) -> Any:
        return (QuantizedLinearFunction.apply(x, weight, scale, bias),)

    assert_one_graph(f, [inputs(M, 5, 64, torch.float32) for M in (3, 5, 8)])
    x = inputs(4, 5, 64, torch.float32)
    assert_compiled_gradients_match(lambda *args: f(*args)[0].square().sum(), x)


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    weight, scale = weights("int4", 5, 64)
    x = {n: t.requires_grad_() for n, t in inputs(3, 5, 64, torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        QuantizedLinearFunction.apply(x["x"], weight, scale, x["bias"]).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 64)


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    x, (q, s), (p, g) = torch.randn(2, 64), weights("int8", 5, 64), weights("int4", 5, 64)
    for args, kwargs, rule in [
        ((x, q, s), {"activation": "tanh"}, "activation must be None or one of gelu_tanh, gelu"),
        ((x[:, :60], q, s), {}, "last dimension of x must be weight's columns; got x"),
        ((x[:, :32], p, g), {}, "last dimension of x must be twice weight's columns"),
        ((x, q[0], s), {}, r"weight \(N, K\), or \(N, K / 2\); got"),
        ((x, q, s[:4]), {}, r"scale of torch.int8 weights must be \(N,\) or \(N, groups\)"),
        ((x, q, g), {}, r"scale of torch.int8 weights must be"),
        ((x, p, s), {}, r"scale of torch.uint8 weights must be \(N, groups, 2\)"),
        ((x, q, torch.ones(5, 3)), {}, "groups of scale must share K, 64, equally"),
        ((x, q, s, torch.ones(4)), {}, r"bias must be \(5,\); got \(4,\)"),
        ((x, q.to("meta"), s), {}, "on one device; got x cpu, weight meta"),
        ((x, q, s.clone().requires_grad_()), {}, "scale has no gradient"),
    ]:
        with pytest.raises(ValueError, match=f"^quantized_linear: .*{rule}"):
            quantized_linear(*args, **kwargs)
    for args, rule in [
        ((x, q.float(), s), "weight must be int8, or uint8 .* got torch.float32"),
        ((x.long(), q, s), "x must have a floating dtype; got torch.int64"),
        ((x, q, s.int()), "scale must have a floating dtype"),
        ((x, q, s, torch.ones(5).half()), "bias must have the dtype of x; got torch.float16"),
    ]:
        with pytest.raises(TypeError, match=f"^quantized_linear: {rule}"):
            quantized_linear(*args)


@pytest.mark.parametrize(
    "kind, group, rule",
    [("int8 groups", 8, "16 or more; got 8"), ("int8 groups", 48, "power of 2, 16 .* got 48")],
)
def test_other_groups_are_plain_pytorch(kind: str, group: int, rule: str) -> None:
    weight, scale = weights(kind, 5, 144, group=group)
    x = torch.randn(2, 144)
    want = F.linear(x, dequantize(weight, scale, torch.float32))
    with fastgpt.ops.backend.rehearsal():
        torch.testing.assert_close(quantized_linear(x, weight, scale), want)
        with fastgpt.use("triton"), pytest.raises(ValueError, match=rule):
            quantized_linear(x, weight, scale)
