"""attention_decode: specification, CPU path, kernels, registered op, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import ops
from fastgpt.ops import attention, attention_decode, attention_decode_ref
from fastgpt.ops.backend import INTERPRET
from tests.conftest import DTYPES, HAS_CUDA, SANITIZED

Inputs = dict[str, Any]


def inputs(
    B: int = 2, T: int = 1, H: int = 2, D: int = 16, S: int = 40, heads: int = 0,
    lengths: list[int] | None = None, page: int = 0, held: bool = False, flipped: bool = False,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Inputs:  # fmt: skip
    """Of `attention_decode`. What no query may see, or may come to see, is NaN.

    page: rows lie in pages of that size, in any order. held: the new ones are in the cache, and
    none are given. flipped: heads before positions in memory, as SDPA would have them.
    """
    heads = heads or H
    lengths = [S // 3, S - T, *[0] * B][:B] if lengths is None else lengths
    at = torch.tensor(lengths)[:, None] + (T if held else 0)
    caches = []
    for _ in "kv":
        cache = torch.randn(B, S, heads, D)
        cache[torch.arange(S) >= at.clamp(min=0)] = torch.nan
        caches.append(cache)
    table = None
    if page:
        table = torch.randperm(B * S // page + 1)[: B * S // page].view(B, -1)
        for n, cache in enumerate(caches):
            paged = torch.full((B * S // page + 1, page, heads, D), torch.nan)
            paged[table] = cache.view(B, -1, page, heads, D)
            caches[n] = paged
        table = table.int()
        table[torch.arange(S // page) * page >= at + (0 if held else T)] = -7
    new = [None if held else torch.randn(B, T, heads, D) for _ in "kv"]
    made: Inputs = {"q": torch.randn(B, T, H, D), "k_cache": caches[0], "v_cache": caches[1]}
    made |= {"lengths": torch.tensor(lengths, dtype=torch.int32), "k": new[0], "v": new[1]}
    made |= {"block_table": table}
    made = {
        name: t if t is None else t.to(device, dtype if t.is_floating_point() else None)
        for name, t in made.items()
    }
    if flipped:
        for name in ("k_cache", "v_cache"):
            made[name] = made[name].transpose(1, 2).contiguous().transpose(1, 2)
    return made


def copied(x: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """For a call of its own: caches are written."""
    return {
        n: t if t is None else (t.to(dtype) if dtype and t.is_floating_point() else t).clone()
        for n, t in x.items()
    }


def called(op: Any, x: Inputs, **kwargs: Any) -> dict[str, Tensor]:
    o, lse = op(**x, return_lse=True, **kwargs)
    assert o.shape == x["q"].shape
    assert lse.shape == (o.shape[0], o.shape[2], o.shape[1])
    return {"o": o, "lse": lse, "k_cache": x["k_cache"], "v_cache": x["v_cache"]}


def kernel(**x: Any) -> Any:
    with fastgpt.use("triton"):
        return attention_decode(**x)


def plain(**x: Any) -> Any:
    with fastgpt.use("reference"):
        return attention_decode(**x)


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Equal, NaN to NaN."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def assert_follows(op: Any, x: Inputs, **kwargs: Any) -> dict[str, Tensor]:
    """The law of tests/check.py, for values; caches are equal to the bit."""
    ref = {n: v for n, v in kwargs.items() if n != "splits"}
    got = called(op, copied(x), **kwargs)
    same = called(attention_decode_ref, copied(x), **ref)
    gold = called(attention_decode_ref, copied(x, torch.float64), **ref)
    for name in ("k_cache", "v_cache"):
        assert_bits(got[name], same[name])
    for name in ("o", "lse"):
        truth, theirs, mine = gold[name], same[name], got[name]
        assert mine.dtype == theirs.dtype, name
        seen = truth.isfinite()
        assert torch.equal(mine.isfinite(), seen) and torch.equal(mine[~seen], theirs[~seen])
        if not seen.any():
            continue
        err, allowed = ((t.double() - truth)[seen].abs().max().item() for t in (mine, theirs))
        assert err <= 2 * allowed + 1e-5, f"{name}: off by {err:.2e}, PyTorch by {allowed:.2e}"
    return got


# ------------------------------------------------------------------ the specification

WAYS: list[tuple[Inputs, Inputs]] = [
    ({}, {}),
    ({"D": 24, "heads": 1, "T": 5}, {"window": 3}),
    ({"H": 4, "heads": 2, "lengths": [35, 0], "T": 4, "held": True}, {"softcap": 2.0}),
    ({"B": 4, "H": 3, "lengths": [7, -1, 0, 39], "page": 8}, {"window": 9, "softmax_scale": -0.4}),
    ({"H": 4, "heads": 1, "T": 3, "lengths": [37, 8], "page": 5, "flipped": True}, {}),
    ({"B": 3, "lengths": [9, 9, 9], "flipped": True}, {"window": 4}),
]
ways = pytest.mark.parametrize("shape, kwargs", WAYS, ids=str)


@ways
@pytest.mark.parametrize("op", [attention_decode_ref, plain])
def test_a_row_is_attention_to_what_it_holds(op: Any, shape: Inputs, kwargs: Inputs) -> None:
    x = inputs(**shape, dtype=torch.float64)
    before = copied(x)
    got = called(op, x, **kwargs)
    T, page = x["q"].shape[1], before["k_cache"].shape[1]
    for b, n in enumerate(x["lengths"].tolist()):
        if n < 0:
            assert (got["o"][b] == 0).all() and (got["lse"][b] == -torch.inf).all()
            continue
        if x["block_table"] is None:
            where: Any = b, slice(0, n + T)
        else:
            j = torch.arange(n + T)
            where = x["block_table"][b, j // page].long(), j % page
        k, v = x["k_cache"][where], x["v_cache"][where]
        if x["k"] is not None:
            assert torch.equal(k[n:], x["k"][b]) and torch.equal(v[n:], x["v"][b])
            for name in ("k_cache", "v_cache"):
                if x["block_table"] is None:
                    before[name][b, n : n + T] = x[name[0]][b]
                else:
                    before[name][where[0][n:], where[1][n:]] = x[name[0]][b]
        o, lse = attention(x["q"][b : b + 1], k[None], v[None], return_lse=True, **kwargs)
        torch.testing.assert_close(got["o"][b], o[0])
        torch.testing.assert_close(got["lse"][b], lse[0])
    for name in ("k_cache", "v_cache"):
        assert_bits(x[name], before[name])


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpus_path_follows_the_law(dtype: torch.dtype, shape: Inputs, kwargs: Inputs) -> None:
    assert_follows(plain, inputs(**shape, dtype=dtype), **kwargs)


# ------------------------------------------------------------------ the kernels

KERNELS: list[tuple[Inputs, Inputs]] = [
    *WAYS,
    ({"B": 1, "H": 1, "D": 8, "S": 1, "lengths": [0]}, {}),
    ({"D": 64, "lengths": [31, 17]}, {"splits": 2}),
    ({"H": 4, "heads": 1, "D": 80, "lengths": [33, 0]}, {"splits": 3, "softcap": 3.0}),
    ({"B": 1, "H": 6, "heads": 1, "T": 11, "D": 16, "lengths": [20]}, {"window": 7}),
    ({"D": 128, "page": 20, "lengths": [16, 32]}, {"splits": 2, "window": 18}),
    ({"B": 1, "D": 256, "S": 20, "held": True}, {}),
]  # fmt: skip
LOW = WAYS[1:4]  # in 16 bits too


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, kwargs, dtype",
    [(*case, DTYPES[0]) for case in KERNELS]
    + [(*case, dtype) for dtype in DTYPES[1:] for case in LOW],
    ids=str,
)
def test_kernel_follows_the_law(
    shape: Inputs, kwargs: Inputs, dtype: torch.dtype, device: str
) -> None:
    """Beside it NaN is behind every row, in the pages of none, and where no table should lead."""
    got = assert_follows(kernel, inputs(**shape, dtype=dtype, device=device), **kwargs)
    assert got["o"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 3])
def test_every_count_of_splits_gives_the_same_numbers_and_one_the_same_bits(
    T: int, device: str
) -> None:
    x = inputs(B=2, T=T, H=2, heads=1, S=50, lengths=[45, 20], device=device)
    made = [assert_follows(kernel, x, splits=n)["o"] for n in (1, 3)]
    for o in made:
        torch.testing.assert_close(o, made[0], atol=2e-6, rtol=2e-6)
    again = called(kernel, copied(x), splits=3)["o"]
    assert torch.equal(again, made[1])
    alone = {n: t[1:] if isinstance(t, Tensor) else t for n, t in copied(x).items()}
    assert torch.equal(called(kernel, alone, splits=3)["o"], again[1:])


@pytest.mark.gpu
def test_a_text_written_token_by_token_is_causal_attention(device: str) -> None:
    """Two caches in one tensor, q, k and v views of one product, as a model has them."""
    B, T, H = 2, 37, 2
    qkv = torch.randn(B, T, 3, H, 16, device=device)
    room = torch.full((2, B, 40, H, 16), torch.nan, device=device)
    lengths = torch.zeros(B, dtype=torch.int64, device=device)
    made = []
    for t in (5, 1, 1, 28, 1, 1):
        at = int(lengths[0])
        q, k, v = qkv[:, at : at + t].unbind(2)
        with fastgpt.use("triton"):
            made.append(attention_decode(q, room[0], room[1], lengths, k, v))
        lengths += t
    with fastgpt.use("reference"):
        want = attention(*qkv.unbind(2))
    torch.testing.assert_close(torch.cat(made, 1), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(room[:, :, :T], qkv[:, :, 1:].movedim(2, 0)) and room[:, :, T:].isnan().all()


@pytest.mark.gpu
def test_what_is_behind_the_room_is_neither_written_nor_seen(device: str) -> None:
    """On a GPU nobody looks at lengths, so a wrong one must do no harm."""
    big = inputs(T=3, S=12, lengths=[11, 12], device=device)
    x = dict(big)
    outer = {n: torch.randn(4, 12, 2, 16, device=device) for n in ("k_cache", "v_cache")}
    before = {n: t.clone() for n, t in outer.items()}
    x |= {n: t[1:3] for n, t in outer.items()}
    got = called(kernel, x)
    for n, t in outer.items():
        before[n][1, 11] = x[n[0]][0, 0]
        assert torch.equal(t, before[n])
    assert got["o"].isfinite().all()


@pytest.mark.gpu
def test_nothing_to_do(device: str) -> None:
    for shape in ({"B": 0, "lengths": []}, {"T": 0}):
        o, lse = kernel(**inputs(**shape, device=device), return_lse=True)
        assert o.numel() == lse.numel() == 0
    assert called(kernel, inputs(lengths=[-1, -5], device=device), splits=2)["o"].eq(0).all()


@pytest.mark.skipif(not HAS_CUDA or SANITIZED, reason="needs a GPU")
@pytest.mark.gpu
def test_one_cuda_graph_serves_all_lengths(device: str) -> None:
    x = inputs(B=2, H=4, heads=2, S=3000, lengths=[0, 2000], dtype=torch.float16, device=device)
    eager = copied(x)
    called(kernel, copied(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = called(kernel, x)
    for n in (1, 500, 999):
        x["lengths"].copy_(torch.tensor([n, 2000 + n]))
        x["q"].normal_(), x["k"].normal_(), x["v"].normal_()
        for name in ("k_cache", "v_cache"):
            x[name].normal_()
            eager[name].copy_(x[name])
        eager |= {m: x[m] for m in ("q", "k", "v", "lengths")}
        graph.replay()
        want = called(kernel, eager)
        for name, t in made.items():
            assert torch.equal(t, want[name]), name


@pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="about launches that cannot be made here")
def test_the_grid_and_the_launches_do_not_know_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_traced import launching

    x = inputs(S=4096, lengths=[3, 5])
    with launching(monkeypatch) as launched:
        attention_decode(**x)
        attention_decode(**x, splits=1)
    assert launched == ["_decode_kernel", "_combine_kernel", "_decode_kernel"]


# ------------------------------------------------------------------ the registered op


def op_arguments(x: Inputs, splits: int = 0) -> tuple[Any, ...]:
    return *copied(x).values(), 0.25, 5, 0.0, splits


@pytest.mark.parametrize("shape", [{}, {"page": 8, "T": 2}, {"held": True}], ids=str)
def test_opcheck(shape: Inputs) -> None:
    x = inputs(**shape)
    for n in ("k_cache", "v_cache"):
        x[n].nan_to_num_()  # it compares inputs
    torch.library.opcheck(torch.ops.fastgpt.attention_decode, op_arguments(x))


@pytest.mark.parametrize("T", [1, 3])
def test_compiled_it_is_one_graph_for_all_sizes_and_writes_the_cache(T: int) -> None:
    def step(room: Tensor, qkv: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        y: Tensor = attention_decode(q, room[0], room[1], lengths, k, v, window=9)
        return y * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for B, S in ((4, 12), (7, 17), (5, 9)):
            room, qkv = torch.randn(2, B, S, 2, 8), torch.randn(B, T, 3, 2, 8)
            rooms, lengths = (room, room.clone()), torch.arange(B)
            got, want = (f(r, qkv, lengths) for f, r in zip((compiled, step), rooms, strict=True))
            torch.testing.assert_close(got, want)
            assert torch.equal(*rooms)
            assert torch.equal(room[0, 1, 1 : 1 + T], qkv[1, :, 1])


def test_its_flops_are_those_of_the_room() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = inputs(B=2, T=3, H=4, D=16, S=40)
    counter = FlopCounterMode(display=False)
    with counter:
        torch.ops.fastgpt.attention_decode(*op_arguments(x)[:7], 0.25, -1, 0.0, 0)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 4) * 40 * 16


# ------------------------------------------------------------------ errors


def _with(**changes: Any) -> Inputs:
    return inputs() | changes


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: _with(q=torch.ones(2, 1, 16)), ValueError, r"q must be \(B, T, H, D\)"),
    (lambda: _with(v_cache=torch.ones(2, 41, 2, 16)), ValueError, "of one shape"),
    (lambda: _with(q=torch.ones(3, 1, 2, 16)), ValueError, "must agree in B and D"),
    (lambda: _with(q=torch.ones(2, 1, 3, 16)), ValueError, "H of q must be a multiple"),
    (lambda: inputs(D=12), ValueError, "D must be a multiple of 8 from 8 to 256; got 12"),
    (lambda: _with(k=None), ValueError, "k and v must be given both or neither"),
    (lambda: _with(k=torch.ones(2, 2, 2, 16)), ValueError, r"k must be .* = \(2, 1, 2, 16\); got"),
    (lambda: _with(v=torch.ones(2, 1, 2, 16).half()), TypeError, "v torch.float16"),
    (lambda: _with(k_cache=torch.ones(2, 40, 2, 16).half()), TypeError, "k_cache torch.float16"),
    (lambda: _with(lengths=torch.ones(2)), TypeError, "lengths must be int32 or int64"),
    (lambda: _with(lengths=torch.ones(3).int()), ValueError, r"lengths must be \(B,\), B = 2"),
    (lambda: _with(block_table=torch.ones(2).int()), ValueError, r"\(B, pages of a row\), B = 2"),
    (lambda: _with(block_table=torch.ones(2, 1)), TypeError, "block_table must be int32 or"),
    (lambda: _with(lengths=torch.ones(2, device="meta").int()), ValueError, "on q's device cpu"),
    (lambda: _with(window=0), ValueError, "window must be at least 1 key; got 0"),
    (lambda: _with(splits=0), ValueError, "splits must be at least 1; got 0"),
    (lambda: _with(softcap=-1.0), ValueError, "softcap must be positive and finite; got -1.0"),
    (
        lambda: _with(k_cache=torch.ones(1, 1, 1, 16).expand(2, 40, 2, 16)),
        ValueError,
        "k_cache is written, so it must not be expanded",
    ),
    (lambda: _with(q=torch.ones(2, 1, 2, 16).requires_grad_()), NotImplementedError, "q requires"),
]


@pytest.mark.parametrize("x, kind, says", BAD, ids=[says for *_, says in BAD])
def test_bad_input_is_refused(x: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"attention_decode: .*{says}"):
        attention_decode(**x())


def test_a_cpu_reads_lengths_and_pages_and_refuses_what_has_no_room() -> None:
    with pytest.raises(ValueError, match="room for 40 positions; got lengths up to 40 and T = 1"):
        plain(**inputs(lengths=[40, 1]))
    x = inputs(page=8, lengths=[20, 30])
    x["block_table"][1, 2] = 99
    with pytest.raises(ValueError, match=r"pages must be from 0 to 10; .*99 for the 31 .* row 1"):
        plain(**x)


def test_a_cache_with_other_strides_takes_plain_pytorch_and_says_why() -> None:
    x = inputs()
    x["k_cache"] = x["k_cache"].transpose(1, 3).contiguous().transpose(1, 3)
    assert_follows(attention_decode, x)
    with pytest.raises(ValueError, match="the triton path is forced, but"), fastgpt.use("triton"):
        attention_decode(**x)
    if INTERPRET:
        assert "D is contiguous" in str(ops.explain(partial(attention_decode, **x))[0])


def test_without_gradient_it_takes_what_requires_it() -> None:
    x = inputs()
    x["q"].requires_grad_()
    with torch.no_grad():
        assert not attention_decode(**x).requires_grad
    with torch.inference_mode():
        attention_decode(**x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_is_new_to_the_caches_dtype(dtype: torch.dtype) -> None:
    x = inputs()
    for n in ("k_cache", "v_cache"):
        x[n] = x[n].to(dtype)
    with torch.autocast("cpu", dtype):
        assert attention_decode(**x).dtype == dtype
