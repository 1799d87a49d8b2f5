"""What attention does beyond causal windows: changed scores, hidden keys, sequences end to end."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from fastgpt.ops import attention, attention_ref, attention_varlen, attention_varlen_ref
from fastgpt.ops.attention import AttentionFunction, attention_flops
from fastgpt.ops.attention_reference import Extras, visible
from fastgpt.ops.backend import INTERPRET
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES
from tests.test_attention import qkv, with_lse

SHAPE = {"B": 2, "Tq": 37, "H": 1, "D": 16}
PAIR = {"B": 1, "Tq": 37, "H": 2, "D": 16}
SLOPES = torch.tensor([0.5, 0.03])
PADDED = torch.ones(2, 37, dtype=torch.bool)
PADDED[0, :9], PADDED[1, 20:] = False, False  # on the left, where queries see no key, and right
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 20 + [4] * 12, [3] * 33 + [7] * 4])
SCATTERED = torch.tensor([[1, 5, 2] * 17, [2] * 17 + [1, 9] * 17], dtype=torch.int32)
ALL = {
    "document_ids": DOCUMENTS, "key_mask": PADDED, "alibi_slopes": SLOPES, "softcap": 2.0,
    "dropout_p": 0.3, "window": 12,
}  # fmt: skip

# Sizes, the bias's shape, 16-bit or not, the rest.
CASES: list[tuple[dict[str, Any], tuple[int, ...] | None, bool, dict[str, Any]]] = [
    (PAIR, None, True, {"softcap": 0.7}),
    (PAIR | {"heads": 1}, None, False, {"alibi_slopes": SLOPES, "window": 9, "dropout_p": 0.2}),
    (SHAPE | {"Tk": 51}, (2, 1, 37, 51), True, {"causal": False}),
    (SHAPE | {"H": 2}, (1, 1, 37, 37), False, {"softcap": 50.0}),
    (SHAPE | {"Tk": 20}, (2, 1, 1, 20), False, {"window": 9}),
    (
        SHAPE, (1, 1, 1, 37), False,
        {"key_mask": PADDED, "alibi_slopes": torch.tensor([[0.1], [9.0], [0.4]])[::2]},
    ),
    (SHAPE, None, True, {"key_mask": PADDED, "causal": False}),
    (SHAPE, None, False, {"document_ids": DOCUMENTS}),
    (SHAPE | {"Tk": 51}, None, False, {"document_ids": SCATTERED, "causal": False, "window": 29}),
    (SHAPE | {"H": 2, "heads": 1, "D": 24}, (1, 2, 37, 37), False, ALL),
]  # fmt: skip
VARLEN: list[tuple[list[int], list[int], dict[str, Any]]] = [
    ([0, 5, 5, 38], [0, 5, 5, 38], {}),
    ([0, 0, 1, 36], [0, 3, 3, 40], {"causal": False, "alibi_slopes": SLOPES, "dropout_p": 0.3}),
    ([0, 17, 30], [0, 33, 33], {"window": 8, "softcap": 1.0, "heads": 1}),
]


def on(device: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """kwargs on the device, with a seed for dropout."""
    if kwargs.get("dropout_p"):
        kwargs = kwargs | {"seed": torch.tensor([2**40 + 7])}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def kernel(op: Any = attention) -> Any:
    """op on the kernel or not at all."""

    def forced(*args: Any, **kwargs: Any) -> Any:
        with fastgpt.use("triton"):
            return op(*args, **kwargs)

    return forced


def inputs(
    shape: dict[str, Any], bias: tuple[int, ...] | None, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    x = qkv(**shape, dtype=dtype, device=device)
    if bias is not None:  # keys are not its fastest axis
        x["bias"] = torch.randn(bias[::-1], dtype=dtype, device=device).permute(3, 2, 1, 0)
    return x


def varlen(
    cu_q: list[int], cu_k: list[int], kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    kwargs = on(device, kwargs)
    heads = kwargs.pop("heads", 2)
    q = torch.randn(cu_q[-1], 2, 16, dtype=dtype, device=device)
    k, v = torch.randn(2, cu_k[-1], heads, 16, dtype=dtype, device=device)
    cu = [torch.tensor(c, dtype=torch.int32, device=device) for c in (cu_q, cu_k)]
    longest = [max(b - a for a, b in pairwise(c)) for c in (cu_q, cu_k)]
    cut = {
        "cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1] + 3,
    }  # fmt: skip
    return {"q": q, "k": k, "v": v}, kwargs | cut


# ------------------------------------------------------------------ the specification


def test_softcap_of_infinity_and_a_zero_bias_change_nothing() -> None:
    x = qkv(1, 9, 2, 8, dtype=torch.float64)
    want = attention_ref(**x)
    assert torch.allclose(attention_ref(**x, softcap=1e6), want, atol=1e-9)
    assert torch.allclose(attention_ref(**x, bias=torch.zeros(1, 1, 1, 9)), want)
    assert torch.allclose(attention_ref(**x, alibi_slopes=torch.zeros(2)), want)


def test_documents_in_one_row_are_documents_apart() -> None:
    x = qkv(1, 12, 2, 8)
    got = attention_ref(**x, document_ids=torch.tensor([[3] * 5 + [1] * 7]))
    parts = [attention_ref(**{n: t[:, s] for n, t in x.items()}) for s in (slice(5), slice(5, 12))]
    assert torch.allclose(got, torch.cat(parts, 1), atol=1e-6)
    flat = {n: t[0] for n, t in x.items()}
    cu = torch.tensor([0, 5, 12])
    assert torch.allclose(attention_varlen_ref(**flat, **cut(cu, 7)), got[0], atol=1e-6)


def cut(cu: Tensor, longest: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest
    }  # fmt: skip


@pytest.mark.parametrize("shape, bias, short, kwargs", CASES, ids=str)
def test_plain_path_is_the_specification(
    shape: dict[str, Any], bias: tuple[int, ...] | None, short: bool, kwargs: dict[str, Any]
) -> None:
    x = inputs(shape, bias, torch.float64, "cpu")
    kwargs = on("cpu", kwargs)
    with fastgpt.use("reference"):
        assert_matches(partial(attention, **kwargs), partial(attention_ref, **kwargs), x)


@pytest.mark.parametrize("cu_q, cu_k, kwargs", VARLEN, ids=str)
def test_varlen_is_each_sequence_by_itself(
    cu_q: list[int], cu_k: list[int], kwargs: dict[str, Any]
) -> None:
    kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
    x, cuts = varlen(cu_q, cu_k, kwargs, torch.float64, "cpu")
    kwargs.pop("heads", None)
    o, lse = attention_varlen(**x, **cuts, return_lse=True)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        one = {"q": x["q"][a:b], "k": x["k"][c:d], "v": x["v"][c:d]}
        want, want_lse = attention_ref(
            **{n: t[None] for n, t in one.items()}, **kwargs, return_lse=True
        )
        assert torch.allclose(o[a:b], want[0])
        assert torch.allclose(lse[:, a:b], want_lse[0])


# ------------------------------------------------------------------ the kernels


@pytest.mark.gpu
@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: str(CASES[n][1:]))
def test_kernel_matches(n: int, device: str) -> None:
    shape, bias, short, kwargs = CASES[n]
    x = inputs(shape, bias, DTYPES[-1] if short else torch.float32, device)
    kwargs = on(device, kwargs)
    assert_matches(with_lse(kernel(), **kwargs), with_lse(attention_ref, **kwargs), x)


@pytest.mark.gpu
@pytest.mark.parametrize("n", range(len(VARLEN)), ids=lambda n: str(VARLEN[n]))
def test_varlen_kernel_matches(n: int, device: str) -> None:
    x, kwargs = varlen(*VARLEN[n], DTYPES[-n], device)

    def joined(op: Any) -> Any:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, lse = op(q, k, v, **kwargs, return_lse=True)
            lse = torch.where(lse == -torch.inf, 0.0, lse)
            return torch.cat([o.to(lse.dtype), lse.transpose(0, 1)[..., None]], -1)

        return f

    assert_matches(joined(kernel(attention_varlen)), joined(attention_varlen_ref), x)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter has no bfloat16")
def test_a_bias_has_its_gradient_where_chips_drop_bits(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastgpt.kernels.attention as kernels

    monkeypatch.setattr(
        kernels, "attention_flags", lambda dtype: {"TRUNCATE": True, "PARTS": False}
    )
    x = inputs(PAIR, (1, 1, 37, 37), torch.bfloat16, device)
    assert_matches(kernel(), attention_ref, x)


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().requires_grad_() for n, t in x.items()}


def with_grads(op: Any, x: dict[str, Tensor], **kwargs: Any) -> list[Tensor]:
    """o, lse and the gradients of what is in x, all of them asked for."""
    x = leaves(x)
    o, lse = op(**x, **kwargs, return_lse=True)
    loss = o.float().square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()
    return [o, lse, *torch.autograd.grad(loss, list(x.values()))]


@pytest.mark.gpu
def test_the_same_bits_twice_and_over_batches(device: str) -> None:
    x = inputs(SHAPE, (2, 1, 37, 37), torch.float32, device)
    kwargs = on(device, {"key_mask": PADDED, "document_ids": DOCUMENTS, "softcap": 3.0})
    whole = with_grads(kernel(), x, **kwargs)
    for a, b in zip(whole, with_grads(kernel(), x, **kwargs), strict=True):
        assert torch.equal(a, b)
    part = {n: t[1:] if isinstance(t, Tensor) else t for n, t in kwargs.items()}
    half = with_grads(kernel(), {n: t[1:] for n, t in x.items()}, **part)
    for a, b in zip(whole, half, strict=True):
        assert torch.equal(a[1:], b)


@pytest.mark.gpu
def test_what_lies_in_hidden_keys_reaches_nothing(device: str) -> None:
    """Not even NaN; a query without keys gives 0, minus infinity and no gradient."""
    mask = PADDED[:, :21].to(device)
    x = qkv(2, 21, 1, 16, device=device)
    clean = with_grads(kernel(), x, key_mask=mask)
    for name in ("k", "v"):
        x[name] = torch.where(mask[..., None, None], x[name], torch.nan)
    o, lse, dq, dk, dv = got = with_grads(kernel(), x, key_mask=mask)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
    assert (o[0, :9] == 0).all() and (lse[0, :, :9] == -torch.inf).all() and (dq[0, :9] == 0).all()
    assert (dk[~mask] == 0).all() and (dv[~mask] == 0).all()
    with fastgpt.use("reference"):
        for a, b in zip(got, with_grads(attention, x, key_mask=mask), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
def test_a_bias_of_minus_infinity_hides(device: str) -> None:
    x = qkv(1, 21, 1, 16, device=device)
    see = torch.rand(1, 1, 21, 21, device=device) < 0.7
    see[:, :, 4] = False
    x["bias"] = torch.where(see, 0.0, -torch.inf)
    o, lse, *grads = with_grads(kernel(), x, causal=False)
    assert (o[:, 4] == 0).all() and (lse[..., 4] == -torch.inf).all()
    with fastgpt.use("reference"):
        o2, _, *grads2 = with_grads(attention, x, causal=False)
    for a, b in zip([o, *grads], [o2, *grads2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_logits_of_ten_thousand(device: str) -> None:
    x = qkv(1, 21, 1, 16, device=device)
    x["k"] = F.normalize(x["k"], dim=-1)
    x["q"] = x["k"] * 4e5  # a query's own key has 1e5, the others less
    o, lse, *grads = with_grads(kernel(), x)
    assert torch.allclose(o, x["v"], atol=1e-6)
    assert torch.allclose(lse, torch.full_like(lse, 1e5)) and all(g.isfinite().all() for g in grads)
    o, lse, *grads = with_grads(kernel(), x, softcap=5.0)
    assert torch.allclose(o, attention_ref(**x, softcap=5.0), atol=1e-5)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_where_they_are_seen(bad: float, device: str) -> None:
    x = qkv(1, 21, 1, 16, device=device)
    clean = kernel()(**x)
    x["q"][0, 9, 0, 3] = bad
    o, lse = kernel()(**x, return_lse=True)
    assert not o[0, 9].isfinite().all() and not lse[0, 0, 9].isfinite()
    assert torch.equal(o[:, :9], clean[:, :9]) and torch.equal(o[:, 10:], clean[:, 10:])
    x = qkv(1, 21, 1, 16, device=device)
    clean = kernel()(**x)
    x["k"][0, 13, 0, 2] = bad
    o = kernel()(**x)
    assert torch.equal(o[:, :13], clean[:, :13])
    assert o[0, 13:].isnan().any()


@pytest.mark.gpu
def test_one_query_one_key_and_denormals(device: str) -> None:
    x = qkv(1, 1, 2, 8, device=device)
    assert torch.allclose(kernel()(**x), x["v"], atol=1e-6)
    x = qkv(1, 5, 1, 8, Tk=1, device=device)
    assert torch.allclose(kernel()(**x, causal=False), x["v"].expand(1, 5, 1, 8), atol=1e-6)
    x = qkv(1, 5, 1, 8, device=device)
    x["q"] *= 1e-39
    o, lse, *grads = with_grads(kernel(), x, causal=False)
    assert torch.allclose(o, x["v"].mean(1, keepdim=True).expand_as(o), atol=1e-6)
    assert torch.allclose(lse, torch.full_like(lse, math.log(5)))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_a_bias_lies_anywhere(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**32 + 2**10, np.float16))  # only touched pages are real
    x = qkv(1, 5, 2, 8, dtype=torch.float16)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float16)
    far = room.as_strided((1, 2, 5, 5), (0, 2**31, 2**28 + 2**27, 1)).copy_(bias)
    got = kernel()(**x, bias=far)
    assert torch.equal(got, kernel()(**x, bias=bias))


@pytest.mark.gpu
def test_no_sequences_and_no_rows(device: str) -> None:
    x, kwargs = varlen([0, 2, 2], [0, 0, 3], {}, torch.float32, device)
    o, lse, dq, dk, dv = with_grads(kernel(attention_varlen), x, **kwargs)
    assert (o == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() for g in (dq, dk, dv))
    empty = {n: t[:0] for n, t in x.items()}
    for cu in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)):
        o, *grads = with_grads(kernel(attention_varlen), empty, **cut(cu.to(device), 0))
        assert o.shape == empty["q"].shape and grads[1].shape == empty["q"].shape


# ------------------------------------------------------------------ the registered ops

EXTRAS = Extras(
    2.0, SLOPES, torch.randn(1, 2, 5, 7), torch.arange(14).view(2, 7) % 5 > 0,
    torch.tensor([[0, 0, 1, 1, 1, 4, 4], [0, 3, 3, 3, 0, 0, 3]]),
)  # fmt: skip
CUT = Extras(cu_seqlens_q=torch.tensor([0, 3, 5]), cu_seqlens_k=torch.tensor([0, 4, 7]),
             max_seqlen_q=3, max_seqlen_k=4)  # fmt: skip


@pytest.mark.parametrize("B, extras", [(2, EXTRAS), (1, CUT)], ids=["all", "varlen"])
def test_opcheck(B: int, extras: Extras) -> None:
    q, k, v = qkv(B, 5, 2, 8, Tk=7, heads=1).values()
    rest = (0.5, -1, 0, 0.3, torch.tensor([5]), *extras)
    torch.library.opcheck(torch.ops.fastgpt.attention_fwd, (q, k, v, *rest))
    o, lse = torch.ops.fastgpt.attention_fwd(q, k, v, *rest)
    args = (torch.randn_like(o), torch.randn_like(lse), q, k, v, o, lse, *rest)
    for bias_grad in (False, extras.bias is not None):
        torch.library.opcheck(torch.ops.fastgpt.attention_bwd, (*args, bias_grad))


@pytest.mark.parametrize("B, extras", [(2, EXTRAS), (1, CUT)], ids=["all", "varlen"])
def test_function_gradcheck_and_double_backward(B: int, extras: Extras) -> None:
    x = qkv(B, 5, 2, 8, Tk=7, heads=1, dtype=torch.float64)
    if extras.bias is not None:
        x["bias"] = extras.bias.double()

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        seen = extras._replace(bias=bias)
        o, lse = AttentionFunction.apply(q, k, v, 0.4, 3, 3, 0.2, torch.tensor([3]), *seen)
        return o, torch.where(lse.isinf(), 0.0, lse)

    args = list(leaves(x).values())
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args, atol=1e-4)


def test_compiles_to_one_graph_for_three_lengths() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor) -> Any:
        o, lse = AttentionFunction.apply(
            q, k, v, 0.4, -1, 0, 0.0, None, 2.0, SLOPES, bias, key_mask, None, None, None, 0, 0
        )
        return o, lse, attention(q, k, v, bias=bias, key_mask=key_mask)

    calls = []
    for T in (5, 9, 14):
        x = qkv(2, T, 2, 8)
        calls.append(x | {"bias": torch.randn(1, 1, T, T), "key_mask": torch.rand(2, T) < 0.8})
    assert_one_graph(f, calls)


def test_compiled_gradients_are_the_eager_ones() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        o, lse = AttentionFunction.apply(
            q, k, v, 0.4, -1, 0, 0.0, None, 2.0, None, bias, None, None, None, None, 0, 0
        )
        return o.square().sum() + lse.sum()

    assert_compiled_gradients_match(loss, qkv(1, 7, 2, 8) | {"bias": torch.randn(1, 1, 7, 7)})


@pytest.mark.parametrize("kwargs", [{}, {"causal": False}, {"window": 2}], ids=str)
def test_plain_attention_of_fewer_queries_than_keys_compiles_whole(kwargs: dict[str, Any]) -> None:
    def f(q: Tensor, k: Tensor) -> Any:
        return attention(q, k, k, **kwargs), q

    sizes = ((3, 6), (5, 9))
    calls = [{"q": torch.randn(2, n, 4, 8), "k": torch.randn(2, T, 4, 8)} for n, T in sizes]
    assert_one_graph(f, calls)


def test_empty_sequences_have_gradients() -> None:
    q, k = (torch.zeros(n, 2, 8, requires_grad=True) for n in (0, 5))
    for cu_q, cu_k in (([0, 0], [0, 5]), ([0], [0])):
        cu = [torch.tensor(c) for c in (cu_q, cu_k)]
        o = attention_varlen(q, k[: cu_k[-1]], k[: cu_k[-1]], *cu, 0, 5)
        (dq,) = torch.autograd.grad(o.sum(), q)
        assert dq.shape == q.shape


def test_varlen_compiles_whole() -> None:
    x, kwargs = varlen([0, 3, 8], [0, 3, 8], {}, torch.float32, "cpu")

    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_varlen(q, k, v, **kwargs), q

    assert_one_graph(f, [x])


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (3, 0), (4, 4), (0, 0), (40, 2)])
@pytest.mark.parametrize("Tq, Tk", [(6, 6), (3, 11), (11, 3), (5, 0)])
def test_flops_are_those_of_the_pairs_that_see_each_other(
    Tq: int, Tk: int, left: int, right: int
) -> None:
    pairs = int(visible(Tq, Tk, left, right, torch.device("cpu"))[1].sum())
    shapes = (2, Tq, 3, 8), (2, Tk, 3, 8)
    assert attention_flops(*shapes, left, right, 2) == 2 * (2 * 2 * 3 * 8) * pairs


def test_flops_of_long_rows_take_no_time() -> None:
    shape = (1, 10**12, 1, 8)
    assert attention_flops(shape, shape, -1, 0, 1) == 16 * (10**12 * (10**12 + 1) // 2)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "kwargs, error, rule",
    [
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite; got 0.0"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"\(H,\) or \(B, H\) with B = 2, H = 2; got"),
        ({"alibi_slopes": torch.ones(2).double()}, TypeError, "alibi_slopes must be float32; got"),
        ({"bias": torch.ones(3, 5)}, ValueError, r"here of \(2, 2, 3, 5\); got \(3, 5\)"),
        ({"bias": torch.ones(1, 1, 2, 5)}, ValueError, r"Tq or 1, Tk\).*got \(1, 1, 2, 5\)"),
        ({"bias": torch.ones(1, 1, 3, 5).int()}, TypeError, "bias must have a floating dtype"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, r"key_mask must be bool; got torch\.float32"),
        ({"key_mask": torch.ones(5).bool()}, ValueError, r"\(B, Tk\) = \(2, 5\); got \(5,\)"),
        ({"document_ids": torch.ones(2, 5)}, TypeError, "document_ids must be integers; got"),
        ({"document_ids": torch.ones(2, 3).int()}, ValueError, r"\(B, Tk\) = \(2, 5\), with Tq"),
        ({"bias": torch.ones(1, 1, 3, 5, device="meta")}, ValueError, "bias must be on q's device"),
    ],
)
def test_rejects(kwargs: dict[str, Any], error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=rule) as e:
        attention(**qkv(2, 3, 2, 8, Tk=5), **kwargs)
    assert str(e.value).startswith("attention: ") and "\n" not in str(e.value)


def test_varlen_rejects() -> None:
    q = torch.zeros(5, 2, 8)
    cu = torch.tensor([0, 2, 5])
    for args, error, rule in (
        ((q[None], q, q, cu, cu, 3, 3), ValueError, r"must be \(total, H, D\); got q \(1, 5, 2"),
        ((q, q[..., :4], q[..., :4], cu, cu, 3, 3), ValueError, "must agree in D"),
        ((q, q, q, cu.float(), cu, 3, 3), TypeError, "cu_seqlens_q must be int32 or int64; got"),
        ((q, q, q, cu, cu[:2], 3, 3), ValueError, r"must both be \(B \+ 1,\); got \(3,\) and"),
        ((q, q, q, cu, cu, 3, -1), ValueError, "max_seqlen_k must not be negative; got -1"),
    ):
        with pytest.raises(error, match="attention_varlen: .*" + rule):
            attention_varlen(*args)  # type: ignore[call-overload]


@pytest.mark.gpu
def test_a_forced_kernel_says_why_it_cannot(device: str) -> None:
    x = qkv(1, 3, 2, 8, device=device)
    kernel()(**x)
    slopes = torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="the kernel gives alibi_slopes no gradient"):
        kernel()(**x, alibi_slopes=slopes)
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16 bias; got torch\.float64"):
        kernel()(**x, bias=torch.zeros(1, 1, 1, 3, device=device, dtype=torch.float64))
    (got,) = torch.autograd.grad(attention(**x, alibi_slopes=slopes).square().sum(), slopes)
    assert got.abs().sum() > 0  # not forced, the reference takes it
