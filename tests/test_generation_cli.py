"""fastgpt generate, next and chat: what they print, and the one line of what they refuse."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, beam_search, cli, complete
from fastgpt.generation.chat import Conversation
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.show import entropy, label, next_token, width
from fastgpt.generation.source import turn_of
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer

TEXT = "In year one a fox met nine dogs. 白日依山尽，黄河入海流。"
TOKENIZER = Tokenizer.train([TEXT * 20], 300)
CONTEXT = 64
TURN = "[{role}] {content}\n"


def tiny(context: int = CONTEXT) -> GPT:
    torch.manual_seed(4)
    model = GPT(GPTConfig(context, 300, n_layer=1, n_head=2, n_embd=16))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.eval()


def save(model: GPT, out: Path) -> Path:
    """A run's folder."""
    Checkpointer(out, CheckpointConfig(asynchronous=False)).save(1, model, TOKENIZER)
    (out / "run.yaml").write_text(json.dumps({"data": {"files": ["a.jsonl"], "turn": TURN}}))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Hugging Face's layout, with no tokenizer."""
    out = tmp_path_factory.mktemp("plain")
    tiny().save_pretrained(out)
    return out


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(args) == 0
    return capsys.readouterr().out


class Stdin(io.TextIOWrapper):
    """A pipe with some bytes in it."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")


# --- generate -------------------------------------------------------------------------------------


def test_a_prompt_comes_as_an_argument_a_file_or_a_pipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    rest = ["--model", str(run), "--seed", "5", "--max-new-tokens", "12", "--ignore-eos"]
    ((want,),) = complete(tiny(), ["一个 fox\n"], 12, tokenizer=TOKENIZER, seed=5, temperature=0.8,
                          eos=())  # fmt: skip
    got = said(capsys, "generate", "一个 fox\n", *rest)
    assert got == "一个 fox\n" + want.text + "\n"
    assert said(capsys, "generate", "--prompt", "一个 fox\n", *rest) == got
    assert said(capsys, "generate", "--prompt=- a", *rest).startswith("- a")
    file = tmp_path / "prompt.txt"
    for raw in ("一个 fox\n\n".encode(), "\ufeff一个 fox\n\n".encode()):
        file.write_bytes(raw)
        assert said(capsys, "generate", "--file", str(file), *rest) == got
    monkeypatch.setattr(sys, "stdin", Stdin("一个 fox\n\n".encode()))
    assert said(capsys, "generate", "--file", "-", *rest) == got
    ids = ",".join(map(str, TOKENIZER.encode("一个 fox\n")))
    assert said(capsys, "generate", "--ids", ids, *rest).endswith(want.text + "\n")


def test_samples_are_those_of_their_seeds_in_order(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", str(run), "--max-new-tokens", "20", "--top-p", "0.95", "--stop", "o"]
    texts = said(capsys, "generate", "a", *rest, "--n", "4", "--seed", "7").split("\n---\n")
    assert len({len(t) for t in texts}) > 1  # of different lengths, told one after the other
    for k, text in enumerate(texts):
        alone = said(capsys, "generate", "a", *rest, "--seed", str(7 + k))
        assert alone.rstrip("\n") == text.rstrip("\n")
        assert "o" not in text


def test_json_has_it_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "fox", "--model", str(run), "--json", "--max-new-tokens", "6"]
    told = json.loads(said(capsys, *args, "--n", "2", "--seed", "3", "--logprobs", "2"))
    (want,) = complete(tiny(), ["fox"], 6, tokenizer=TOKENIZER, n=2, seed=3, logprobs=2,
                       temperature=0.8)  # fmt: skip
    assert told["prompt"] == "fox" and told["ids"] == TOKENIZER.encode("fox")
    for got, one in zip(told["completions"], want, strict=True):
        assert (got["text"], got["ids"], got["ended"]) == (one.text, one.ids, one.ended)
        assert got["logprobs"] == pytest.approx(one.logprobs, abs=1e-5)
        assert [len(top) for top in got["top"]] == [2] * len(one.ids)
    beams = json.loads(said(capsys, *args, "--beams", "3", "--n", "2", "--length-penalty", "0.5",
                            "--early-stopping", "never", "--stop-id", "9"))  # fmt: skip
    (best,) = beam_search(
        tiny(), ["fox"], 6, tokenizer=TOKENIZER, beams=3, n=2, length_penalty=0.5,
        early_stopping="never", eos=[9, TOKENIZER.eos or 0],
    )  # fmt: skip
    assert [one["ids"] for one in beams["completions"]] == [one.ids for one in best]
    assert [one["score"] for one in beams["completions"]] == pytest.approx(
        [one.score for one in best], abs=1e-4
    )


def test_a_draft_gives_the_same_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "fox fox fox", "--model", str(run), "--temperature", "0"]
    want = said(capsys, *args)
    assert (
        said(capsys, *args, "--draft", "lookup") == said(capsys, *args, "--draft", str(run)) == want
    )


def test_logprobs_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "fox", "--model", str(run), "--seed", "3", "--max-new-tokens", "6"]
    ((one,),) = complete(tiny(), ["fox"], 6, tokenizer=TOKENIZER, seed=3, logprobs=0,
                         temperature=0.8)  # fmt: skip
    out = said(capsys, *args, "--logprobs", "1")
    assert one.logprobs is not None
    lines = out.splitlines()[-len(one.ids) :]
    for line, id, logp in zip(lines, one.ids, one.logprobs, strict=True):
        assert line.split()[0] == str(id)
        assert f"{logp:.3f}" in line and label(id, TOKENIZER) in line


def test_ids_do_without_a_tokenizer(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(plain), "--ids", "5 6,7"]
    got = said(capsys, "generate", *args, "--max-new-tokens", "5", "--temperature", "0")
    ((want,),) = complete(tiny(), [[5, 6, 7]], 5, temperature=0.0)
    assert [int(id) for id in got.split()] == want.ids
    assert "300" in said(capsys, "next", *args, "--top", "3")


def test_a_text_slides_past_the_context(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "白日" * 60, "--model", str(run), "--seed", "0", "--ignore-eos", "--json"]
    told = json.loads(said(capsys, *args, "--overflow", "slide", "--max-new-tokens", "90"))
    assert len(told["ids"]) > CONTEXT and len(told["completions"][0]["ids"]) == 90


# --- next -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_next_is_the_output_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = tiny(), TOKENIZER.encode("人工智能将")
    p = model(torch.tensor([ids]))[0, -1].double().softmax(-1)
    told = json.loads(said(capsys, "next", "人工智能将", "--model", str(run), "--json"))
    values, order = p.topk(10)
    assert [one["id"] for one in told["next"]] == order.tolist()
    assert [one["p"] for one in told["next"]] == pytest.approx(values.tolist(), rel=1e-4)
    bits = float(-(p * p.log()).sum())
    assert told["entropy"] == pytest.approx(bits, rel=1e-4)
    lines = said(capsys, "next", "人工智能将", "--model", str(run), "--top", "4").splitlines()
    for rank, line in enumerate(lines[1:5], 1):
        found = re.fullmatch(r" *(\d+)  (.*?) +(\d+) +([\d.]+) %  ([█▏▎▍▌▋▊▉]+)", line)
        assert found is not None, line
        id = int(found[3])
        assert (int(found[1]), id) == (rank, int(order[rank - 1]))
        assert found[2] == label(id, TOKENIZER)
        assert float(found[4]) == pytest.approx(100.0 * float(p[id]), abs=0.006)
    assert len({width(line.split(" %")[0]) for line in lines[1:6]}) == 1  # in columns
    assert "296 others" in lines[5]
    assert lines[6].startswith(f"entropy {bits / 0.6931472:.2f} bits")


def test_next_of_what_sampling_leaves() -> None:
    model, ids = tiny(), [5, 6]
    found = next_token(model, ids, 99, None, Sampling(top_k=7))
    assert len(found.likeliest) == found.possible == 7
    assert sum(one.p for one in found.likeliest) == pytest.approx(1.0)
    assert entropy(torch.full((8,), 0.125)) == pytest.approx(3 * 0.6931472)


@pytest.mark.parametrize(
    "raw, shown",
    [
        (b" the", '" the"'),
        (b'"\n\t\\', r'"\"\n\t\\"'),
        ("尽".encode(), '"尽"'),
        ("尽".encode()[:2], '"<e5 b0>"'),
        ("尽a".encode()[2:], '"<bd>a"'),
        (b"a" + "尽".encode()[:1], '"a<e5>"'),
        (b"\x1b[31m", r'"\x1b[31m"'),
        (b"'s", '"\'s"'),
    ],
)
def test_tokens_are_shown_readably(raw: bytes, shown: str) -> None:
    class One:
        token_bytes = (raw,)

    assert label(0, One()) == shown  # type: ignore[arg-type]


def test_special_tokens_are_shown_by_name() -> None:
    assert label(TOKENIZER.eos or 0, TOKENIZER) == "<|endoftext|>"
    assert label(9999, TOKENIZER) == "no token"
    assert label(7, None) == "7"


def test_next_is_plotted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "next.png"
    assert cli.main(["next", "山$^", "--model", str(run), "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]  # no empty boxes


# --- chat -----------------------------------------------------------------------------------------


def talk(model: GPT | None = None, **options: Any) -> Conversation:
    return Conversation(model or tiny(), TOKENIZER, options.pop("turn", TURN), **options)


def test_a_conversation_is_written_as_in_training() -> None:
    from fastgpt.data.config import DataConfig
    from fastgpt.data.documents import document_of

    said = talk(tiny(128), system="be")
    said.messages = [("user", "a fox"), ("assistant", "met nine")]
    ids = said.ask("dogs", 8)
    messages = [{"role": r, "content": c} for r, c in [("system", "be"), *said.messages]]
    segments = document_of("x", {"messages": [*messages, {"role": "assistant", "content": "y"}]},
                           DataConfig(turn=TURN))  # fmt: skip
    trained = [
        id for s in segments
        for id in (TOKENIZER.markup(s.text) if s.markup else TOKENIZER.encode(s.text))
    ]  # fmt: skip
    assert trained[: len(ids)] == ids
    assert (
        TOKENIZER.decode(ids)
        == "[system] be\n[user] a fox\n[assistant] met nine\n[user] dogs\n[assistant] "
    )


def test_the_oldest_messages_go_and_the_system_stays() -> None:
    said = talk(system="be")
    for n in range(12):
        said.messages.append(("assistant", f"no {n}")) if n else None
        ids = said.ask(f"dogs {n}", 20)
        assert len(ids) <= CONTEXT - 20
        assert TOKENIZER.decode(ids).startswith("[system] be\n[user] ")
        assert said.messages[-1] == ("user", f"dogs {n}")
        assert len(said.messages) + said.forgotten == 2 * n + 1
    assert said.forgotten > 0
    before = list(said.messages)
    with pytest.raises(ValueError, match=r"^chat: a message must leave room .* 64 tokens; got"):
        said.ask("dogs " * 60, 20)
    assert said.messages == before


class Says(GPT):
    """A model that is sure of what comes next, whatever came before."""

    script: list[int]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        sure = torch.zeros(*hidden.shape[:-1], 300)
        sure[..., self.script.pop(0)] = 100.0
        return sure


@pytest.mark.parametrize(
    "turn, script, reply",
    [
        (TURN, "met nine dogs\n[user] and", "met nine dogs"),
        (TURN, "met\n\nnine\n<|endoftext|>", "met\n\nnine"),
        ("<|{role}|>\n{content}\n", "a fox\n<|system|>\nx", "a fox"),
        ("{content}<|endoftext|>", "a fox<|endoftext|>more", "a fox"),
    ],
)
def test_a_reply_ends_where_its_turn_does(turn: str, script: str, reply: str) -> None:
    model = Says(tiny().config)
    model.script = TOKENIZER.markup(script)
    said = talk(model, turn=turn)
    pieces = list(said.reply(said.ask("dogs", 30), 30, Sampling(), 0))
    assert "".join(pieces) == reply
    assert said.messages == [("user", "dogs"), ("assistant", reply)]


def test_the_turn_is_that_of_the_training(run: Path, plain: Path, tmp_path: Path) -> None:
    assert turn_of(run) == turn_of(run / "step-00000001") == TURN
    assert turn_of(plain) == turn_of("somebody/model") == "<|{role}|>\n{content}\n"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    told = {
        "version": 1,
        "tokenizer": {"fingerprint": ""},
        "shards": [],
        "asked": {"turn": "{role}{content}"},
    }
    (corpus / "shards.json").write_text(json.dumps(told))
    other = save(tiny(), tmp_path / "run")
    (other / "run.yaml").write_text(json.dumps({"data": {"files": [str(corpus)], "turn": "x"}}))
    assert turn_of(other) == "{role}{content}"


def test_a_piped_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def run_with(raw: bytes, *more: str) -> Any:
        monkeypatch.setattr(sys, "stdin", Stdin(raw))
        args = ["chat", "--model", str(run), "--seed", "2", "--max-new-tokens", "12", *more]
        code = cli.main(args)
        return code, *capsys.readouterr()

    code, out, err = run_with(b"dogs\n")
    assert (code, err) == (0, "")
    want = talk()
    ids = want.ask("dogs", 12)
    assert out == "".join(want.reply(ids, 12, Sampling(0.8), 2)) + "\n"
    again, twice, notes = run_with(b"dogs\n\n/reset\nfox\n" + b"nine dogs\n" * 4)
    assert again == 0 and twice.startswith(out)
    assert "[the conversation is forgotten]" in notes
    assert re.search(r"\[the oldest messages, \d, are forgotten: .* holds 64 tokens\]", notes)


class Terminal:
    """`fastgpt chat` on a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt", "chat", *args],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, done: Callable[[str], bool]) -> str:
        """What it says from now until that is enough."""
        said, deadline = "", time.monotonic() + 60
        while not done(said):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    more = os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # as Linux says that the other side has closed
                    raise AssertionError(f"it has left: {self.seen}") from None
                said += more
                self.seen += more
        return said

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C ends a reply, and a line; Ctrl-D leaves."""
    out = save(tiny(8192), tmp_path / "run")
    terminal = Terminal(
        "--model", str(out), "--max-new-tokens", "4000", "--turn", "{role}{content}"
    )
    try:
        terminal.until(lambda said: said.endswith("> "))
        terminal.type(b"a fox\n")
        terminal.until(lambda said: len(said) > 100)  # of thousands
        terminal.type(b"\x03")
        reply = terminal.until(lambda said: said.endswith("\n> "))
        assert "Traceback" not in reply
        time.sleep(0.3)  # input() shows its prompt a moment before it reads
        terminal.type(b"half a line\x03")
        terminal.until(lambda said: said.endswith("\n> "))
        terminal.type(b"/reset\n")
        terminal.until(
            lambda said: "[the conversation is forgotten]" in said and said.endswith("> ")
        )
        terminal.type(b"\x04")
        assert terminal.process.wait(30) == 0
        assert "Traceback" not in terminal.seen
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


# --- what is refused ------------------------------------------------------------------------------

LONG = "白日依山尽" * 40
REFUSED: list[tuple[list[str], str]] = [
    # prompts
    (["generate", LONG], "generate: prompt and new tokens must fit the context, block_size 64; go"),
    (["generate", "a", "--max-new-tokens", "64"], "generate: prompt and new tokens must fit the"),
    (["next", LONG], "next: the prompt must fit the context, block_size 64; got"),
    (["next"], "next: there must be a prompt; got none"),
    (["generate", "a\udc80b"], "generate: the prompt must be UTF-8; got byte 0x80 at character 1"),
    (["next", "\udcff"], "generate: the prompt must be UTF-8; got byte 0xff at character 0"),
    (["generate", "a", "--stop", "\udc80"], "generate: --stop must be UTF-8; got byte 0x80 at cha"),
    (["chat", "--system", "\udc80"], "generate: --system must be UTF-8; got byte 0x80 at characte"),
    (["generate", "--file", "BAD"], "generate: BAD must be UTF-8; got byte 0xff at offset 2"),
    (["next", "--file", "-"], "generate: standard input must be UTF-8; got byte 0xff at offset 1"),
    (["chat"], "chat: a line of standard input must be UTF-8; got byte 0xff at offset 1"),
    (["generate", "--file", "/none.txt"], "file: /none.txt cannot be used; no such file or direct"),
    (["generate", "a", "--file", "x"], "fastgpt generate: argument --file: not allowed with argum"),
    # ids
    (["generate", "--ids", "1,300"], "generate: ids must lie in the vocabulary, 0 to 299; got 300"),
    (["generate", "--ids=-1"], "generate: ids must lie in the vocabulary, 0 to 299; got -1"),
    (["generate", "--ids", "one"], "generate: --ids must be whole numbers; got 'one'"),
    (["generate", "--ids", ""], "generate: a prompt must be at least one token; got none"),
    (["generate", "a", "--stop-id", "300"], "generate: eos must lie in the vocabulary, 0 to 299;"),
    # sampling
    (["generate", "--max-new-tokens", "-1"], "generate: max_new_tokens must not be negative; got"),
    (["generate", "--temperature", "-1"], "generate: temperature must be 0 or more, and finite; g"),
    (["chat", "--temperature", "nan"], "generate: temperature must be 0 or more, and finite; got"),
    (["generate", "--top-k", "0"], "generate: top_k must be at least 1; got 0"),
    (["next", "a", "--top-p", "2"], "generate: top_p must lie in (0, 1]; got 2.0"),
    (["generate", "--min-p", "-0.1"], "generate: min_p must lie in [0, 1]; got -0.1"),
    (["generate", "--repetition-penalty", "0"], "generate: repetition_penalty must be positive, a"),
    (["generate", "--temperature", "0", "--top-k", "5"], "generate: temperature 0 takes the likel"),
    (["generate", "--seed", "-5"], "generate: a seed must not be negative; got -5"),
    (["chat", "--seed", "-5"], "chat: a seed must not be negative; got -5"),
    (["generate", "--n", "0"], "generate: n must be at least 1; got 0"),
    (["generate", "--logprobs", "301"], "generate: logprobs must be from 0 to 300; got 301"),
    (["generate", "--stop", ""], "generate: stop must be a list of strings, none empty; got ['']"),
    (["generate", "--overflow", "slide"], "generate: a text that slides needs max_new_tokens; got"),
    (["next", "a", "--top", "0"], "next: top must be at least 1; got 0"),
    (["chat", "--max-new-tokens", "0"], "chat: max_new_tokens must be at least 1; got 0"),
    # beams
    (["generate", "--beams", "0"], "beam_search: beams must be at least 1; got 0"),
    (["generate", "--beams", "2", "--n", "3"], "beam_search: n must be from 1 to beams, 2; got 3"),
    (["generate", "--beams", "2", "--temperature", "1"], "generate: --beams draws nothing and goe"),
    (["generate", "--beams", "2", "--top-p", "0.9"], "generate: --beams draws nothing and goes wi"),
    (["generate", "--beams", "2", "--seed", "1"], "generate: --beams draws nothing and goes with"),
    (["generate", "--beams", "2", "--stop", "x"], "generate: --beams ends at tokens, by --stop-id"),
    (["generate", "--beams", "2", "--overflow", "slide"], "generate: --beams goes with no --overf"),
    (["generate", "--length-penalty", "2"], "generate: --length-penalty is of beams; give --beams"),
    (["generate", "--early-stopping", "no"], "generate: --early-stopping is of beams; give --beam"),
    (["generate", "--beams", "2", "--max-new-tokens", "0"], "beam_search: max_new_tokens must be"),
    (["generate", "--draft", "lookup", "--beams", "2"], "generate: --draft goes with no --beams"),
    (["generate", "a", "--draft", "/none"], "from_pretrained: /none cannot be read; No such file"),
    # models
    (["generate", "a", "--model", "/none"], "from_pretrained: /none cannot be read; No such file"),
    (["generate", "a", "--model", "BAD"], "from_pretrained: BAD "),
    (["next", "a", "--model", "EMPTY"], "from_pretrained: EMPTY must hold config.json, and model."),
    (["chat", "--model", "PLAIN"], "generate: text needs a tokenizer, and PLAIN has none that can"),
    (["generate", "a", "--tokenizer", "BAD"], "tokenizer: BAD is not a tokenizer.json; "),
    (["generate", "a", "--tokenizer", "/none"], "file: /none cannot be used; no such file or dire"),
    (["generate", "--device", "cuda:99"], "train: the device must be one that is here; got 'cuda:"),
    (["chat", "--turn", "x"], "data: turn must hold {content} once, and {role} before it only; go"),
]  # fmt: skip


@pytest.mark.parametrize(
    "args, message", REFUSED, ids=lambda v: ascii(v) if isinstance(v, list) else ""
)
def test_refuses(
    run: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any,
    args: list[str], message: str,
) -> None:  # fmt: skip
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    bad.write_bytes(b"ab\xff")
    empty.mkdir()
    named = {"BAD": str(bad), "EMPTY": str(empty), "PLAIN": str(plain)}
    for name, path in named.items():
        message = message.replace(name, path)
    args = [named.get(arg, arg) for arg in args]
    if "--model" not in args:
        args += ["--model", str(run)]
    monkeypatch.setattr(sys, "stdin", Stdin(b"a\xff\n"))
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(message)


def test_without_a_model_the_demos_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["next", "a"]) == 2
    assert capsys.readouterr().err == (
        "generate: there is no runs/demo, which `fastgpt demo` makes; name another by --model\n"
    )
    save(tiny(), tmp_path / "runs" / "demo")
    assert "entropy" in said(capsys, "next", "a")
