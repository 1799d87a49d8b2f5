"""A `players.Player` in a process of its own, so that its memory is its own too.

Threads, allocators and peak memory of one provider are not another's; and one that runs out of
memory ends alone. The parent says what to do, one word at a time; only one child works at a time.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench.case import Start
from fastgpt.bench.players import Player, Role, player

FAULTS = (RuntimeError, ValueError, TypeError, ImportError, OSError)


class Said(RuntimeError):
    """What went wrong in a child, in a line that says it whole."""


class Child:
    """A `Player` that a child process has. The first question starts it; `close` ends it."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._process: Any = None
        self._end: Connection | None = None

    def _open(self) -> Connection:
        if self._end is None:
            spawn = multiprocessing.get_context("spawn")
            self._end, theirs = spawn.Pipe()
            arguments = (theirs, self._role, torch.get_num_threads())
            self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
        return self._end

    def ask(self, word: str, given: Any = None) -> Any:
        """Raises Said if it raised there, or if its process ended."""
        end = self._open()
        try:
            end.send((word, given))
        except OSError:
            pass  # what it ended with comes next
        return self._answer(end)

    def _answer(self, end: Connection) -> Any:
        try:
            good, answer = end.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            why = f"its process ended with code {code}"
            if code is not None and code < 0:
                why = f"its process was ended by {signal.Signals(-code).name}"
                if code == -signal.SIGKILL:
                    why += ", as one is that takes more memory than there is"
            raise Said(why) from None
        if not good:
            raise Said(answer)
        return answer

    def ready(self) -> None:
        """Returns when the model is made."""
        self.ask("ready")

    def values(self) -> dict[str, Tensor]:
        return {n: torch.from_numpy(v) for n, v in self.ask("values").items()}

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.ask("logits", ids.numpy()))

    def start(self) -> Start:
        self.ask("start")
        return lambda: self.ask("call")

    def saved(self) -> int | None:
        found: int | None = self.ask("saved")
        return found

    def memory(self) -> tuple[int | None, int | None]:
        """In one more call: bytes that came to what lay there before `start`, and all in all.

        Looked at every two milliseconds: not every kernel keeps a process's highest.
        """
        end = self._open()
        most = resident(self._process.pid) or 0
        end.send(("call", None))
        while not end.poll(0.002):
            most = max(most, resident(self._process.pid) or 0)
        self._answer(end)
        before = self.ask("before")
        return (most - before if most and before else None), most or None

    def close(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None


def _serve(end: Connection, role: Role, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    there: Player | None = None
    call: Start | None = None
    before: int | None = None
    while True:
        try:
            word, given = end.recv()
        except (EOFError, OSError):
            return
        answer: Any = None
        try:
            there = there or player(role)
            if word == "values":
                answer = {n: _plain(t) for n, t in there.values().items()}
            elif word == "logits":
                answer = _plain(there.logits(torch.from_numpy(given)))
            elif word == "start":
                _give_back()
                before = resident(os.getpid())
                call = there.start()
            elif word == "call" and call is not None:
                call()
            elif word == "saved":
                answer = there.saved()
            elif word == "before":
                answer = before
        except FAULTS as error:
            end.send((False, first_line(error)))
        else:
            end.send((True, answer))


def _give_back() -> None:
    """What making the model took beyond it goes back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def _plain(tensor: Tensor) -> Any:
    return (tensor if tensor.dtype == torch.int64 else tensor.float()).detach().cpu().numpy()


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Said) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def resident(process: int) -> int | None:
    """Bytes of a process that lie in memory; None where this cannot be asked."""
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
