"""The text of tokens as they come: by whole characters, and cut before a stop string."""

import codecs
from collections.abc import Sequence


class Text:
    """What a row's tokens say so far.

    A token may end within a character of UTF-8, and a stop string may begin in one token and end
    in another. What may still become either is held back until it is known; so what was given out
    is never taken back.

    Args:
        token_bytes: what each id stands for; see `fastgpt.tokenizer.Tokenizer.token_bytes`.
        stop: strings that end the text. It is cut before the one that is complete first; before
            the longest, if two are at once.

    Attributes:
        stopped: the stop string that was found, or None.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self._bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._given: list[str] = []
        self.stopped: str | None = None

    def __str__(self) -> str:
        """All that was given out."""
        return "".join(self._given)

    def feed(self, id: int) -> str:
        """Add a token; the text that is certain now. An id without bytes adds none."""
        known = 0 <= id < len(self._bytes)
        return self._add(self._decoder.decode(self._bytes[id] if known else b""))

    def finish(self) -> str:
        """No token follows: the text that was held back. Bytes of half a character are U+FFFD."""
        given = self._add(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._given.append(rest)
        return given + rest

    def _add(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            given = text[:at]
        else:
            keep = max((_begun(text, s) for s in self._stop), default=0)
            given, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._given.append(given)
        return given


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of a text could be the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
