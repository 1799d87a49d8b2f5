"""Launches that somebody's own program makes, written down as specs.

The program, or a pytest run, is executed under ttsem's stand-in for a GPU: device="cuda" works
and every kernel really runs, on the CPU. Its launches become a YAML file for the lab.
"""

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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

    Args:
        program: a script and its arguments, or "-m", "pytest" and pytest's.
        out: a YAML file; is written whole, also when the program fails.

    Returns:
        How many launches were written.

    Raises:
        ValueError: the program is not there, fails, or launches nothing.
        ImportError: ttsem or PyYAML is not installed.
    """
    import yaml

    try:
        from ttsem import sanitize
    except ImportError:
        raise ImportError(
            "record: ttsem is needed; pip install --no-deps --ignore-requires-python ttsem"
        ) from None
    from triton.runtime.jit import JITFunction

    from fastgpt.lab.compile import record

    found: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []

    def listen(inner: Any) -> Any:
        def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            try:
                launch = record(self, args, grid, kwargs)
                if (signature := _signature(launch)) not in found:
                    count = sum(one["kernel"] == launch.kernel for one in found.values())
                    name = f"{launch.name}#{count + 1}" if count else launch.name
                    found[signature] = to_mapping(replace(launch, name=name))
            except ValueError as error:
                skipped.append(str(error))
            return inner(self, *args, grid=grid, warmup=warmup, **kwargs)

        return launched

    with sanitize.session(source=" ".join(program), races="off"):
        inner = JITFunction.run
        JITFunction.run = listen(inner)
        try:
            failed = _execute(list(program))
        finally:
            JITFunction.run = inner
    for why in dict.fromkeys(skipped):
        print(f"record: left out; {why}", file=sys.stderr)
    if not found:
        why = f": {failed}" if failed else ""
        raise ValueError(f"record: {' '.join(program)} launched no kernel{why}")
    path = Path(out)
    part = path.with_name(path.name + ".part")
    part.write_text(
        yaml.safe_dump(list(found.values()), sort_keys=False, default_flow_style=None, width=100),
        encoding="utf-8",
    )
    part.replace(path)
    if failed:
        print(f"record: the program failed: {failed}", file=sys.stderr)
    return len(found)


def _execute(words: list[str]) -> str | None:
    """Run a program in this process; what it failed with, in one line."""
    if words[0] in ("python", "python3"):
        words = words[1:]
    if not words:
        raise ValueError("record: a program is SCRIPT.py ..., -m MODULE ..., or pytest ...")
    before = sys.argv, sys.path[:]
    try:
        if words[0] == "pytest":
            words = ["-m", *words]
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, "")
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif Path(words[0]).is_file():
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            raise ValueError(f"record: {words[0]} is not a file")
    except SystemExit as stop:
        return f"exit code {stop.code}" if stop.code not in (None, 0) else None
    except ValueError as error:
        if str(error).startswith("record:"):
            raise
        return f"ValueError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        sys.argv, sys.path[:] = before
    return None
