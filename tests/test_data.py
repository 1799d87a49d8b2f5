"""Text files and the held-out part."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import read_text, split, unigram_bits


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
    with pytest.raises(ValueError, match=r"^data: held_out must lie in \(0, 1\); got"):
        split(["a"], share)


def test_rejects_a_text_too_short_to_divide() -> None:
    with pytest.raises(ValueError, match=r"^split: a text must be long enough.*; got 5 characters"):
        split(["short"])


def test_unigram_bits_is_the_cross_entropy() -> None:
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    p = [4 / 7, 2 / 7, 1 / 7]
    want = -sum(math.log2(x) for x in p) / 3
    assert unigram_bits(train, held_out, 3) == pytest.approx(want)
