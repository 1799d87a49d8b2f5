"""A conversation with a model, in the form that `fastgpt train` gives to messages."""

from collections.abc import Generator
from dataclasses import dataclass, field

from fastgpt.data.documents import Segment, chat
from fastgpt.generation.completion import Writing
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
USER, ASSISTANT = ROLES[1:]


@dataclass
class Conversation:
    """Messages, as many of the newest as the context holds.

    Attributes:
        model, tokenizer: who answers.
        turn: how a message is written, see `fastgpt.data.DataConfig`.
        system: what stands before all messages and is never forgotten, if given.
        messages: roles and contents.
        forgotten: how many messages were dropped, as they no longer fit.
    """

    model: GPT
    tokenizer: Tokenizer
    turn: str
    system: str | None = None
    messages: list[tuple[str, str]] = field(default_factory=list)
    forgotten: int = 0

    def __post_init__(self) -> None:
        before, after = self.turn.split("{content}")
        opened = [after + before.replace("{role}", role) for role in ROLES]
        self._stop = sorted({stop.rstrip() for stop in opened} - {""})
        # A special token has no text to stop at: it stops by its id.
        self._stop_ids = {
            ids[0] for ids in map(self.tokenizer.markup, opened)
            if ids and not self.tokenizer.token_bytes[ids[0]]
        }  # fmt: skip
        if self.tokenizer.eos is not None:
            self._stop_ids.add(self.tokenizer.eos)
        self._after = after

    def ask(self, content: str, new: int) -> list[int]:
        """Add a message of the user's, and drop the oldest until a reply of new tokens has room.

        Returns:
            The ids that the reply follows.

        Raises:
            ValueError: the message alone does not fit; it is not added.
        """
        held = [*self.messages, (USER, content)]
        dropped = 0
        while len(ids := self._ids(held)) > self.model.config.block_size - new:
            if len(held) == 1:
                raise ValueError(
                    "chat: a message must leave room for a reply in the context of"
                    f" {self.model.config.block_size} tokens; got {len(ids)} and {new} for the"
                    " reply"
                )
            # A reply goes with what it replied to.
            n = next((n for n in range(1, len(held)) if held[n][0] == USER), 1)
            held, dropped = held[n:], dropped + n
        self.messages, self.forgotten = held, self.forgotten + dropped
        return ids

    def reply(self, ids: list[int], new: int, sampling: Sampling, seed: int) -> Generator[str]:
        """Answer, piece by piece; what was said until the iterator ends or is closed is kept."""
        writing = Writing(
            self.model, [ids], new, tokenizer=self.tokenizer, sampling=sampling, seed=seed,
            eos=sorted(self._stop_ids), stop=self._stop,
        )  # fmt: skip
        held, after = "", self._after
        try:
            for piece in writing:
                # What ends a message may come before an end of text, and is none of the reply.
                held += piece.text
                keep = max(n for n in range(len(after) + 1) if held.endswith(after[:n]))
                if told := held[: len(held) - keep]:
                    yield told
                held = held[len(held) - keep :]
            if held != after:
                yield held
        finally:
            ((one,),) = writing.completions()
            self.messages.append((ASSISTANT, one.text.removesuffix(after)))

    def reset(self) -> None:
        """Forget all messages."""
        self.messages, self.forgotten = [], 0

    def _ids(self, messages: list[tuple[str, str]]) -> list[int]:
        """What a reply to the messages follows."""
        system = [] if self.system is None else [(ROLES[0], self.system)]
        told = [{"role": role, "content": content} for role, content in [*system, *messages]]
        segments = [*chat("chat", told, self.turn)]
        opening = self.turn.split("{content}")[0].replace("{role}", ASSISTANT)
        encode = self.tokenizer
        return [
            id for s in [*segments, Segment(opening, markup=True)] if s.text
            for id in (encode.markup(s.text) if s.markup else encode.encode(s.text))
        ]  # fmt: skip
