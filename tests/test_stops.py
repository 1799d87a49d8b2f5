"""Text of tokens as they come, whatever the tokens' borders."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.generation.stops import Text

BYTES = [bytes([b]) for b in range(256)]


def by_characters(text: str, stops: list[str]) -> str:
    """The specification: character by character, cut before the first stop that is complete."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


@given(
    text=st.text("ab好", max_size=12),
    stops=st.lists(st.text("ab好", min_size=1, max_size=4), max_size=3),
    borders=st.sets(st.integers(0, 36), max_size=12),
)
def test_it_is_cut_where_it_should_be(text: str, stops: list[str], borders: set[int]) -> None:
    raw = text.encode()
    cuts = [0, *sorted(b for b in borders if b < len(raw)), len(raw)]
    table = [raw[a:b] for a, b in pairwise(cuts)]
    row, said, want = Text(table, stops), "", by_characters(text, stops)
    for id in range(len(table)):
        said += row.feed(id)
        assert want.startswith(said)  # nothing is taken back
        fed = b"".join(table[: id + 1]).decode(errors="ignore")
        if row.stopped is None:
            longest = max(map(len, stops), default=1)
            assert len(fed) - len(said) < longest  # and no more held back than need be
    said += row.finish()
    assert said == str(row) == want
    assert (row.stopped is not None) == (want != text or any(s in text for s in stops))


def test_what_could_be_a_stop_is_held_back_until_it_is_known() -> None:
    row = Text([b"one <", b"|", b"end|", b">", b"b> two"], ["<|end|>"])
    assert [row.feed(id) for id in (0, 1, 2)] == ["one ", "", ""]
    other = Text([b"one <", b"|", b"end|", b">", b"b> two"], ["<|end|>"])
    assert [other.feed(id) for id in (0, 1, 4)] == ["one ", "", "<|b> two"]
    assert row.feed(3) == row.feed(4) == row.finish() == ""
    assert (str(row), row.stopped) == ("one ", "<|end|>")


def test_half_a_character_waits_and_then_is_told() -> None:
    row = Text(BYTES)
    assert [row.feed(b) for b in "好".encode()] == ["", "", "好"]
    assert row.feed(0xE5) == ""
    assert row.finish() == "\ufffd"


@pytest.mark.parametrize("id", [-1, 256, 9999])
def test_an_id_without_bytes_says_nothing(id: int) -> None:
    assert Text(BYTES).feed(id) == ""
