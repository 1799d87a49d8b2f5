"""rotary: specification, properties, kernels, registered ops, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.ops import rotary, rotary_ref, rotary_table
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.rotary import RotaryFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES, SANITIZED


def inputs(
    B: int, T: int, H: int, Hkv: int, D: int, dtype: torch.dtype = torch.float32,
    device: str = "cpu", norm: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    x = {"q": torch.randn(B, T, H, D, dtype=dtype, device=device)}
    x["k"] = torch.randn(B, T, Hkv, D, dtype=dtype, device=device)
    if norm:
        x["q_weight"] = torch.randn(D, dtype=dtype, device=device)
        x["k_weight"] = torch.randn(D, dtype=dtype, device=device)
    return x


def joined(op: Any, cos: Tensor, sin: Tensor, **kwargs: Any) -> Any:
    """q and k turned as one tensor, so that both carry gradient."""
    return lambda q, k, **w: torch.cat(op(q, k, cos, sin, **w, **kwargs), 2)


def kernel(*args: Any, **kwargs: Any) -> Any:
    with fastgpt.use("triton"):
        return rotary(*args, **kwargs)


def matches(
    x: dict[str, Tensor], cos: Tensor | None = None, sin: Tensor | None = None, **kwargs: Any
) -> None:
    if cos is None or sin is None:
        cos, sin = rotary_table(x["q"].shape[1], x["q"].shape[3], device=x["q"].device)
    assert_matches(joined(kernel, cos, sin, **kwargs), joined(rotary_ref, cos, sin, **kwargs), x)


# ------------------------------------------------------------------ the specification


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_is_a_complex_number_times_its_phase(interleaved: bool) -> None:
    x = inputs(2, 7, 3, 1, 10, dtype=torch.float64)
    t, i = torch.arange(7.0, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    angle = torch.outer(t, 100.0 ** (-i / 5))[:, None]  # (T, 1, D / 2)
    cos, sin = angle[:, 0].cos(), angle[:, 0].sin()
    for got, want in zip(
        rotary(**x, cos=cos, sin=sin, interleaved=interleaved), x.values(), strict=True
    ):
        assert got.dtype == torch.float64
        parts = [
            (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1) for y in (got, want)
        ]
        turned, plain = (torch.complex(a.contiguous(), b.contiguous()) for a, b in parts)
        torch.testing.assert_close(turned, plain * torch.polar(torch.ones_like(angle), angle))


def test_table_is_that_of_the_paper_and_exact_far_out() -> None:
    cos, sin = rotary_table(1_000_001, 8, theta=500.0)
    angle = 1e6 * 500.0 ** (-np.arange(4) / 4)
    assert cos.shape == sin.shape == (1_000_001, 4)
    assert cos.dtype == sin.dtype == torch.float32
    np.testing.assert_allclose(cos[-1], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[-1], np.sin(angle), atol=1e-6)
    assert rotary_table(0, 8)[0].shape == (0, 4)


def test_it_is_transformers_apply_rotary_pos_emb() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = inputs(2, 5, 4, 2, 8)
    cos, sin = rotary_table(5, 8)
    wide = (t.repeat(1, 2)[None] for t in (cos, sin))
    want = llama.apply_rotary_pos_emb(x["q"].transpose(1, 2), x["k"].transpose(1, 2), *wide)
    for got, w in zip(rotary(**x, cos=cos, sin=sin), want, strict=True):
        torch.testing.assert_close(got, w.transpose(1, 2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    cos, sin = (t.double() for t in rotary_table(2, 4))
    leaves = [
        t.requires_grad_() for t in inputs(1, 2, 2, 1, 6, dtype=torch.float64, norm=True).values()
    ]

    def f(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor) -> Any:
        return rotary_ref(q, k, cos, sin, q_weight=qw, k_weight=kw, interleaved=interleaved)

    assert torch.autograd.gradcheck(f, leaves)


# ------------------------------------------------------------------ the kernels

SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 3, 5, 2, 16),
    (1, 2, 17, 16, 8),
    (2, 2, 3, 1, 64),
    (1, 1, 2, 2, 80),
    (1, 2, 1, 1, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches(
    shape: tuple[int, ...], norm: bool, dtype: torch.dtype, device: str
) -> None:
    B, T, H, Hkv, D = shape
    matches(inputs(B, T, H, Hkv, D, dtype, device, norm))


@pytest.mark.gpu
@settings(max_examples=10 if INTERPRET else 3)
@given(data=st.data())
def test_kernel_matches_on_any_shape_strides_and_part(data: st.DataObject, device: str) -> None:
    draw = data.draw
    B, T, H, Hkv = draw(st.tuples(*[st.integers(1, 3)] * 4))
    D = 2 * draw(st.integers(1, 12))
    R = draw(st.integers(1, D // 2))
    x = inputs(B, T, H, Hkv, D, draw(st.sampled_from(DTYPES)), device, norm=draw(st.booleans()))
    how = draw(st.sampled_from(["contiguous", "packed", "D not contiguous", "heads first"]))
    if how == "packed":
        room = torch.cat([x["q"], x["k"], x["k"]], 2)
        x["q"], x["k"], _ = room.split([H, Hkv, Hkv], 2)
    elif how == "D not contiguous":
        x["k"] = x["k"].transpose(2, 3).contiguous().transpose(2, 3)
    elif how == "heads first":
        x["q"] = x["q"].transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = rotary_table(B * T, 2 * R, device=device)
    if draw(st.booleans()):
        cos, sin = cos.view(B, T, R), sin.view(B, T, R).flip(0)
    else:
        cos, sin = cos[-T:], sin[:T].flip(0)
    matches(x, cos, sin, interleaved=draw(st.booleans()), eps=1e-3)


@pytest.mark.gpu
def test_position_zero_is_the_identity(device: str) -> None:
    x = inputs(2, 1, 3, 2, 16, device=device)
    cos, sin = rotary_table(1, 16, device=device)
    got = kernel(**x, cos=cos, sin=sin)
    assert torch.equal(got[0], x["q"]) and torch.equal(got[1], x["k"])


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone_and_norms_on_nothing(
    interleaved: bool, device: str
) -> None:
    x = inputs(1, 1, 1, 1, 16, device=device)
    q, k = (t.expand(1, 9, 1, 16) for t in x.values())
    far = [t[-9:] for t in rotary_table(2009, 16, device=device)]
    near = rotary_table(9, 16, device=device)
    scores = []
    for cos, sin in (near, far):
        yq, yk = kernel(q, k, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(yq.norm(dim=-1), q.norm(dim=-1))
        scores.append(yq[0, :, 0] @ yk[0, :, 0].T)
    torch.testing.assert_close(*scores, atol=2e-5, rtol=1e-5)
    for distance in range(-8, 9):
        line = scores[0].diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
def test_large_positions_are_as_exact_as_small_ones(device: str) -> None:
    x = inputs(1, 3, 2, 1, 32, device=device)
    t, i = torch.arange(10**6 - 3, 10**6).double(), torch.arange(16).double()
    angle = torch.outer(t, 1e4 ** (-i / 16)).to(device)
    cos, sin = angle.cos().float(), angle.sin().float()  # as rotary_table rounds them
    gold = rotary_ref(x["q"].double(), x["k"].double(), angle.cos(), angle.sin())
    for got, want in zip(kernel(**x, cos=cos, sin=sin), gold, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
def test_normalised_heads_do_not_depend_on_their_scale(device: str) -> None:
    x = inputs(1, 2, 2, 2, 16, device=device, norm=True)
    cos, sin = rotary_table(2, 16, device=device)
    for scale in (1e-4, 1e15):
        loud = x | {n: x[n] * scale for n in "qk"}
        for got, want in zip(
            kernel(**loud, cos=cos, sin=sin, eps=1e-16),
            kernel(**x, cos=cos, sin=sin, eps=0.0),
            strict=True,
        ):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    silent = x | {"q": torch.zeros_like(x["q"])}
    assert (kernel(**silent, cos=cos, sin=sin)[0] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_nan_stays_in_its_head(norm: bool, device: str) -> None:
    x = inputs(1, 2, 3, 2, 16, device=device, norm=norm)
    cos, sin = rotary_table(2, 16, device=device)
    clean = kernel(**x, cos=cos, sin=sin)
    x["q"][0, 1, 2, 3], x["k"][0, 0, 1, 5] = float("nan"), float("inf")
    got = kernel(**x, cos=cos, sin=sin)
    for g, c, at in zip(got, clean, ((0, 1, 2), (0, 0, 1)), strict=True):
        assert not g[at].isfinite().all()
        g[at] = c[at]
        assert torch.equal(g, c)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_expanded_input_and_gradient(norm: bool, device: str) -> None:
    x = inputs(1, 1, 2, 1, 8, device=device, norm=norm)
    x |= {"q": x["q"].expand(2, 3, 2, 8), "k": x["k"].expand(2, 3, 4, 8)}
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    cos, sin = rotary_table(3, 8, device=device)
    for only in (0, 1):  # the other output has no gradient at all
        got, want = (
            torch.autograd.grad(op(**leaves, cos=cos, sin=sin)[only].sum(), list(leaves.values()),
                                allow_unused=True)
            for op in (kernel, rotary_ref)
        )  # fmt: skip
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, torch.zeros_like(g) if w is None else w, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_second_derivative_is_that_of_the_reference(norm: bool, device: str) -> None:
    cos, sin = rotary_table(2, 8, device=device)

    def penalty(op: Any) -> list[Tensor]:
        torch.manual_seed(1)
        x = {n: t.requires_grad_() for n, t in inputs(1, 2, 2, 1, 8, device=device,
                                                      norm=norm).items()}  # fmt: skip
        q, k = op(**x, cos=cos, sin=sin)
        loss = (q.sin().sum() * k.square().sum()).sin()
        grads = torch.autograd.grad(loss, list(x.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), list(x.values())))

    for got, want in zip(penalty(kernel), penalty(rotary_ref), strict=True):
        assert torch.allclose(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_half_heads_and_wide_weights(device: str) -> None:
    """As under autocast: q and k of 16 bits, the weights of 32."""
    half = DTYPES[-1]
    x = inputs(1, 3, 2, 1, 16, dtype=half, device=device, norm=True)
    x |= {n: t.float() for n, t in x.items() if n.endswith("weight")}
    cos, sin = rotary_table(3, 16, device=device)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    got, want = (op(**leaves, cos=cos, sin=sin) for op in (kernel, rotary_ref))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == half and torch.allclose(g, w, atol=5e-2)
    grads = torch.autograd.grad(got[0].float().square().sum() + got[1].float().sum(),
                                list(leaves.values()))  # fmt: skip
    assert [g.dtype for g in grads] == [half, half, torch.float32, torch.float32]


@pytest.mark.gpu
def test_the_same_bits_twice_and_in_any_batch(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in inputs(6, 3, 2, 1, 16, device=device, norm=True).items()}
    cos, sin = rotary_table(3, 16, device=device)

    def once() -> tuple[Tensor, ...]:
        q, k = kernel(**x, cos=cos, sin=sin)
        loss = q.square().sum() + k.sin().sum()
        return (q, k, *torch.autograd.grad(loss, list(x.values())))

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    part = x | {"q": x["q"][4:], "k": x["k"][4:]}
    for whole, some in zip(first, kernel(**part, cos=cos, sin=sin), strict=False):
        assert torch.equal(whole[4:], some)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_empty(norm: bool, device: str) -> None:
    cos, sin = rotary_table(2, 4, device=device)
    kernel(**inputs(1, 2, 1, 1, 4, device=device), cos=cos, sin=sin)  # kernels run in this mode
    x = {n: t.requires_grad_() for n, t in inputs(0, 2, 3, 1, 4, device=device, norm=norm).items()}
    q, k = kernel(**x, cos=cos, sin=sin)
    grads = torch.autograd.grad(q.sum() + k.sum(), list(x.values()))
    assert q.shape == (0, 2, 3, 4) and k.shape == (0, 2, 1, 4)
    assert all((g == 0).all() for g in grads[2:])


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
@pytest.mark.parametrize("dim", range(3))
def test_offsets_beyond_32_bits(dim: int, device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**10, np.float16))  # only touched pages are real
    strides = [2**8, 2**6, 2**4]
    strides[dim] = 2**30
    q = room.as_strided((3, 3, 3, 8), (*strides, 1)).copy_(torch.randn(3, 3, 3, 8))
    x = {"q": q, "k": q} | {n: torch.ones(8).half() for n in ("q_weight", "k_weight")}
    dense = x | {"q": q.contiguous(), "k": q.contiguous()}
    cos, sin = rotary_table(3, 8)
    outs = []
    for case in (x, dense):
        leaves = {n: t.detach().requires_grad_() for n, t in case.items()}
        y = torch.cat(kernel(**leaves, cos=cos, sin=sin), 2)
        outs.append((y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(norm: bool, interleaved: bool) -> None:
    x = inputs(2, 3, 2, 1, 8, norm=norm)
    cos, sin = rotary_table(3, 4)
    weights = (x.get("q_weight"), x.get("k_weight"))
    args = (x["q"], x["k"], cos, sin, *weights, 1e-6, interleaved)
    torch.library.opcheck(torch.ops.fastgpt.rotary_fwd, (*args, not norm))
    if norm:
        back = (torch.randn_like(x["q"]), torch.randn_like(x["k"]), *args)
        torch.library.opcheck(torch.ops.fastgpt.rotary_norm_bwd, back)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_function_gradcheck_and_double_backward(norm: bool, interleaved: bool) -> None:
    cos, sin = (t.double() for t in rotary_table(2, 4))
    x = [t.requires_grad_() for t in inputs(1, 2, 2, 1, 6, dtype=torch.float64, norm=norm).values()]

    def f(q: Tensor, k: Tensor, *weights: Tensor) -> Any:
        return RotaryFunction.apply(q, k, cos, sin, *(weights or (None, None)), 1e-6, interleaved)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("asking", ["q", "k", "q_weight", "k_weight"])
def test_double_backward_of_what_asks_for_it_alone(asking: str) -> None:
    cos, sin = (t.double() for t in rotary_table(2, 4))
    x = inputs(1, 2, 2, 1, 6, dtype=torch.float64, norm=True)
    leaf = x[asking].requires_grad_()

    def f(_: Tensor) -> Any:
        return RotaryFunction.apply(
            x["q"], x["k"], cos, sin, x["q_weight"], x["k_weight"], 1e-6, False
        )

    assert torch.autograd.gradgradcheck(f, [leaf])


def _apply(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
    cos, sin = rotary_table(16, q.shape[-1])
    T = q.shape[1]
    return RotaryFunction.apply(q, k, cos[:T], sin[:T], q_weight, k_weight, 1e-6, False)


def test_compiles_to_one_graph_for_three_lengths() -> None:
    assert_one_graph(_apply, [inputs(2, T, 2, 1, 8, norm=True) for T in (3, 5, 8)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(**x: Tensor) -> Tensor:
        q, k = _apply(**x)
        return q.square().sum() + k.sin().sum()

    x = inputs(2, 4, 2, 1, 8, norm=True)
    assert_compiled_gradients_match(lambda *t: loss(**dict(zip(x, t, strict=True))), x)


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    q, k, w = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8), torch.zeros(8)
    cos, sin = rotary_table(3, 8)
    one: dict[str, Any] = {"q_weight": w}
    for args, kwargs, rule in [
        ((q[0], k, cos, sin), {}, r"q and k must be \(B, T, H, D\); got q \(3, 4, 8\)"),
        ((q, k[:, :2], cos, sin), {}, "agree in B, T and D; got q"),
        ((q[..., :7], k[..., :7], cos, sin), {}, "D must be even"),
        ((q, k, cos[:2], sin[:2]), {}, r"\(T, R / 2\) or \(B, T, R / 2\); got cos \(2, 4\)"),
        ((q, k, cos, sin[:, :3]), {}, r"or \(B, T, R / 2\); got cos \(3, 4\), sin \(3, 3\)"),
        ((q, k, *rotary_table(3, 10)), {}, r"1 to D / 2 columns; got cos \(3, 5\)"),
        ((q, k, cos.clone().requires_grad_(), sin), {}, "take no gradient"),
        ((q, k, cos, sin), one, "go together; got q_weight alone"),
        ((q, k, cos, sin), one | {"k_weight": w[:7]}, r"k_weight must be \(8,\), D of q; got \(7"),
        ((q, k, cos.to("meta"), sin), {}, "on one device; got q cpu, cos meta"),
    ]:
        with pytest.raises(ValueError, match=f"^rotary: .*{rule}"):
            rotary(*args, **kwargs)
    for args, kwargs, rule in [
        ((q, k.half(), cos, sin), {}, r"one floating dtype; got torch\.float32, torch\.float16"),
        ((q, k, cos.half(), sin.half()), {}, r"cos and sin must be float32; got torch\.float16"),
        ((q, k, cos, sin), one | {"k_weight": w.half()}, "q_weight and k_weight must have one"),
    ]:
        with pytest.raises(TypeError, match=f"^rotary: .*{rule}"):
            rotary(*args, **kwargs)
    for T, D, theta, rule in [
        (-1, 8, 1.0, "T must not be negative; got -1"),
        (2, 7, 1.0, "D must be even and at least 2; got 7"),
        (2, 8, 0.0, "theta must be positive; got 0.0"),
    ]:
        with pytest.raises(ValueError, match=f"^rotary_table: {rule}"):
            rotary_table(T, D, theta)


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZED, reason="float64 is the reference's alone")
def test_a_table_of_float64_is_refused_by_the_kernel(device: str) -> None:
    x = inputs(1, 2, 1, 1, 4, device=device)
    cos, sin = rotary_table(2, 4, device=device)
    kernel(**x, cos=cos, sin=sin)
    with pytest.raises(ValueError, match=r"rotary: the triton path is forced.*no float64; cos is"):
        kernel(**x, cos=cos.double(), sin=sin.double())
