"""Tokens as a reader can see them: spaces shown, and characters that lie across tokens."""

from collections.abc import Sequence

from fastgpt.tokenizer import Tokenizer

SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u2028": "⏎", "\u2029": "⏎"}


def visible(text: str) -> str:
    """A token's text with its blanks to be seen: ␣ where it begins or ends with a space."""
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text) or "∅"
    ahead = len(text) - len(text.lstrip(" "))
    behind = len(text) - len(text.rstrip(" "))
    text = "␣" * ahead + inner + "␣" * behind
    made = "".join(SHOWN.get(c, c) for c in text)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in made)


def label(tokenizer: Tokenizer, id: int) -> str:
    """One token by itself. Bytes that are no text of their own are shown as bytes: ‹E4 BA›."""
    table = tokenizer.token_bytes
    raw = table[id] if id < len(table) else b""
    if not raw:
        name = tokenizer._inner.id_to_token(id)
        return name if name is not None else f"‹{id}›"
    try:
        return visible(raw.decode())
    except UnicodeDecodeError:
        return f"‹{raw.hex(' ').upper()}›"


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens of a text. One that holds part of a character says which: 世 2/3."""
    table = tokenizer.token_bytes
    raw = [table[id] if id < len(table) else b"" for id in ids]
    try:
        text = b"".join(raw).decode()
    except UnicodeDecodeError:
        return [label(tokenizer, id) for id in ids]
    owner = [c for c in text for _ in c.encode()]  # the character that each byte is of
    begins = [n == 0 for c in text for n in range(len(c.encode()))] + [True]
    parts: list[tuple[int, int]] = []  # bytes that each token spans
    for piece in raw:
        start = parts[-1][1] if parts else 0
        parts.append((start, start + len(piece)))
    made = []
    for id, (start, end) in zip(ids, parts, strict=True):
        if start == end or (begins[start] and begins[end]):
            made.append(label(tokenizer, id))
            continue
        first = max(n for n in range(start + 1) if begins[n])
        last = next(n for n in range(end, len(begins)) if begins[n])
        inside = [n for n, (a, b) in enumerate(parts) if a < last and b > first and a < b]
        here = next(n for n, part in enumerate(parts) if part == (start, end))
        shown = visible("".join(owner[n] for n in range(first, last) if begins[n]))
        made.append(f"{shown} {inside.index(here) + 1}/{len(inside)}")
    return made
