"""Text files, the held-out part, token arrays and batches."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import (
    Batches,
    Tokens,
    read_text,
    read_tokens,
    split,
    tokenize,
    unigram_bits,
    write_tokens,
)  # fmt: skip
from fastgpt.tokenizer import Tokenizer


def paragraphs(n: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "\n\n".join(" ".join(map(str, rng.integers(0, 10**6, 20))) for _ in range(n))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"must hold some text; got 0 bytes of it"),
        (b" \n\t", r"must hold some text; got 3 bytes of it"),
        (b"\xef\xbb\xbf", r"must hold some text; got 3 bytes of it"),
        (b"abc\xff\xfe", r"must be UTF-8 text; got byte 0xff at offset 3"),
        (b"\xef\xbb\xbfabc\xff", r"must be UTF-8 text; got byte 0xff at offset 6"),
        ("é".encode("latin-1"), r"must be UTF-8 text; got byte 0xe9 at offset 0"),
        ("好".encode()[:2], r"must be UTF-8 text; got byte 0xe5 at offset 0"),
        ("text".encode("utf-16-le"), r"must be UTF-8 text; got a zero byte at offset 1"),
        (b"\x7fELF\x02\x01\x00", r"must be UTF-8 text; got a zero byte at offset 6"),
    ],
    ids=str,
)
def test_rejects_what_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^text: .*a\.txt {message}$"):
        read_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "白日\r\n".encode())
    assert read_text(path) == "白日\r\n"


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 3),
)
def test_a_split_loses_nothing_and_shares_nothing(
    lengths: list[int], share: float, seed: int
) -> None:
    documents = [paragraphs(n, i) for i, n in enumerate(lengths)]
    total = sum(map(len, documents))
    if total < 2000:
        return
    training, held_out = split(documents, share, seed)
    assert Counter("".join(training + held_out)) == Counter("".join(documents))
    for part in (training, held_out):
        assert all(any(piece in d for d in documents) for piece in part)
    numbers = [set("".join(p + "\n" for p in part).split()) for part in (training, held_out)]
    shared = numbers[0] & numbers[1]  # numbers are drawn from 10**6: a few may coincide
    assert len(shared) <= 0.02 * total / 6 + 3
    assert abs(sum(map(len, held_out)) / total - share) < 0.05 + 300 / total


def test_what_is_held_out_was_not_seen() -> None:
    text = paragraphs(300)
    # Every paragraph stands in a second document as well.
    training, held_out = split([text, *text.split("\n\n")], 0.2)
    seen = "".join(training)
    for document in held_out:
        for paragraph in document.strip().split("\n\n"):
            assert paragraph not in seen


def test_a_split_comes_from_all_over_the_text() -> None:
    text = paragraphs(400)
    _, held_out = split([text], 0.1)
    where = [text.index(piece) / len(text) for piece in held_out]
    assert len(where) >= 5
    assert min(where) < 0.3
    assert max(where) > 0.7


def test_a_split_is_the_same_each_time() -> None:
    text = [paragraphs(100)]
    assert split(text, 0.1, 1) == split(text, 0.1, 1)
    assert split(text, 0.1, 1) != split(text, 0.1, 2)


def test_text_without_spaces_is_divided() -> None:
    training, held_out = split(["白日依山尽，黄河入海流。" * 3 + "欲穷千里目" * 400], 0.1)
    assert training
    assert held_out


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_rejects_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"^split: held_out must lie in \(0, 1\); got"):
        split(["a"], share)


def test_rejects_a_text_too_short_to_divide() -> None:
    with pytest.raises(ValueError, match=r"^split: a text must be long enough.*; got 5 characters"):
        split(["short"])


def test_documents_end_with_the_end_of_text() -> None:
    tokenizer = Tokenizer.train(["ab ab"], 260)
    ids = tokenize(tokenizer, ["ab", "a"])
    assert ids.dtype == np.uint16
    eos = tokenizer.eos
    assert ids.tolist() == [*tokenizer.encode("ab"), eos, *tokenizer.encode("a"), eos]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_tokens_are_mapped_from_their_file(tmp_path: Path, dtype: type) -> None:
    tokens: Tokens = np.arange(1000).astype(dtype)
    write_tokens(tmp_path / "a.npy", tokens)
    read = read_tokens(tmp_path / "a.npy")
    assert isinstance(read, np.memmap)
    assert read.dtype == dtype
    assert np.array_equal(read, tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    x, y = Batches(read, 10, 4)(3)
    assert torch.equal(x + 1, y)


@pytest.mark.parametrize("what", ["text", "floats", "matrix", "objects"])
def test_rejects_a_file_that_holds_no_tokens(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.npy"
    if what == "text":
        path.write_text("not an array")
    elif what == "objects":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(path, np.zeros((2, 2), np.uint16) if what == "matrix" else np.zeros(3))
    with pytest.raises(ValueError, match=r"^tokens: .*a\.npy "):
        read_tokens(path)


@given(
    n=st.integers(2, 400),
    T=st.integers(1, 20),
    B=st.integers(1, 7),
    seed=st.integers(0, 3),
    step=st.integers(0, 50),
)
def test_a_batch_depends_on_seed_and_step_only(
    n: int, T: int, B: int, seed: int, step: int
) -> None:
    if n <= T:
        return
    tokens = np.arange(n, dtype=np.uint16)
    x, y = Batches(tokens, T, B, seed)(step)
    assert x.shape == y.shape == (B, T)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the token after, in this text
    assert int(y.max()) < n
    fresh = Batches(tokens, T, B, seed)
    fresh(step + 1)
    assert torch.equal(fresh(step)[0], x)


def test_an_epoch_visits_every_window_once() -> None:
    batches = Batches(np.arange(1000, dtype=np.uint16), 10, 7, seed=3)
    starts = [int(s) for step in range(40) for s in batches(step)[0][:, 0]]
    n = batches.per_epoch
    for epoch in range(len(starts) // n):
        one = sorted(starts[epoch * n : (epoch + 1) * n])
        assert all(b - a == 10 for a, b in pairwise(one))
    assert n >= 98
    assert starts[:n] != starts[n : 2 * n]


def test_rows_do_not_depend_on_the_size_of_the_batch() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one, four = Batches(tokens, 10, 1), Batches(tokens, 10, 4)
    assert torch.equal(
        torch.cat([one(i)[0] for i in range(8)]), torch.cat([four(0)[0], four(1)[0]])
    )


def test_rejects_a_text_shorter_than_the_context() -> None:
    message = r"^text: it must be longer than the context, block_size 16 tokens; got 16 tokens$"
    with pytest.raises(ValueError, match=message):
        Batches(np.arange(16, dtype=np.uint16), 16, 1)


def test_unigram_bits_is_the_cross_entropy() -> None:
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    p = [4 / 7, 2 / 7, 1 / 7]
    want = -sum(math.log2(x) for x in p) / 3
    assert unigram_bits(train, held_out, 3) == pytest.approx(want)
