"""Run a function on many items in another process, so that no item can take the others with it.

    apply("fastgpt.lab.traffic:measured", launches, interpret=True, timeout=60.0)

TRITON_INTERPRET is read when a kernel is decorated and ttsem replaces Triton's driver, so what
interprets a kernel cannot do so in the process that compiles it. And a kernel may hang, read
memory that is not there or take all of it: an item that kills the process is named, and a new
process goes on behind it.
"""

import importlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.lab.compile import present
from fastgpt.lab.launch import is_kernel, load, unwrap


@dataclass(frozen=True)
class Failure:
    """Why there is no result for an item, in one line."""

    why: str

    def __str__(self) -> str:
        return self.why


class _Pickler(pickle.Pickler):
    """Pickles a kernel, which a constexpr may be, by the file and name of its function."""

    def persistent_id(self, value: Any) -> str | None:
        if not is_kernel(value):
            return None
        fn = unwrap(value).fn
        return f"{fn.__code__.co_filename}:{fn.__name__}"


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, reference: str) -> Any:
        return load(reference)


def _packed(item: Any) -> bytes | Failure:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(item)
    except Exception as error:
        return Failure(f"cannot be carried to another process; {one_line(error)}")
    return buffer.getvalue()


def one_line(error: BaseException) -> str:
    """What an exception says, and its type where the message may not do without."""
    said = " ".join(str(error).split())[:400]
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"


def apply(
    function: str, items: Sequence[Any], *, interpret: bool = False, timeout: float | None = None
) -> list[Any | Failure]:
    """function(item) for every item, in order, in another process of one thread.

    Args:
        function: "package.module:function".
        interpret: whether kernels run in Triton's interpreter.
        timeout: seconds that one item may take.

    Returns:
        For every item what the function returned, or a Failure that says why it did not.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1" if interpret else "0")
    results: list[Any | Failure] = [_packed(item) for item in items]
    waiting = [i for i, packed in enumerate(results) if isinstance(packed, bytes)]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given"), Path(folder, "made")
        command = [sys.executable, "-m", "fastgpt.lab.child", function, str(given), str(made)]
        command.append(str(timeout or 0.0))
        while waiting:
            given.write_bytes(pickle.dumps([results[i] for i in waiting]))
            made.write_bytes(b"")
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            with made.open("rb") as file:
                while waiting:
                    try:
                        result, why = pickle.load(file)
                    except (EOFError, pickle.UnpicklingError):  # the last one may be cut short
                        break
                    results[waiting.pop(0)] = Failure(why) if why else result
            if waiting:
                results[waiting.pop(0)] = Failure(_last_words(ran, timeout))
    return results


def _last_words(ran: subprocess.CompletedProcess[str], timeout: float | None) -> str:
    """Why a process ended before it was done."""
    if ran.returncode == -signal.SIGALRM:
        return f"gave up after {timeout:.0f} s"
    if ran.returncode < 0:
        return f"the process was ended by {signal.Signals(-ran.returncode).name}"
    last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"the process ended with {ran.returncode}: {last[0]}"


def main(function: str, given: str, made: str, timeout: str) -> None:
    """The other process: results go to a file as they come."""
    where, _, name = function.partition(":")
    run = getattr(importlib.import_module(where), name)
    items: list[bytes] = pickle.loads(Path(given).read_bytes())
    # A kernel's file may ask which chip it is on while it is imported.
    with present("sm_90"), open(made, "wb") as file:
        for packed in items:
            signal.setitimer(signal.ITIMER_REAL, float(timeout))  # 0 is none
            try:
                result = pickle.dumps((run(_Unpickler(io.BytesIO(packed)).load()), None))
            except Exception as error:
                result = pickle.dumps((None, one_line(error)))
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            file.write(result)
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
