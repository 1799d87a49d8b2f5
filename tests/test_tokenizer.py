"""The tokenizer: nothing is lost, no character is torn, no text turns into a special token."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.tokenizer import EOS, MIN_VOCAB, Tokenizer

ENGLISH = "The cat sat on the mat. The dog sat on the log.\n\n" * 20
CHINESE = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n" * 20
TOKENIZER = Tokenizer.train([ENGLISH, CHINESE], 400)

text = st.text(st.characters(codec="utf-8"), max_size=40)


@given(text)
def test_decode_gives_the_text_back(s: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(s)) == s


@given(text)
def test_the_stream_is_whole_characters(s: str) -> None:
    ids = TOKENIZER.encode(s)
    pieces = list(TOKENIZER.stream(iter(ids)))
    assert "".join(pieces) == s
    assert all(pieces)
    assert "".join(pieces).count("\ufffd") == s.count("\ufffd")


def test_a_character_comes_when_its_last_byte_does() -> None:
    one_byte_each = [TOKENIZER.token_bytes.index(bytes([b])) for b in "é好".encode()]
    fed: list[int] = []

    def feed() -> "object":
        for id in one_byte_each:
            fed.append(id)
            yield id

    assert [(piece, len(fed)) for piece in TOKENIZER.stream(feed())] == [("é", 2), ("好", 5)]  # type: ignore[arg-type]


def test_a_torn_character_is_replaced() -> None:
    ids = [TOKENIZER.token_bytes.index(bytes([b])) for b in "好".encode()[:2]]
    assert TOKENIZER.decode(ids) == "\ufffd"
    assert TOKENIZER.decode([*ids, *TOKENIZER.encode("a")]) == "\ufffda"


def test_learns_the_text_it_is_given() -> None:
    assert len(TOKENIZER.encode(ENGLISH)) < len(ENGLISH) / 3
    assert len(TOKENIZER.encode(CHINESE)) < len(CHINESE) / 2
    assert len(TOKENIZER.encode(" cat")) == 1


def test_has_every_byte_and_the_end_of_text() -> None:
    smallest = Tokenizer.train(["ab"], MIN_VOCAB)
    assert smallest.vocab_size == MIN_VOCAB
    assert smallest.eos is not None
    assert smallest.token_bytes[smallest.eos] == b""
    rest = [b for i, b in enumerate(smallest.token_bytes) if i != smallest.eos]
    assert sorted(rest) == [bytes([b]) for b in range(256)]


def test_the_bytes_of_tokens_are_the_bytes_of_the_text() -> None:
    s = ENGLISH + CHINESE + "\x00\x7f\xad😀"
    assert b"".join(TOKENIZER.token_bytes[i] for i in TOKENIZER.encode(s)) == s.encode()


def test_text_does_not_become_the_end_of_text() -> None:
    ids = TOKENIZER.encode(f"a{EOS}b")
    assert TOKENIZER.eos not in ids
    assert TOKENIZER.decode(ids) == f"a{EOS}b"


def test_the_same_text_gives_the_same_vocabulary(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Tokenizer.train([ENGLISH, CHINESE], 400).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_is_what_it_was_when_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    read = Tokenizer.load(path)
    s = ENGLISH + CHINESE + EOS
    assert read.encode(s) == TOKENIZER.encode(s)
    assert (read.eos, read.vocab_size) == (TOKENIZER.eos, TOKENIZER.vocab_size)
    assert read.token_bytes == TOKENIZER.token_bytes


def test_all_texts_at_once_are_each_text() -> None:
    texts = ["The cat", "", "黄河"]
    assert TOKENIZER.encode_all(texts) == [TOKENIZER.encode(s) for s in texts]


def test_hugging_face_reads_the_file_alike(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    TOKENIZER.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    s = "The dog，黄河 sat"
    assert theirs.encode(s, add_special_tokens=False) == TOKENIZER.encode(s)
    assert theirs.decode(TOKENIZER.encode(s)) == s


def test_rejects_a_vocabulary_without_room_for_every_byte() -> None:
    with pytest.raises(
        ValueError, match=r"^tokenizer: vocab_size must be at least 257.*; got 256$"
    ):
        Tokenizer.train(["a"], 256)


@pytest.mark.parametrize("id", [-1, 400])
def test_rejects_an_id_outside_the_vocabulary(id: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokenizer: an id must lie in .*; got {id}$"):
        TOKENIZER.decode([id])


def test_rejects_a_lone_surrogate() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: text must be valid Unicode.*character 2$"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\xff\xfe\x00", b'{"model": 3}'],
    ids=str,
)
def test_rejects_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^tokenizer: .*tokenizer.json is not a tokenizer.json; "):
        Tokenizer.load(path)


def test_rejects_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1})).save(str(path))
    with pytest.raises(ValueError, match=r"^tokenizer: only byte-level BPE is supported; got None"):
        Tokenizer.load(path)
    assert json.loads(path.read_text())["model"]["type"] == "WordPiece"


def test_the_fingerprint_is_that_of_the_ids(tmp_path: Path) -> None:
    one = Tokenizer.train(["some text, some more text"], 270)
    one.save(tmp_path / "one.json")
    told = json.loads((tmp_path / "one.json").read_text())
    told["padding"] = None
    (tmp_path / "two.json").write_text(json.dumps(told, indent=2))
    assert Tokenizer.load(tmp_path / "two.json").fingerprint == one.fingerprint
    told["model"]["merges"] = told["model"]["merges"][:-1]
    (tmp_path / "two.json").write_text(json.dumps(told))
    assert Tokenizer.load(tmp_path / "two.json").fingerprint != one.fingerprint


def test_markup_has_special_tokens_and_text_has_none() -> None:
    tokenizer = Tokenizer.train(["some text"], 260)
    assert tokenizer.markup("a<|endoftext|>b") == [
        *tokenizer.encode("a"),
        tokenizer.eos,
        *tokenizer.encode("b"),
    ]
    assert tokenizer.eos not in tokenizer.encode("a<|endoftext|>b")
