"""Files to token shards: what is read, how it is divided, and what is refused."""

import json
import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt import cli
from fastgpt.data import Corpus, DataConfig, Sampler, prepare
from fastgpt.tokenizer import Tokenizer


def words(n: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(str(rng.randrange(10**6)) for _ in range(n))


def text_file(folder: Path, paragraphs: int = 200, name: str = "a.txt") -> str:
    path = folder / name
    path.write_text("\n\n".join(words(20, i) for i in range(paragraphs)), encoding="utf-8")
    return str(path)


def jsonl_file(folder: Path, records: list[Any], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def made(folder: Path, *files: str, **options: Any) -> Corpus:
    config = DataConfig(files=files, vocab_size=300, **options)
    return prepare(config, folder / "corpus", progress=False)


def texts(corpus: Corpus, name: str) -> list[str]:
    """The documents of a part, decoded."""
    part = getattr(corpus, name)
    ids, _ = part.read(0, len(part))
    return [corpus.tokenizer.decode(one) for one in np.split(ids, part.ends[:-1])]


def test_text_becomes_a_corpus_and_loses_nothing(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    corpus = made(tmp_path, path)
    both = texts(corpus, "train") + texts(corpus, "held_out")
    source = Path(path).read_text()
    assert sorted("".join(both)) == sorted(source)
    assert all(one in source for one in both)
    assert corpus.train.bytes + corpus.held_out.bytes == len(source.encode())
    assert abs(corpus.held_out.bytes / len(source) - 0.1) < 0.02
    assert corpus.train.documents > 5  # it is held out from all over
    ids, learn = corpus.train.read(0, len(corpus.train))
    assert learn.all()
    assert int(corpus.token_bytes[ids].sum()) == corpus.train.bytes


def test_what_is_held_out_was_never_seen(tmp_path: Path) -> None:
    paragraphs = [words(20, i % 150) for i in range(600)]  # each comes four times
    random.Random(0).shuffle(paragraphs)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    corpus = made(tmp_path, str(path))
    train = "".join(texts(corpus, "train"))
    held_out = "".join(texts(corpus, "held_out"))
    assert len(train) + len(held_out) < path.stat().st_size / 3.9
    shared = set(train.split("\n\n")) & set(held_out.split("\n\n"))
    assert not {p for p in shared if p.strip()}
    assert corpus.told["repeats_dropped"] == 450
    # The tokenizer has learned from the training part alone.
    again = Tokenizer.train(texts(corpus, "train"), 300)
    assert again.fingerprint == corpus.tokenizer.fingerprint


@pytest.mark.parametrize(
    "deduplicate, kept", [("paragraphs", 50), ("documents", 50), ("none", 200)]
)
def test_records_that_recur(tmp_path: Path, deduplicate: str, kept: int) -> None:
    records = [{"text": words(5, i % 50)} for i in range(200)]
    corpus = made(tmp_path, jsonl_file(tmp_path, records), deduplicate=deduplicate)
    train, held_out = texts(corpus, "train"), texts(corpus, "held_out")
    assert len(train) + len(held_out) == kept
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("deduplicate, times", [("auto", 60), ("paragraphs", 1)])
def test_a_record_stays_whole_unless_its_paragraphs_are_asked_for(
    tmp_path: Path, deduplicate: str, times: int
) -> None:
    footer = "All rights reserved, and some more words than that."
    records = [{"text": f"{words(9, i)}\n\n{footer}"} for i in range(60)]
    corpus = made(tmp_path, jsonl_file(tmp_path, records), deduplicate=deduplicate)
    both = texts(corpus, "train") + texts(corpus, "held_out")
    assert len(both) == 60 and sum(footer in one for one in both) == times
    assert all(one == one.strip() for one in both)


def test_prompts_are_not_learned_and_stay_together(tmp_path: Path) -> None:
    records = [{"prompt": f"Say {i % 40}:", "completion": f" it is {i}."} for i in range(80)]
    corpus = made(tmp_path, jsonl_file(tmp_path, records))
    ids, learn = corpus.train.read(0, len(corpus.train))
    end = corpus.tokenizer.eos
    spoken = corpus.tokenizer.decode(ids[learn & (ids != end)])
    assert "Say" not in spoken and spoken.count(" it is ") == corpus.train.documents
    assert learn[ids == end].all()
    prompts = [{t.split(":")[0] for t in texts(corpus, part)} for part in ("train", "held_out")]
    assert not prompts[0] & prompts[1]


def test_a_chat_teaches_what_the_assistant_says(tmp_path: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i}"},
                {"role": "user", "content": "thanks"},
                {"role": "assistant", "content": "welcome"},
            ]
        }
        for i in range(40)
    ]
    corpus = made(tmp_path, jsonl_file(tmp_path, chats), turn="[{role}] {content}\n")
    ids, learn = corpus.train.read(0, int(corpus.train.ends[0]))
    assert corpus.tokenizer.decode(ids) == (
        "[user] question 0\n[assistant] answer 0\n[user] thanks\n[assistant] welcome\n"
    )
    assert corpus.tokenizer.decode(ids[learn]) == "answer 0\nwelcome\n"


def test_a_separator_makes_documents(tmp_path: Path) -> None:
    stories = [f"{words(8, i)}\n\n{words(8, 1000 + i)}" for i in range(30)]
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(stories))
    corpus = made(tmp_path, str(path), separator="<|endoftext|>")
    assert sorted(texts(corpus, "train") + texts(corpus, "held_out")) == sorted(stories)


@pytest.mark.parametrize("deduplicate", ["paragraphs", "documents", "none"])
def test_held_out_files_are_not_trained_on(tmp_path: Path, deduplicate: str) -> None:
    records = [{"text": words(9, i)} for i in range(60)]
    corpus = made(
        tmp_path,
        jsonl_file(tmp_path, records),
        held_out_files=(jsonl_file(tmp_path, records[50:55], "b.jsonl"),),
        deduplicate=deduplicate,
    )
    assert texts(corpus, "held_out") == [r["text"] for r in records[50:55]]
    assert texts(corpus, "train") == [r["text"] for r in records[:50] + records[55:]]
    assert corpus.told["repeats_dropped"] == 5


def test_a_dataset_is_read_by_its_splits(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    train = [{"text": words(9, i)} for i in range(30)]
    jsonl_file(folder, train, "train.jsonl")
    jsonl_file(folder, [{"text": "held out"}], "validation.jsonl")
    corpus = made(tmp_path, str(folder), format="dataset", held_out_files=(f"{folder}@validation",))
    assert texts(corpus, "train") == [r["text"] for r in train]
    assert texts(corpus, "held_out") == ["held out"]
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"^dataset: .*@test cannot be read; Bad split: test\."):
        made(tmp_path / "b", f"{folder}@test", format="dataset")
    with pytest.raises(ValueError, match=r"^dataset: .*, row 0 must have page, or prompt"):
        made(tmp_path / "b", str(folder), format="dataset", text_field="page")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", r"line 2 must be a JSON object; got Expecting property name .* column 2$"),
        ("[1]", r"line 2 must be a JSON object; got list$"),
        ('{"a": 1}', r"line 2 must have text, or prompt and completion, or messages; got a$"),
        ('{"text": 3}', r"line 2: text must be a string; got int$"),
        ('{"text": "\\ud800"}', r"line 2: text must be valid Unicode; got a lone surrogate"),
        ('{"messages": []}', r"line 2: messages must be a list of at least one message$"),
        ('{"messages": [{"role": "user"}]}', r"line 2: message 0 must have a role and content"),
        ("[" * 100000, r"line 2 must be a JSON object that can be read$"),
        (b'{"text": "\xff"}', r"line 2 must be UTF-8; got byte 0xff at offset 10 of it$"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "fine"}\n' + bad + b'\n{"text": "fine too"}\n')
    with pytest.raises(ValueError, match=rf"^jsonl: .*a\.jsonl, {message}"):
        made(tmp_path, str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"must hold some text; got 0 bytes of it"),
        (b"\xef\xbb\xbf \n", r"must hold some text; got 5 bytes of it"),
        (b"abc\xff\xfe", r"must be UTF-8 text; got byte 0xff at offset 3"),
        (b"x" * (2**20 - 1) + "好".encode()[:2], r"got byte 0xe5 at offset 1048575"),
        ("text".encode("utf-16-le"), r"must be UTF-8 text; got a zero byte at offset 1"),
    ],
    ids=["empty", "blank", "latin", "cut short", "utf-16"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^text: .*a\.txt .*{message}$"):
        made(tmp_path, str(path))


def test_an_empty_or_missing_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        made(tmp_path, str(tmp_path / "nowhere.txt"))
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(ValueError, match=r"^data: files must name at least one; got none$"):
        made(tmp_path)
    empty = tmp_path / "a.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"must hold at least one record; got 2 bytes$"):
        made(tmp_path, str(empty))


def test_too_little_to_hold_some_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A few words.")
    with pytest.raises(ValueError, match=r"^data: there must be enough to hold some of it out"):
        made(tmp_path, str(path))
    with pytest.raises(ValueError, match=r"holds no finished corpus; shards\.json is missing$"):
        Corpus.open(tmp_path / "corpus")


def test_a_finished_corpus_is_opened_and_never_overwritten(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    first = made(tmp_path, path)
    before = (first.folder / "shards.json").read_bytes()
    made(tmp_path, path, packing="documents")  # of no matter to the shards
    os.utime(path)
    made(tmp_path, path)  # touched, yet the same
    with pytest.raises(ValueError, match=r"prepared with held_out 0\.1; got 0\.2; name another"):
        made(tmp_path, path, held_out=0.2)
    text = Path(path).read_text()
    Path(path).write_text(text.replace("1", "2"))
    with pytest.raises(ValueError, match=r"a\.txt changed since .* was prepared from it"):
        made(tmp_path, path)
    Path(path).unlink()
    made(tmp_path, path)  # the corpus is all there is
    assert (first.folder / "shards.json").read_bytes() == before
    opened = prepare(DataConfig(files=(str(first.folder),)), tmp_path / "other", progress=False)
    assert opened.folder == first.folder and not (tmp_path / "other").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    corpus = made(tmp_path, text_file(tmp_path))
    Corpus.open(corpus.folder, Tokenizer.load(corpus.folder / "tokenizer.json"))
    other = Tokenizer.train(["some other text"], 280)
    with pytest.raises(
        ValueError, match=r"holds ids of another tokenizer; got the tokenizer given"
    ):
        Corpus.open(corpus.folder, other)
    other.save(corpus.folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"holds ids of another tokenizer; got .*tokenizer\.json"):
        Corpus.open(corpus.folder)


def test_a_given_tokenizer_makes_the_ids(tmp_path: Path) -> None:
    given = Tokenizer.train([words(500, 7)], 290)
    given.save(tmp_path / "given.json")
    corpus = made(tmp_path, text_file(tmp_path), tokenizer=str(tmp_path / "given.json"))
    assert corpus.tokenizer.fingerprint == given.fingerprint
    assert corpus.vocab_size == given.vocab_size


@pytest.mark.parametrize(
    "damage", ["truncated", "missing", "flipped", "header", "no manifest", "half"]
)
def test_a_damaged_shard_is_found(tmp_path: Path, damage: str) -> None:
    corpus = made(tmp_path, text_file(tmp_path))
    shard = corpus.folder / "train-00000.tokens.npy"
    data = bytearray(shard.read_bytes())
    del corpus
    if damage == "truncated":
        shard.write_bytes(data[:-2])
        message = rf"tokens\.npy is broken: it must have {len(data)} bytes; got {len(data) - 2};"
    elif damage == "missing":
        shard.unlink()
        message = r"tokens\.npy is missing; prepare the corpus anew"
    elif damage == "flipped":
        data[-1] ^= 1
        shard.write_bytes(data)
        message = r"tokens\.npy is broken: its bytes changed since it was written"
    elif damage == "header":
        shard.write_bytes(b"?" * len(data))
        message = r"tokens\.npy is broken; prepare the corpus anew"
    elif damage == "half":
        manifest = shard.parent / "shards.json"
        manifest.write_text(manifest.read_text()[:100])
        message = r"shards\.json is broken; prepare the corpus anew"
    else:
        (shard.parent / "shards.json").unlink()
        message = "holds no finished corpus"
    with pytest.raises(ValueError, match=message):
        Corpus.open(shard.parent, verify=damage == "flipped")


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    whole = made(tmp_path, path)
    (tmp_path / "b").mkdir()
    parts = made(tmp_path / "b", path, shard_bytes=2000)
    assert len(parts.train.shards) > 5
    for name in ("train", "held_out"):
        one, many = getattr(whole, name), getattr(parts, name)
        assert np.array_equal(one.ends, many.ends)
        for a, b in ((0, len(one)), (5, 7), (len(one) // 3, len(one) // 2)):
            for x, y in zip(one.read(a, b), many.read(a, b), strict=True):
                assert np.array_equal(x, y)


def _prepare(folder: Path, path: str) -> None:
    made(folder, path, shard_bytes=3000)


def _prepare_and_die(folder: Path, path: str, moment: int) -> None:
    """Prepare, but die in the middle of it: as the disk is written for the moment-th time."""
    left = moment

    def dying(real: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    _prepare(folder, path)


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    _prepare(whole, path)
    want = {f.name: f.read_bytes() for f in (whole / "corpus").glob("*.*")}
    rng, kills, shards = random.Random(0), 0, []
    fork = multiprocessing.get_context("fork")
    while not (killed / "corpus/shards.json").exists():
        process = fork.Process(target=_prepare_and_die, args=(killed, path, rng.randint(1, 24)))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if (log := killed / "corpus/progress.jsonl").exists():
            if rng.random() < 0.2:  # the power went, and with it the end of the last line
                log.write_bytes(log.read_bytes()[:-5])
            shards.append(len(list((killed / "corpus").glob("train-*.tokens.npy"))))
    _prepare(killed, path)
    got = {f.name: f.read_bytes() for f in (killed / "corpus").glob("*.*")}
    assert kills >= 5 and shards[-1] > 5
    assert got.keys() == want.keys()
    for name, data in want.items():
        assert got[name] == data, name


def _prepare_on_a_full_disk(folder: Path, path: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16000, 16000))  # bytes of a file
    made(folder, path)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_prepare_on_a_full_disk, args=(tmp_path, path))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert (tmp_path / "corpus/tokenizer.json").exists()  # it came as far as the shards
    with pytest.raises(ValueError, match="holds no finished corpus"):
        Corpus.open(tmp_path / "corpus")
    assert not list((tmp_path / "corpus").glob(".*.part"))
    made(tmp_path, path)
    Corpus.open(tmp_path / "corpus", verify=True)


def test_processes_that_prepare_at_once_make_one_corpus(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_prepare, args=(tmp_path, path)) for _ in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    Corpus.open(tmp_path / "corpus", verify=True)


def test_a_prepared_corpus_is_sampled(tmp_path: Path) -> None:
    corpus = made(tmp_path, text_file(tmp_path))
    sampler = Sampler(corpus.train, 32, 4)
    assert corpus.tokenizer.decode(sampler(0).idx[0].tolist()) in Path(
        tmp_path / "a.txt"
    ).read_text() + "".join(texts(corpus, "train"))


def test_a_corpus_made_by_command_trains_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": f"Say {i}:", "completion": f" it is {i}."} for i in range(200)]
    made = ["prepare", jsonl_file(tmp_path, records), "--out", str(tmp_path / "corpus")]
    assert cli.main([*made, "--vocab-size", "300", "--held-out", "0.2"]) == 0
    assert "held out, in 200 documents; 0 repeats left out" in capsys.readouterr().out
    run = ["train", "--data.files", str(tmp_path / "corpus"), "--data.packing", "documents"]
    shape = ["--model.block_size", "32", "--model.n_layer", "1", "--model.n_head", "1"]
    size = ["--model.n_embd", "8", "--batch.rows", "2", "--steps", "2", "--device", "cpu"]
    assert cli.main([*run, *shape, *size, "--out", str(tmp_path / "run")]) == 0
    assert "done: 2 steps" in capsys.readouterr().out
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 7.0
