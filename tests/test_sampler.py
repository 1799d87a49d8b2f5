"""Batches by step: the same for any number of ranks, each token once an epoch, documents whole."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Part, Sampler, Shard
from fastgpt.data.packing import pack, stretches
from fastgpt.data.sampler import Shuffle

PACKING = pytest.mark.parametrize("packing", ["concat", "documents"])


def part_of(lengths: list[int]) -> Part:
    """Documents of these lengths, whose ids count on: a token is known by its id."""
    ends = np.cumsum(lengths)
    return Part.of([range(e - n, e) for e, n in zip(ends.tolist(), lengths, strict=True)])


LENGTHS = [3, 17, 1, 40, 8, 8, 25, 2, 90, 5, 33, 12, 9, 64]


@PACKING
def test_every_number_of_ranks_has_the_same_global_batch(packing: str) -> None:
    part = part_of(LENGTHS)
    for step in (0, 1, 7):
        whole = Sampler(part, 16, 4, seed=3, packing=packing)(step)
        for world in (2, 4):
            # Every rank has a sampler of its own, and has seen other steps.
            shares = [
                Sampler(part, 16, 4, seed=3, packing=packing)(step, rank, world)
                for rank in range(world)
            ]
            assert torch.equal(torch.cat([s.idx for s in shares]), whole.idx)
            assert torch.equal(torch.cat([s.targets for s in shares]), whole.targets)
            assert max(s.max_seqlen for s in shares) == whole.max_seqlen
            if packing == "documents":
                cu = [torch.zeros(1, dtype=torch.int32)]
                for s in shares:
                    assert s.cu_seqlens is not None and s.cu_seqlens[-1] == s.idx.numel()
                    cu.append(s.cu_seqlens[1:] + cu[-1][-1])
                assert whole.cu_seqlens is not None
                assert torch.equal(torch.cat(cu), whole.cu_seqlens)


@PACKING
def test_a_step_does_not_depend_on_those_before(packing: str) -> None:
    part = part_of(LENGTHS)
    straight = Sampler(part, 16, 3, packing=packing)
    want = [straight(step) for step in range(20)]
    jumping = Sampler(part, 16, 3, packing=packing)
    for step in (19, 2, 11, 0, 18):
        assert torch.equal(jumping(step).idx, want[step].idx)


@PACKING
def test_a_row_does_not_depend_on_the_size_of_the_batch(packing: str) -> None:
    one, four = (Sampler(part_of(LENGTHS), 16, n, packing=packing) for n in (1, 4))
    rows = torch.cat([one(i).idx for i in range(8)])
    assert torch.equal(rows, torch.cat([four(0).idx, four(1).idx]))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 400),
    T=st.integers(1, 20),
    B=st.integers(1, 7),
    seed=st.integers(0, 3),
    step=st.integers(0, 50),
)
def test_a_window_is_whole_whatever_the_sizes(n: int, T: int, B: int, seed: int, step: int) -> None:
    if n <= T:
        return
    batch = Sampler(part_of([n]), T, B, seed)(step)
    assert batch.idx.shape == (B, T) and batch.idx.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.idx + 1)
    assert 0 <= int(batch.idx.min()) and int(batch.targets.max()) < n


@PACKING
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(packing: str) -> None:
    sampler = Sampler(part_of(LENGTHS), 16, 1, packing=packing)
    n = sampler.per_epoch
    epochs = [[sampler(e * n + i) for i in range(n)] for e in range(2)]
    orders = []
    for batches in epochs:
        seen = Counter(t for b in batches for t in b.targets.flatten().tolist() if t >= 0)
        assert set(seen.values()) == {1}
        orders.append([b.targets.tolist() for b in batches])
        if packing == "documents":
            # All but the first token of each document, which nothing comes before.
            assert len(seen) == sum(LENGTHS) - len(LENGTHS)
    assert orders[0] != orders[1]


@PACKING
def test_targets_are_the_tokens_after(packing: str) -> None:
    batch = Sampler(part_of(LENGTHS), 16, 4, packing=packing)(2)
    on = batch.targets >= 0
    assert torch.equal(batch.targets[on], batch.idx[on] + 1)
    assert on.all() or packing == "documents"


@PACKING
def test_what_is_not_to_be_learned_is_no_target(packing: str) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    learn = tokens % 3 == 0
    shards = [
        Shard(tokens[a:b], np.array([b - a]), np.packbits(learn[a:b]))
        for a, b in ((0, 37), (37, 64), (64, 100))
    ]
    sampler = Sampler(Part(shards), 10, 4, packing=packing)
    for step in range(5):
        targets = sampler(step).targets
        assert (targets[targets >= 0] % 3 == 0).all()
    on = sampler.take(list(range(sampler.windows))).targets
    want = {t for t in range(1, 91 if packing == "concat" else 100) if t % 3 == 0}
    assert set(on[on >= 0].tolist()) == want


def test_documents_are_cut_only_where_they_must() -> None:
    sampler = Sampler(part_of(LENGTHS), 16, 1, packing="documents")
    batch = sampler.take(list(range(sampler.windows)))
    cu = batch.cu_seqlens
    assert cu is not None
    pieces = [
        ids.tolist()
        for ids, targets in zip(
            batch.idx.flatten().tensor_split(cu[1:-1].tolist()),
            batch.targets.flatten().tensor_split(cu[1:-1].tolist()),
            strict=True,
        )
        if targets[0] >= 0
    ]
    ends = np.cumsum(LENGTHS).tolist()
    want = []
    for end, n in zip(ends, LENGTHS, strict=True):
        inputs = list(range(end - n, end - 1))
        want += [inputs[at : at + 16] for at in range(0, n - 1, 16)]
    assert sorted(pieces) == sorted(want)
    assert batch.max_seqlen == 16


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60), T=st.integers(1, 12))
def test_packing_keeps_every_stretch_once_and_overfills_no_row(lengths: list[int], T: int) -> None:
    ends = np.cumsum(lengths).astype(np.int64)
    starts, sizes = stretches(ends, T)
    assert sizes.sum() == sum(max(0, n - 1) for n in lengths)
    packing = pack(starts, sizes, T)
    assert sorted(zip(packing.starts, packing.lengths, strict=True)) == sorted(
        zip(starts, sizes, strict=True)
    )
    assert packing.rows[0] == 0 and packing.rows[-1] == len(sizes)
    filled = [
        int(packing.lengths[a:b].sum())
        for a, b in zip(packing.rows[:-1], packing.rows[1:], strict=True)
    ]
    assert all(0 < n <= T for n in filled)
    # No two rows could be one: at most one is half empty or more.
    assert sum(2 * n <= T for n in filled) <= 1


def test_packing_wastes_little() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 2
    starts, sizes = stretches(np.cumsum(lengths), 1024)
    packing = pack(starts, sizes, 1024)
    assert sizes.sum() / (1024 * (len(packing.rows) - 1)) > 0.999


def test_pieces_that_teach_nothing_are_left_out() -> None:
    """A prompt longer than a row would be a row without a target."""
    tokens = np.arange(40, dtype=np.uint16)
    learn = (tokens >= 18) & (tokens < 20) | (tokens >= 30)
    part = Part(
        [
            Shard(tokens[:20], np.array([20]), np.packbits(learn[:20])),
            Shard(tokens[20:], np.array([5, 20]), np.packbits(learn[20:])),
        ]
    )
    sampler = Sampler(part, 8, 1, packing="documents")
    rows = sampler.take(list(range(sampler.windows)))
    taught = [set(row[row >= 0].tolist()) for row in rows.targets]
    assert all(taught) and set().union(*taught) == set(tokens[learn].tolist())
    assert sampler.windows == 3


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_shuffle_is_a_permutation(n: int) -> None:
    order = Shuffle(n, np.random.default_rng(0))
    whole = order(np.arange(n))
    assert sorted(whole.tolist()) == list(range(n))
    some = np.random.default_rng(1).integers(n, size=5)
    assert np.array_equal(order(some), whole[some])
    other = Shuffle(n, np.random.default_rng(2))(np.arange(n))
    assert n < 16 or not np.array_equal(other, whole)


def test_a_shuffle_is_as_random_as_a_drawn_one() -> None:
    """Where each of 10 numbers lands, and the step from one to the next, over many shuffles."""
    n, draws = 10, 1500
    orders = np.stack(
        [Shuffle(n, np.random.default_rng((5, i)))(np.arange(n)) for i in range(draws)]
    )
    cells = [np.bincount(column, minlength=n) for column in orders.T]
    cells += [np.bincount((orders[:, 1] - orders[:, 0]) % n, minlength=n)[1:]]
    for got in cells:
        want = draws / len(got)
        chi2 = ((got - want) ** 2 / want).sum()
        assert chi2 < 34.0  # the 0.9999 quantile of 9 degrees of freedom is 33.7


def test_errors_say_what_is_wrong() -> None:
    part = part_of(LENGTHS)
    sampler = Sampler(part, 16, 4)
    with pytest.raises(ValueError, match=r"a batch of 4 rows must divide by .*; got 3$"):
        sampler(0, 0, 3)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\) .*; got rank 2, step 0$"):
        sampler(0, 2, 2)
    with pytest.raises(ValueError, match=r"packing must be one of concat, documents; got 'x'$"):
        Sampler(part, 16, 4, packing="x")
    with pytest.raises(ValueError, match=r"rows must be at least 1; got 0$"):
        Sampler(part, 16, 0)
    with pytest.raises(ValueError, match=r"longer than the context, block_size 400 tokens; got"):
        Sampler(part, 400, 1)
    with pytest.raises(ValueError, match=r"must have a document with a token to predict"):
        Sampler(part_of([1, 1]), 4, 1, packing="documents")
