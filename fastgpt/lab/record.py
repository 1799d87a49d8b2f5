"""Launches that somebody's own program makes, written down as specs.

The program, or a pytest run, is executed under ttsem's stand-in for a GPU: device="cuda" works
and every kernel really runs, on the CPU. Its launches become a YAML file for the lab.
"""

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fastgpt.lab import semantics
from fastgpt.lab.files import write_whole
from fastgpt.lab.launch import DescriptorArg, Launch, TensorArg


def to_mapping(launch: Launch) -> dict[str, Any]:
    """A launch as a spec that YAML can hold.

    Raises:
        ValueError: a constexpr is a function, which cannot be written.
    """

    def said(name: str, value: Any) -> Any:
        if isinstance(value, TensorArg):
            made: dict[str, Any] = {"tensor": str(value)}
            if value.strides is not None:
                made["strides"] = list(value.strides)
            if value.offset:
                made["offset"] = value.offset
            if value.values is not None:
                made["values"] = list(value.values)
            return made if len(made) > 1 else made["tensor"]
        if isinstance(value, DescriptorArg):
            return {"descriptor": str(value.base), "block": list(value.block)}
        if type(value).__module__.startswith("triton.language"):
            return f"tl.{value.name if hasattr(value, 'name') else value}"
        if callable(value):
            raise ValueError(f"record: {launch.name} takes a function as {name}")
        return value

    spec = {
        "kernel": launch.kernel,
        "name": launch.name,
        "args": {name: said(name, value) for name, value in launch.args.items()},
        "grid": list(launch.grid or ()),
        "options": {k: v for k, v in launch.options.items() if isinstance(v, (bool, int, str))},
    }
    return spec


def _signature(launch: Launch) -> str:
    """What tells two launches apart: shapes and values, not where tensors lie."""
    return repr((launch.kernel, launch.args, launch.grid, launch.options))


def run(program: Sequence[str], out: str | Path) -> int:
    """Run a program and write what it launches to out, each distinct launch once.

    It runs in a process of its own, since the stand-in changes what torch.cuda says for good.

    Args:
        program: a script and its arguments; "-m" and a module and its; "pytest" and its.
        out: a YAML file; is written whole, also when the program fails later on.

    Returns:
        How many launches were written.

    Raises:
        ValueError: the program is not there, or launches nothing.
        ImportError: ttsem is not installed, or Triton too old for it.
    """
    words = _words(program)
    if not semantics.available():
        raise ImportError(f"record: {semantics.MISSING}")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "fastgpt.lab.record", str(answer), *words]
        code = subprocess.run(command).returncode
        if not answer.is_file():
            raise ValueError(f"record: {' '.join(program)} ended its process, with code {code}")
        found, failed = json.loads(answer.read_text())
    if not found:
        why = f": {failed}" if failed else ""
        raise ValueError(f"record: {' '.join(program)} launched no kernel{why}")
    if failed:
        print(f"record: the program failed: {failed}", file=sys.stderr)
    text = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=100)
    write_whole(out, text)
    return len(found)


def _words(program: Sequence[str]) -> list[str]:
    """ "-m MODULE ..." or "SCRIPT ..." of what a person says.

    Raises:
        ValueError: it is no program, or the script is not there.
    """
    words = list(program)
    if words[:1] in (["python"], ["python3"]):
        words = words[1:]
    if words[:1] == ["pytest"]:
        words = ["-m", *words]
    if not words or words == ["-m"]:
        raise ValueError("record: a program is SCRIPT.py ..., -m MODULE ..., or pytest ...")
    if words[0] != "-m" and not Path(words[0]).is_file():
        raise ValueError(f"record: {words[0]} is not a file")
    return words


def _listen(words: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Run a program here: its launches as specs, and what it failed with, if it did."""
    from triton.runtime.jit import JITFunction
    from ttsem import sanitize

    from fastgpt.lab.compile import record
    from fastgpt.lab.semantics import teach

    teach()
    found: dict[str, dict[str, Any]] = {}
    with sanitize.session(source=" ".join(words), races="off"):
        inner = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            try:
                launch = record(self, args, grid, kwargs)
                if (signature := _signature(launch)) not in found:
                    count = sum(one["kernel"] == launch.kernel for one in found.values())
                    name = f"{launch.name}#{count + 1}" if count else launch.name
                    found[signature] = to_mapping(replace(launch, name=name))
            except ValueError as error:
                print(f"record: left out; {error}", file=sys.stderr)
            return inner(self, *args, grid=grid, warmup=warmup, **kwargs)

        JITFunction.run = run
        failed = _execute(words)
    return list(found.values()), failed


def _execute(words: list[str]) -> str | None:
    """Run a program as Python would; what it failed with, in one line."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, "")
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return f"exit code {int(stop.code)}" if isinstance(stop.code, int) and stop.code else None
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_listen(sys.argv[2:])))
