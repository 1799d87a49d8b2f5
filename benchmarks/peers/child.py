"""Compile what peers launch on one chip: `python -m benchmarks.peers.child sm_90 ...`.

Each line of its output is JSON: what is under way, then its row. A compiler that crashes ends the
process, and the last line tells on what.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner

from benchmarks.peers import calls
from benchmarks.peers.calls import Call
from fastgpt.lab import analyse
from fastgpt.lab.compile import capture, present
from fastgpt.lab.launch import Launch
from fastgpt.lab.result import to_json
from fastgpt.lab.spec import elements


@contextmanager
def configurations(call: Call, every: bool) -> Iterator[None]:
    """Inside, an autotuner launches its configurations: all, or those that are worth it."""
    real = Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        found = [c for c in self.prune_configs(kwargs) if every or call.tuned(c)]
        for config in found:
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = real


def launches(call: Call, target: str, every: bool = False) -> list[Launch]:
    """What a call launches of the kernels it names."""
    with torch.no_grad(), configurations(call, every), capture(target) as found:
        call.run()
    made = []
    for one in found:
        name = one.name.rpartition(".")[2]
        if name not in call.kernels:
            continue
        said = call.kernels[name]
        numbers = {k: v for k, v in one.args.items() if isinstance(v, (int, float))}
        counted = elements(said, {**numbers, **call.names}) if said else None
        peer = re.sub(r"\W+", "_", call.peer)
        made.append(replace(one, name=f"{peer}.{name}", elements=counted))
    return made


def providers(peers: Path, tutorials: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "liger-kernel": calls.liger,
        "fla-core": calls.fla,
        "torchnorm": calls.torchnorm,
        "fasterkernels": calls.fasterkernels,
        "cut-cross-entropy": calls.cut_cross_entropy,
        "unsloth": lambda: calls.unsloth(peers),
    }
    if tutorials:
        found["tutorials"] = lambda: calls.tutorials(tutorials)
    return found


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--tutorials", type=Path)
    parser.add_argument("--every-configuration", action="store_true")
    parser.add_argument("--only", help="regular expression of what is compared")
    parser.add_argument("--skip", action="append", default=[], help="what crashed before")
    args = parser.parse_args()
    if args.peers:
        sys.path.append(str(args.peers))
    with present(args.target):
        for name, provider in providers(args.peers, args.tutorials).items():
            try:
                found = list(provider())
            except Exception as error:
                say(peer=name, error=f"{type(error).__name__}: {error}"[:300])
                continue
            for call in found:
                if args.only and not re.search(args.only, call.what):
                    continue
                about = {"what": call.what, "at": call.at, "peer": call.peer}
                try:
                    made = launches(call, args.target, args.every_configuration)
                except Exception as error:
                    say(**about, error=f"{type(error).__name__}: {error}"[:300])
                    continue
                for n, one in enumerate(made):
                    key = f"{call.what} {call.at} {call.peer} {n}"
                    say(key=key)
                    if key in args.skip:
                        say(**about, error="the compiler crashed its process")
                    else:
                        row = replace(analyse.analyse(one, args.target), lines=())
                        row = replace(row, error=row.error and row.error[:300])
                        say(**about, row=to_json(row))


if __name__ == "__main__":
    main()
