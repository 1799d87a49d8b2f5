"""What the commands print: texts as they come, tokens with their probabilities, a conversation."""

import contextlib
import sys

from fastgpt.generation.chat import Conversation
from fastgpt.generation.completion import Completion, Writing
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.show import label, width
from fastgpt.tokenizer import Tokenizer

SEPARATOR = "\n---"
HELP = "/reset forgets the conversation; Ctrl-C ends a reply, Ctrl-D leaves"
CONTROL = {c: 0xFFFD for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def stream_out(writing: Writing, text: str, n: int, words: bool) -> None:
    """Print texts as they come: the first at once, each other when those before are done."""
    waiting = [text] * n
    ended = [False] * n
    now = 0
    say(text)
    waiting[0] = ""
    for piece in writing:
        waiting[piece.row] += piece.text if words else f"{piece.id} "
        ended[piece.row] = piece.last
        while now < n:
            say(waiting[now])
            waiting[now] = ""
            if not ended[now]:
                break
            now += 1
            if now < n:
                print(SEPARATOR)
    print()


def say(text: str) -> None:
    """Print some of a text; to a terminal without what would control it."""
    sys.stdout.write(text.translate(CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def listed(one: Completion, tokenizer: Tokenizer | None) -> str:
    """A line for each token."""
    assert one.logprobs is not None and one.top is not None
    names = [label(id, tokenizer) for id in one.ids]
    wide = max((width(name) for name in names), default=0)
    lines = []
    for id, name, logp, top in zip(one.ids, names, one.logprobs, one.top, strict=True):
        others = "  ".join(f"{label(i, tokenizer)} {p:.3f}" for i, p in top)
        pad = " " * (wide - width(name))
        lines.append(f"{id:>7}  {name}{pad}  {logp:8.3f}  {others}".rstrip())
    return "\n".join(lines)


def converse(talk: Conversation, new: int, sampling: Sampling, seed: int) -> None:
    """Answer lines of standard input until it ends, each by at most so many new tokens."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  edits the line

        print(HELP, file=sys.stderr)
    count = 0
    while True:
        try:
            line = _line(terminal)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line is None:
            return
        if line.strip() == "/reset":
            talk.reset()
            note("the conversation is forgotten")
        elif line.strip():
            count += _answer(talk, line, new, sampling, seed + count, terminal)


def _line(terminal: bool) -> str | None:
    """The next line; None at the end."""
    if not terminal:
        raw = sys.stdin.buffer.readline()
        return utf8(raw, "chat: a line of standard input").rstrip("\r\n") if raw else None
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            note("chat: a message must be UTF-8")


def _answer(
    talk: Conversation, line: str, new: int, sampling: Sampling, seed: int, terminal: bool
) -> int:
    """Print the reply to a line; return how many there were."""
    before = talk.forgotten
    try:
        ids = talk.ask(line, new)
    except ValueError as error:
        if not terminal:
            raise
        note(str(error))
        return 0
    if dropped := talk.forgotten - before:
        note(
            f"the oldest messages, {dropped}, are forgotten: the context holds"
            f" {talk.model.config.block_size} tokens"
        )
    # Ctrl-C ends the reply; what was said of it stays in the conversation.
    with contextlib.closing(talk.reply(ids, new, sampling, seed)) as pieces:
        try:
            for piece in pieces:
                say(piece)
        except KeyboardInterrupt:
            if not terminal:
                raise
    print(flush=True)
    return 1


def note(text: str) -> None:
    """Say something that is no model's text."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def utf8(raw: bytes, name: str) -> str:
    """Bytes as text, without a byte-order mark.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be UTF-8; got byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
