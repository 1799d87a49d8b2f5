"""attention: specification, PyTorch path, kernels, registered ops, errors."""

import math
from dataclasses import replace
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
from fastgpt.ops import attention, attention_ref, dropout_mask, register_flop_formulas
from fastgpt.ops.attention import AttentionFunction
from fastgpt.ops.backend import INTERPRET
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES


def qkv(
    B: int, Tq: int, H: int, D: int, Tk: int | None = None, heads: int | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    Tk, heads = Tk or Tq, heads or H
    shapes = {"q": (B, Tq, H, D), "k": (B, Tk, heads, D), "v": (B, Tk, heads, D)}
    return {n: torch.randn(s, dtype=dtype, device=device) for n, s in shapes.items()}


def kernel(**kwargs: Any) -> Any:
    """attention on the kernel or not at all."""

    def op(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with fastgpt.use("triton"):
            return attention(q, k, v, **kwargs)

    return op


def with_lse(op: Any, **kwargs: Any) -> Any:
    """(o, lse) as one float32 tensor, rows without keys apart: their lse is -inf."""

    def joined(**inputs: Tensor) -> Tensor:
        o, lse = op(**inputs, return_lse=True, **kwargs)
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        return torch.cat([o.to(lse.dtype), lse.transpose(1, 2)[..., None]], -1)

    return joined


# ------------------------------------------------------------------ the specification


def test_weights_of_a_query_sum_to_one() -> None:
    x = qkv(2, 9, 3, 16)
    x["v"] = torch.ones_like(x["v"])
    assert torch.allclose(attention_ref(**x), torch.ones(2, 9, 3, 16))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_reference_is_torchs_attention(causal: bool, heads: int) -> None:
    x = qkv(2, 17, 4, 24, heads=heads, dtype=torch.float64)
    q, k, v = (t.transpose(1, 2) for t in x.values())
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.allclose(attention_ref(**x, causal=causal), want.transpose(1, 2), atol=1e-12)


def test_causal_aligns_the_last_query_with_the_last_key() -> None:
    x = qkv(1, 3, 1, 8, Tk=7)
    whole = qkv(1, 7, 1, 8)
    whole["q"][:, 4:] = x["q"]
    whole |= {"k": x["k"], "v": x["v"]}
    assert torch.allclose(attention_ref(**x), attention_ref(**whole)[:, 4:], atol=1e-6)


def test_a_query_before_the_first_key_gives_zero_and_minus_infinity() -> None:
    o, lse = attention(**qkv(1, 5, 1, 8, Tk=2), return_lse=True)
    assert (o[:, :3] == 0).all()
    assert (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()


def test_window_one_sees_itself_alone() -> None:
    x = qkv(1, 6, 2, 8)
    assert torch.allclose(attention(**x, window=1), x["v"])


@given(
    Tq=st.integers(1, 12), Tk=st.integers(1, 12), causal=st.booleans(),
    window=st.none() | st.integers(1, 14), heads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_plain_path_is_the_specification(
    Tq: int, Tk: int, causal: bool, window: int | None, heads: int
) -> None:
    x = qkv(2, Tq, 2, 8, Tk=Tk, heads=heads, dtype=torch.float64)
    kwargs = {"causal": causal, "window": window}
    with fastgpt.use("reference"):
        assert torch.allclose(attention(**x, **kwargs), attention_ref(**x, **kwargs), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(dtype: torch.dtype) -> None:
    loose = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2, "nondet_tol": 1e-5}
    how = {} if dtype == torch.float64 else loose
    x = [t.requires_grad_() for t in qkv(1, 5, 2, 8, heads=1, dtype=dtype).values()]
    seed = torch.tensor([3])

    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_ref(q, k, v, window=3, dropout_p=0.2, seed=seed, return_lse=True)

    assert torch.autograd.gradcheck(f, x, **how)


# ------------------------------------------------------------------ the kernels

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"B": 1, "Tq": 1, "H": 1, "D": 8}, {}),
    ({"B": 2, "Tq": 37, "H": 2, "D": 64}, {}),
    ({"B": 1, "Tq": 31, "H": 4, "D": 80, "heads": 2}, {}),
    ({"B": 1, "Tq": 65, "H": 2, "D": 96, "heads": 1}, {"window": 20}),
    ({"B": 1, "Tq": 63, "H": 1, "D": 24}, {"causal": False}),
    ({"B": 1, "Tq": 40, "H": 1, "D": 16, "Tk": 67}, {"causal": False, "window": 9}),
    ({"B": 1, "Tq": 13, "H": 2, "D": 16, "Tk": 70}, {}),
    ({"B": 1, "Tq": 67, "H": 1, "D": 16, "Tk": 50}, {"window": 9}),
    ({"B": 1, "Tq": 33, "H": 1, "D": 128}, {"softmax_scale": 0.3}),
    ({"B": 1, "Tq": 19, "H": 1, "D": 256}, {}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, kwargs", CASES, ids=str)
def test_kernel_matches(
    shape: dict[str, Any], kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    x = qkv(**shape, dtype=dtype, device=device)
    assert_matches(kernel(**kwargs), partial(attention_ref, **kwargs), x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "Tk, kwargs", [(300, {}), (300, {"window": 160}), (333, {"causal": False})], ids=str
)
def test_kernel_matches_over_many_blocks(Tk: int, kwargs: dict[str, Any], device: str) -> None:
    """Blocks without a mask, on both edges and behind the end, at the tiles of a GPU too."""
    x = qkv(1, 300, 1, 16, Tk=Tk, dtype=torch.float16, device=device)
    assert_matches(kernel(**kwargs), partial(attention_ref, **kwargs), x)


@pytest.mark.gpu
@pytest.mark.parametrize("flag", ["WHOLE"] if INTERPRET else ["WHOLE", "TRUNCATE"])
def test_kernel_matches_as_other_chips_run_it(
    flag: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastgpt.kernels.attention as kernels

    flags = {"TRUNCATE": flag == "TRUNCATE", "PARTS": flag != "WHOLE"}
    monkeypatch.setattr(kernels, "attention_flags", lambda dtype: flags)
    dtype = torch.bfloat16 if flag == "TRUNCATE" else torch.float16
    x = qkv(1, 37, 1, 16, dtype=dtype, device=device)

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        with fastgpt.use("triton"):
            return attention(q, k, v, **more)

    assert_matches(with_lse(op), with_lse(attention_ref), x)
    assert torch.equal(op(**x, window=1), x["v"])  # one weight, which is exactly one


def by_descriptors(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> list[bool]:
    """Tiles with or without descriptors from now on; -> whether each launch loads by them."""
    import fastgpt.kernels.attention as fwd
    import fastgpt.kernels.attention_bwd as bwd
    from fastgpt.kernels.attention_tiles import attention_tiles

    taken: list[bool] = []
    loaded = fwd._loaded

    def chosen(*args: Any) -> Any:
        of = attention_tiles(*args)
        each = {n: replace(getattr(of, n), descriptors=wanted) for n in ("fwd", "dkdv", "dq")}
        return replace(of, **each)

    def noted(*args: Any) -> Any:
        got = loaded(*args)
        taken.append(got[2])
        return got

    for module in (fwd, bwd):
        monkeypatch.setattr(module, "attention_tiles", chosen)
        monkeypatch.setattr(module, "_loaded", noted)
    return taken


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("D, window", [(16, None), (24, 9)])
def test_kernel_matches_by_descriptors_and_by_pointers(
    D: int, window: int | None, wanted: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded and not, groups of heads, rows behind the end, views of a packed qkv."""
    taken = by_descriptors(monkeypatch, wanted)
    packed = torch.randn(2, 37, 4, D, dtype=torch.float16, device=device)
    x = {"q": packed[:, 8:, :2], "k": packed[:, :, 2:3], "v": packed[:, :, 3:]}
    assert_matches(kernel(window=window), partial(attention_ref, window=window), x)
    assert taken and all(one == wanted for one in taken)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["expanded", "odd stride", "odd start"])
def test_what_descriptors_cannot_describe_is_read_by_pointers(
    how: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = by_descriptors(monkeypatch, True)
    q = torch.randn(2, 5, 1, 8, dtype=torch.float16, device=device)
    wide = torch.randn(2, 5, 1, 12, dtype=torch.float16, device=device)
    k = {
        "expanded": q[:1].expand(2, 5, 1, 8),
        "odd stride": wide[..., :8],
        "odd start": wide.flatten()[4:84].view(2, 5, 1, 8),
    }[how]
    o = kernel()(q, k, q)
    assert torch.allclose(o, attention_ref(q, k, q), atol=2e-3)
    assert taken == [False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Tq, Tk", [(37, 37), (29, 21)])
def test_kernel_matches_with_dropout_and_gradient_through_lse(
    Tq: int, Tk: int, dtype: torch.dtype, device: str
) -> None:
    x = qkv(2, Tq, 2, 16, Tk=Tk, heads=1, dtype=dtype, device=device)
    kwargs = {"dropout_p": 0.3, "seed": torch.tensor([2**40 + 7], device=device)}

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        with fastgpt.use("triton"):
            return attention(q, k, v, **more)

    assert_matches(with_lse(op, **kwargs), with_lse(attention_ref, **kwargs), x)


@pytest.mark.gpu
@settings(max_examples=12 if INTERPRET else 6)
@given(data=st.data())
def test_kernel_matches_on_any_shape_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    B, groups, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    Tq, Tk = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    D = 8 * draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(DTYPES))
    kwargs = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 60))}
    x = qkv(B, Tq, heads * groups, D, Tk=Tk, heads=heads, dtype=dtype, device=device)
    for name, t in x.items():
        how = draw(st.sampled_from(["contiguous", "(B, H, T, D)", "sliced", "D not contiguous"]))
        if how == "(B, H, T, D)":
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif how == "sliced":
            t = torch.cat([t, t], 1)[:, 1 : 1 + t.shape[1]]
        elif how == "D not contiguous":
            t = t.transpose(1, 3).contiguous().transpose(1, 3)
        x[name] = t
    assert_matches(kernel(**kwargs), partial(attention_ref, **kwargs), x)


@pytest.mark.gpu
def test_views_of_a_packed_qkv_are_read_in_place(device: str) -> None:
    B, T, H, D = 2, 33, 3, 16
    packed = torch.randn(B, T, 3 * H * D, device=device, requires_grad=True)

    def loss(op: Any, packed: Tensor) -> Tensor:
        q, k, v = (t.view(B, T, H, D) for t in packed.split(H * D, -1))
        return op(q, k, v).square().sum()

    (got,) = torch.autograd.grad(loss(kernel(), packed), packed)
    (want,) = torch.autograd.grad(loss(attention_ref, packed), packed)
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.gpu
def test_expanded_gradient(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in qkv(1, 20, 2, 16, device=device).items()}
    got = torch.autograd.grad(kernel()(**x).sum(), list(x.values()))
    want = torch.autograd.grad(attention_ref(**x).sum(), list(x.values()))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-5)


@pytest.mark.gpu
def test_gradient_through_lse_alone(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in qkv(1, 20, 2, 16, device=device).items()}
    got = torch.autograd.grad(kernel(return_lse=True)(**x)[1].sum(), [x["q"], x["k"]])
    want = torch.autograd.grad(attention_ref(**x, return_lse=True)[1].sum(), [x["q"], x["k"]])
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-5)


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    def penalty(op: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x = {n: t.requires_grad_() for n, t in qkv(1, 9, 1, 8, device=device).items()}
        grads = torch.autograd.grad(op(**x).square().sum(), list(x.values()), create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), x["q"])

    assert torch.allclose(penalty(kernel())[0], penalty(attention_ref)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_future_does_not_leak(device: str) -> None:
    x = qkv(1, 50, 2, 16, device=device)
    before = kernel()(**x)
    for name in ("k", "v"):
        x[name] = x[name].clone()
        x[name][:, 31:] = 1e4
    assert torch.equal(kernel()(**x)[:, :31], before[:, :31])


@pytest.mark.gpu
def test_a_shift_of_all_scores_changes_nothing(device: str) -> None:
    x = qkv(1, 40, 1, 16, device=device)
    shifted = x | {"q": torch.cat([x["q"], torch.full_like(x["q"], 50.0)], -1)}
    for name in ("k", "v"):
        fill = 10.0 if name == "k" else 0.0
        shifted[name] = torch.cat([x[name], torch.full_like(x[name], fill)], -1)
    got = kernel(softmax_scale=0.25)(**shifted)  # every score is 2000 higher
    assert torch.allclose(got[..., :16], kernel(softmax_scale=0.25)(**x), atol=2e-3)


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in qkv(2, 45, 4, 16, heads=2, device=device).items()}

    def once() -> tuple[Tensor, ...]:
        o = kernel()(**x)
        return (o, *torch.autograd.grad(o.square().sum(), list(x.values())))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    kernel()(**qkv(1, 3, 1, 8, device=device))  # the proof that kernels run in this mode
    q = torch.randn(shape, device=device, requires_grad=True)
    kv = torch.randn((shape[0], 4, max(1, shape[2]), 8), device=device, requires_grad=True)
    o = kernel()(q, kv, kv)
    o.sum().backward()
    assert o.shape == q.shape and q.grad is not None and kv.grad is not None
    assert (kv.grad == 0).all()


@pytest.mark.gpu
def test_no_keys(device: str) -> None:
    q = torch.randn(1, 3, 1, 8, device=device)
    kv = q[:, :0]
    for causal in (True, False):
        o, lse = kernel(return_lse=True, causal=causal)(q, kv, kv)
        assert (o == 0).all() and (lse == -math.inf).all()
        with fastgpt.use("reference"):
            assert (attention(q, kv, kv, causal=causal) == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_offsets_beyond_32_bits(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**10, np.float16))  # only touched pages are real
    x = qkv(3, 5, 2, 8, dtype=torch.float16)
    for i, name in enumerate(x):
        far = room[i * 80 :].as_strided((3, 5, 2, 8), (2**30, 16, 8, 1))
        x[name] = far.copy_(x[name])
    got = kernel()(**x)
    assert torch.equal(got, kernel()(**{n: t.contiguous() for n, t in x.items()}))


@pytest.mark.gpu
def test_dropout_drops_the_elements_its_mask_says(device: str) -> None:
    """With v the identity the output is the weights themselves."""
    T, p = 32, 0.4
    x = qkv(1, T, 2, T, device=device)
    x["v"] = torch.eye(T, device=device)[None, :, None, :].expand(1, T, 2, T)
    seed = torch.tensor([11], device=device)
    w = kernel(causal=False, dropout_p=p, seed=seed)(**x).transpose(1, 2)
    keep = dropout_mask(seed, (1, 2, T, T), p)
    assert ((w != 0) == keep).all()
    full = kernel(causal=False)(**x).transpose(1, 2)
    assert torch.allclose(w, full * keep / (1 - p), atol=1e-5)


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(dropout_p: float) -> None:
    seed = torch.tensor([5]) if dropout_p else None
    q, k, v = qkv(1, 5, 2, 8, heads=1).values()
    rest = (0.5, -1, 0, dropout_p, seed)
    torch.library.opcheck(torch.ops.fastgpt.attention_fwd, (q, k, v, *rest))
    o, lse = torch.ops.fastgpt.attention_fwd(q, k, v, *rest)
    args = (torch.randn_like(o), torch.randn_like(lse), q, k, v, o, lse, *rest)
    torch.library.opcheck(torch.ops.fastgpt.attention_bwd, args)
    torch.library.opcheck(torch.ops.fastgpt.attention_bwd, (None, *args[1:]))


def test_function_gradcheck_and_double_backward() -> None:
    x = [t.requires_grad_() for t in qkv(1, 4, 2, 8, heads=1, dtype=torch.float64).values()]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return AttentionFunction.apply(q, k, v, 0.4, -1, 0, 0.0, None)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_compiles_to_one_graph_for_three_lengths() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return AttentionFunction.apply(q, k, v, 0.4, -1, 0, 0.0, None)

    assert_one_graph(f, [qkv(2, T, 2, 8) for T in (5, 9, 14)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = AttentionFunction.apply(q, k, v, 0.4, -1, 0, 0.0, None)
        return o.square().sum() + lse.sum()

    assert_compiled_gradients_match(loss, qkv(1, 7, 2, 8))


def test_flops_count_the_pairs_that_see_each_other() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()

    q, k, v = qkv(2, 6, 3, 8).values()
    with FlopCounterMode(display=False) as counter:
        torch.ops.fastgpt.attention_fwd(q, k, v, 1.0, -1, 0, 0.0, None)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 8) * (6 * 7 // 2)


def test_autocast_casts_as_torch_does() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(**qkv(1, 4, 1, 8)).dtype == torch.bfloat16
        mixed = qkv(1, 4, 1, 8) | {"v": torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)}
        assert attention(**mixed).dtype == torch.bfloat16  # q and k from a norm, which is float32


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "shapes, rule",
    [
        ([(2, 3, 8)] * 3, "must be (B, T, H, D); got q (2, 3, 8)"),
        ([(1, 3, 2, 8), (1, 3, 2, 8), (1, 4, 2, 8)], "k and v must have one shape"),
        ([(1, 3, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8)], "must agree in B and D"),
        ([(1, 3, 3, 8), (1, 3, 2, 8), (1, 3, 2, 8)], "H of q must be a multiple"),
        ([(1, 3, 2, 12)] * 3, "D must be a multiple of 8 from 8 to 256; got 12"),
        ([(1, 3, 2, 264)] * 3, "D must be a multiple of 8 from 8 to 256; got 264"),
    ],
)
def test_rejects_shapes(shapes: list[tuple[int, ...]], rule: str) -> None:
    with pytest.raises(ValueError, match="attention: ") as e:
        attention(*(torch.zeros(s) for s in shapes))
    assert rule in str(e.value) and "\n" not in str(e.value)


def test_rejects_dtypes_window_and_dropout() -> None:
    q, k, v = qkv(1, 3, 1, 8).values()
    with pytest.raises(TypeError, match=r"one floating dtype; got torch\.float32, torch\.float16"):
        attention(q, k.half(), v.half())
    with pytest.raises(TypeError, match="one floating dtype"):
        attention(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match="window must be at least 1 key; got 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\); got 1.0"):
        attention(q, k, v, dropout_p=1.0)
    with pytest.raises(ValueError, match="seed must be one int64"):
        attention(q, k, v, dropout_p=0.1, seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="on one device; got cpu, meta, meta"):
        attention(q, k.to("meta"), v.to("meta"))


@pytest.mark.gpu
def test_a_forced_kernel_says_why_it_cannot(device: str) -> None:
    x = qkv(1, 3, 1, 8, device=device)
    kernel()(**x)
    with pytest.raises(ValueError, match="path is forced, but the kernel takes a positive"):
        kernel(softmax_scale=-1.0)(**x)
    with pytest.raises(ValueError, match=r"float16 and bfloat16; got torch\.float64"):
        kernel()(**{n: t.double() for n, t in x.items()})
    assert torch.allclose(  # not forced, the reference takes it
        attention(**x, softmax_scale=-1.0), attention_ref(**x, softmax_scale=-1.0), atol=1e-6
    )
