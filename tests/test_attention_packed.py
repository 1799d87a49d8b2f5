"""attention_packed: the same bits as attention of the views, and one gradient. Errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.ops import attention, attention_packed, attention_ref
from fastgpt.ops.attention import AttentionFunction, unpacked
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES

CASES: list[tuple[int, int, int, int, dict[str, Any]]] = [  # T, H, Hkv, D
    (1, 1, 1, 8, {}),
    (37, 2, 2, 16, {}),
    (33, 4, 2, 24, {"causal": False}),
    (40, 3, 1, 16, {"window": 5, "softcap": 20.0}),
]


def of_views(qkv: Tensor, n_head: int, **kwargs: Any) -> Any:
    return attention(*unpacked(qkv, n_head), **kwargs)


@pytest.mark.parametrize("T, H, heads, D, kwargs", CASES, ids=str)
def test_plain_path_is_attention_of_the_views(
    T: int, H: int, heads: int, D: int, kwargs: dict[str, Any]
) -> None:
    qkv = torch.randn(2, T, H + 2 * heads, D, dtype=torch.float64)
    want = attention_ref(*unpacked(qkv, H), **kwargs)
    assert torch.allclose(attention_packed(qkv, H, **kwargs), want, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, H, heads, D, kwargs", CASES, ids=str)
def test_kernel_matches(
    T: int, H: int, heads: int, D: int, kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    x = {"qkv": torch.randn(2, T, H + 2 * heads, D, dtype=dtype, device=device)}

    def op(qkv: Tensor) -> Tensor:
        with fastgpt.use("triton"):
            return attention_packed(qkv, H, **kwargs)

    def ref(qkv: Tensor) -> Any:
        return attention_ref(*unpacked(qkv, H), **kwargs)

    assert_matches(op, ref, x)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_bits_are_those_of_the_views(dropout_p: float, device: str) -> None:
    """Of strides that are not those of a packed tensor too; a bias beside it has its gradient."""
    seed = torch.tensor([3], device=device)
    whole = torch.randn(21, 2, 8, 16, device=device)
    for base in (whole.transpose(0, 1), whole[..., :8].transpose(0, 1)):
        qkv = base.detach().requires_grad_()
        bias = torch.randn(1, 4, 21, 21, device=device, requires_grad=True)
        found = []
        for op in (attention_packed, of_views):
            with fastgpt.use("triton"):
                o = op(qkv, 4, bias=bias, dropout_p=dropout_p, seed=seed)
            found.append((o, *torch.autograd.grad(o.square().sum(), [qkv, bias])))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_views(device: str) -> None:
    def penalty(op: Any) -> Tensor:
        torch.manual_seed(0)
        qkv = torch.randn(1, 9, 4, 8, device=device, requires_grad=True)
        with fastgpt.use("triton"):
            (grad,) = torch.autograd.grad(op(qkv, 2).sin().sum(), qkv, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), qkv)[0]

    assert torch.allclose(penalty(attention_packed), penalty(of_views), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 0, 6, 8)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    with fastgpt.use("triton"):
        attention_packed(torch.randn(1, 3, 3, 8, device=device), 1)  # kernels run in this mode
        qkv = torch.randn(shape, device=device, requires_grad=True)
        o = attention_packed(qkv, 2)
    (grad,) = torch.autograd.grad(o.sum(), qkv)
    assert o.shape == (*shape[:2], 2, 8) and grad.shape == shape


def test_opcheck_of_the_packed_gradient() -> None:
    q, k, v = unpacked(torch.randn(2, 5, 8, 8), 4)
    o, lse = torch.ops.fastgpt.attention_fwd(q, k, v, 0.3, -1, 0, 0.0, None)
    args = (torch.randn_like(o), None, q, k, v, o, lse, 0.3, -1, 0, 0.0, None)
    torch.library.opcheck(torch.ops.fastgpt.attention_bwd, args, {"packed": True})


def function(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return AttentionFunction.apply(qkv, 2, None, 0.3, -1, 0, 0.0, None)  # type: ignore[no-any-return]


def test_function_gradcheck_and_double_backward() -> None:
    qkv = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


def test_compiles() -> None:
    assert_one_graph(function, [{"qkv": torch.randn(2, T, 4, 8)} for T in (5, 9, 12)])
    loss = lambda qkv: function(qkv)[0].square().sum()  # noqa: E731
    assert_compiled_gradients_match(loss, {"qkv": torch.randn(2, 7, 4, 8)})


def test_rejects() -> None:
    for shape, n_head in [((2, 3, 8), 2), ((2, 3, 7, 8), 2), ((2, 3, 6, 8), 6), ((2, 3, 6, 8), 0)]:
        with pytest.raises(ValueError, match=r"^attention_packed: qkv must be .* n_head; got qkv"):
            attention_packed(torch.zeros(shape), n_head)
    with pytest.raises(ValueError, match="H of q must be a multiple of H of k and v"):
        attention_packed(torch.zeros(2, 3, 7, 8), 3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        attention_packed(torch.zeros(2, 3, 6, 8), 2, window=0)
