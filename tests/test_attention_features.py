"""What attention does beyond causal windows: changed scores, hidden keys, sequences end to end."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.ops import attention, attention_ref, attention_varlen, attention_varlen_ref
from tests.check import assert_matches
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
