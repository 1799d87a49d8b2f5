"""embedding: specification, PyTorch path, kernels, registered ops, errors."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgpt
from fastgpt.ops import dropout_mask, embedding, embedding_ref
from fastgpt.ops.backend import INTERPRET
from fastgpt.ops.embedding import EmbeddingFunction
from tests.check import assert_compiled_gradients_match, assert_matches, assert_one_graph
from tests.conftest import DTYPES


def tables(
    V: int, P: int, C: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    shapes = {"wte": (V, C), "wpe": (P, C)} if P else {"wte": (V, C)}
    return {n: torch.randn(s, dtype=dtype, device=device) for n, s in shapes.items()}


def kernel(idx: Tensor, **kwargs: Any) -> Any:
    def op(**x: Tensor) -> Tensor:
        with fastgpt.use("triton"):
            return embedding(idx, **x, **kwargs)

    return op


# ------------------------------------------------------------------ the specification


def test_it_is_two_embeddings_and_a_dropout() -> None:
    wte, wpe = nn.Embedding(11, 8), nn.Embedding(16, 8)
    idx = torch.randint(11, (3, 5))
    want = wte(idx) + wpe(torch.arange(4, 9))
    assert torch.equal(embedding(idx, wte.weight, wpe.weight, start=4), want)
    seed = torch.tensor([3])
    got = embedding(idx, wte.weight, wpe.weight, start=4, dropout_p=0.25, seed=seed)
    keep = dropout_mask(seed, (15, 8), 0.25).view(3, 5, 8)
    assert torch.allclose(got, want * keep / 0.75)


def test_dropout_without_a_seed_draws_from_torchs_generator() -> None:
    idx, x = torch.zeros(2, 50, dtype=torch.int64), {"wte": torch.ones(1, 20)}
    kept = embedding(idx, **x, dropout_p=0.5) != 0
    assert 0.4 < kept.float().mean() < 0.6


def test_an_unknown_id_is_an_index_error_on_the_cpu() -> None:
    for wrong in (-1, 7):
        with pytest.raises(IndexError), fastgpt.use("reference"):
            embedding(torch.tensor([[0, wrong]]), torch.zeros(7, 4))


# ------------------------------------------------------------------ the kernels

SHAPES = [(1, 1, 1, 1), (2, 7, 5, 8), (3, 5, 2, 33), (70, 1, 2, 12), (1, 2, 3, 260)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, V, C", SHAPES)
def test_kernel_matches(B: int, T: int, V: int, C: int, dtype: torch.dtype, device: str) -> None:
    idx = torch.randint(V, (B, T), device=device)
    x = tables(V, T + 3, C, dtype, device)
    assert_matches(kernel(idx, start=2), partial(embedding_ref, idx, start=2), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [0, 9])
def test_kernel_matches_with_dropout(P: int, dtype: torch.dtype, device: str) -> None:
    idx = torch.randint(6, (4, 9), device=device, dtype=torch.int32)
    kwargs: dict[str, Any] = {"dropout_p": 0.3, "seed": torch.tensor([2**35 + 1], device=device)}
    x = tables(6, P, 24, dtype, device)
    assert_matches(kernel(idx, **kwargs), partial(embedding_ref, idx, **kwargs), x)


@pytest.mark.gpu
@settings(max_examples=6)
@given(data=st.data())
def test_kernel_matches_on_any_ids_and_strides(data: st.DataObject, device: str) -> None:
    draw = data.draw
    B, T, V = draw(st.integers(1, 12)), draw(st.integers(1, 7)), draw(st.integers(1, 9))
    x = tables(V, T, draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES)), device)
    x["wte"] = torch.cat([x["wte"]] * 2, -1)[:, 1 : 1 + x["wpe"].shape[1]]
    if draw(st.booleans()):
        x["wpe"] = x["wpe"].T.contiguous().T
    idx = torch.randint(V, (B, T + 1), device=device)[:, 1:]
    if draw(st.booleans()):
        idx = torch.randint(V, (T, B), device=device).T
    assert_matches(kernel(idx), partial(embedding_ref, idx), x)


@pytest.mark.gpu
def test_heavy_repeats_and_segments_across_chunks(device: str) -> None:
    """Some ids once, one filling many chunks, and one with rows on both sides of a border."""
    idx = torch.tensor([1] * 3 + [4] * 300 + [5] * 70 + [9], device=device)
    idx = idx[torch.randperm(len(idx))].view(187, 2)
    assert_matches(kernel(idx), partial(embedding_ref, idx), tables(10, 2, 4, device=device))


@pytest.mark.gpu
def test_an_id_outside_the_table_reads_nothing_and_has_no_gradient(device: str) -> None:
    idx = torch.tensor([[0, -1, 3, 2**40, -(2**63), 2]], device=device)
    x = {n: t.requires_grad_() for n, t in tables(3, 6, 8, device=device).items()}
    h = kernel(idx)(**x)
    assert torch.equal(h[0, 1:5], x["wpe"][1:5])
    h.sum().backward()
    assert x["wte"].grad is not None and x["wpe"].grad is not None
    assert x["wte"].grad[:, 0].tolist() == [1, 0, 1] and (x["wpe"].grad == 1).all()


@pytest.mark.gpu
def test_expanded_ids_and_gradient(device: str) -> None:
    idx = torch.randint(5, (1, 4), device=device).expand(6, 4)
    x = {n: t.requires_grad_() for n, t in tables(5, 4, 24, device=device).items()}
    got = torch.autograd.grad(kernel(idx)(**x).sum(), list(x.values()))
    want = torch.autograd.grad(embedding_ref(idx, **x).sum(), list(x.values()))
    assert all(torch.allclose(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
def test_a_frozen_table_gets_no_gradient(device: str) -> None:
    idx = torch.randint(5, (2, 4), device=device)
    for frozen, live in (("wte", "wpe"), ("wpe", "wte")):
        x = tables(5, 4, 8, device=device)
        x[live].requires_grad_()
        kernel(idx)(**x).sum().backward()
        assert x[frozen].grad is None and x[live].grad is not None


@pytest.mark.gpu
def test_a_nan_in_one_row_stays_in_that_row(device: str) -> None:
    x = tables(4, 4, 8, device=device)
    x["wte"][2, 3] = float("nan")
    h = kernel(torch.tensor([[0, 1, 2, 3]], device=device))(**x)
    assert h.isnan().nonzero().tolist() == [[0, 2, 3]]
    idx = torch.arange(4, device=device).repeat(30)[:, None]
    dy = torch.ones(120, 1, 8, device=device)
    dy[5, 0, 0] = float("inf")
    dwte, _ = torch.ops.fastgpt.embedding_bwd(dy, idx, 4, 0, 0, 0.0, None)
    assert dwte.isinf().nonzero().tolist() == [[1, 0]] and (dwte[0] == 30).all()


@pytest.mark.gpu
def test_sums_are_float32(device: str) -> None:
    """A row of 16 bits summed 640 times: in its own dtype the sum would stop growing at 256."""
    half = DTYPES[-1]
    idx = torch.zeros(320, 2, dtype=torch.int64, device=device)
    dy = torch.full((320, 2, 2), 1.0 + 2.0**-7, dtype=half, device=device)
    dwte, dwpe = torch.ops.fastgpt.embedding_bwd(dy, idx, 1, 2, 0, 0.0, None)
    want = torch.tensor([640, 320, 320], device=device)[:, None] * (1 + 2.0**-7)
    assert torch.equal(torch.cat([dwte, dwpe])[:, 0], want.to(half)[:, 0])


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    idx = torch.randint(2, (100, 2), device=device)
    x = {n: t.requires_grad_() for n, t in tables(2, 2, 16, device=device).items()}
    dy = torch.randn(100, 2, 16, device=device)

    def once() -> tuple[Tensor, ...]:
        h = kernel(idx)(**x)
        return (h, *torch.autograd.grad(h, list(x.values()), dy))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
def test_second_derivative_is_that_of_the_reference(device: str) -> None:
    idx, seed = torch.randint(3, (2, 5), device=device), torch.tensor([4], device=device)
    dy = torch.randn(2, 5, 8, device=device)

    def penalty(op: Any) -> Tensor:
        torch.manual_seed(1)
        x = {n: t.requires_grad_() for n, t in tables(3, 5, 8, device=device).items()}
        leaf = dy.clone().requires_grad_()
        grads = torch.autograd.grad(op(**x), list(x.values()), leaf, create_graph=True)
        total = sum((g.pow(3).sum() for g in grads), torch.zeros((), device=device))
        return torch.autograd.grad(total, leaf)[0]

    kwargs: dict[str, Any] = {"dropout_p": 0.3, "seed": seed}
    got, want = penalty(kernel(idx, **kwargs)), penalty(partial(embedding_ref, idx, **kwargs))
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.gpu
def test_empty(device: str) -> None:
    x = {n: t.requires_grad_() for n, t in tables(3, 4, 8, device=device).items()}
    kernel(torch.zeros(1, 1, dtype=torch.int64, device=device))(**x)  # proof that kernels run
    for shape in ((0, 4), (2, 0)):
        h = kernel(torch.zeros(shape, dtype=torch.int64, device=device))(**x)
        grads = torch.autograd.grad(h.sum(), list(x.values()))
        assert h.shape == (*shape, 8) and all((g == 0).all() for g in grads)


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_offsets_beyond_32_bits(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**10, np.float16))  # only touched pages are real
    wte = room.as_strided((3, 40), (2**30, 1)).copy_(torch.randn(3, 40))
    idx = torch.tensor([[2, 0, 1]])
    assert torch.equal(kernel(idx)(wte=wte), kernel(idx)(wte=wte.contiguous()))


# ------------------------------------------------------------------ the registered ops


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("P", [0, 7])
def test_opcheck(dropout_p: float, P: int) -> None:
    idx, x = torch.randint(5, (2, 6)), tables(5, P, 8)
    seed = torch.tensor([5]) if dropout_p else None
    start = 1 if P else 0
    args = (idx, x["wte"], x.get("wpe"), start, dropout_p, seed)
    torch.library.opcheck(torch.ops.fastgpt.embedding_fwd, args)
    back = (torch.randn(2, 6, 8), idx, 5, P, start, dropout_p, seed)
    torch.library.opcheck(torch.ops.fastgpt.embedding_bwd, back)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_function_gradcheck_and_double_backward(dropout_p: float) -> None:
    x = [t.double().requires_grad_() for t in tables(4, 5, 3).values()]
    idx, seed = torch.randint(4, (2, 4)), torch.tensor([2]) if dropout_p else None

    def f(wte: Tensor, wpe: Tensor) -> Any:
        return EmbeddingFunction.apply(idx, wte, wpe, 1, dropout_p, seed)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_compiles_to_one_graph_for_three_lengths() -> None:
    x = tables(7, 16, 8)

    def f(idx: Tensor) -> Any:
        return (EmbeddingFunction.apply(idx, x["wte"], x["wpe"], 0, 0.0, None),)

    assert_one_graph(f, [{"idx": torch.randint(7, (2, T))} for T in (3, 5, 8)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    idx = torch.randint(7, (3, 5))

    def loss(wte: Tensor, wpe: Tensor) -> Tensor:
        h = EmbeddingFunction.apply(idx, wte, wpe, 1, 0.0, None)
        assert isinstance(h, Tensor)
        return h.square().sum()

    assert_compiled_gradients_match(loss, tables(7, 8, 4))


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    idx, e, p = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, 8), torch.zeros(4, 8)
    for args, kwargs, rule in [
        ((idx[0], e), {}, r"idx must be \(B, T\); got \(3,\)"),
        ((idx, e[0]), {}, r"wte must be \(rows, C\), C at least 1; got \(8,\)"),
        ((idx, e, torch.zeros(4, 6)), {}, "wte and wpe must have one width and dtype; got 8 of"),
        ((idx, e, p.half()), {}, "one width and dtype; got 8 of torch.float32, 8 of torch.float16"),
        ((idx, e, p), {"start": 2}, "positions must lie in wpe, 0 to 3; got 2 to 4"),
        ((idx, e, p), {"start": -1}, "positions must lie in wpe, 0 to 3; got -1 to 1"),
        ((idx, e), {"start": 2}, "start needs wpe; got start 2 alone"),
        ((idx, e, p), {"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\); got 1.0"),
        ((idx, e.to("meta")), {}, "on one device; got idx cpu, wte meta"),
    ]:
        with pytest.raises(ValueError, match=f"^embedding: .*{rule}"):
            embedding(*args, **kwargs)
    with pytest.raises(
        TypeError, match=r"^embedding: idx must be int64 or int32; got torch\.float"
    ):
        embedding(idx.float(), e)
    with pytest.raises(TypeError, match=r"^embedding: wte must have a floating dtype; got torch"):
        embedding(idx, e.long())
