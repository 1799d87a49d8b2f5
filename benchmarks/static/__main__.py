"""Print the goals' table: python -m benchmarks.static --help."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
import triton

from benchmarks.static import host, kernels, report, step
from benchmarks.static.kernels import CHIPS, Line
from fastgpt.lab.table import markdown, text

PACKAGES = (
    "liger-kernel", "fla-core", "torchnorm", "fasterkernels", "cut-cross-entropy", "unsloth",
    "flag-gems",
)  # fmt: skip
SECTIONS = ("compile", "traffic", "step")
BEGIN, END = "<!-- begin: python -m benchmarks.static -->", "<!-- end -->"
ABOUT = (
    "ours : the best peer's. ✓ met, ✗ not met, – nobody to be held against. U_max and U_ser: share "
    "of the chip's matrix peak with every pipe overlapped, and with none (`ceiling` and `serial` "
    "of docs/lab.md). Instructions an exponential: thread instructions of the main loop a score, "
    "at most 0.9 of the peer's. Instructions an element: of the whole kernel, at most 0.8 of the "
    "peer's, and within the budget that the memory gives. 16-byte share: of the bytes."
)


_said = 0.0


def say(what: str) -> None:
    """Progress, on one line of the terminal; elsewhere a line every ten seconds."""
    global _said
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what[:100]}", end="", file=sys.stderr, flush=True)
    elif what and time.monotonic() > _said + 10:
        _said = time.monotonic()
        print(what, file=sys.stderr, flush=True)


def versions(peers: Path | None) -> str:
    """Of what is compared, in words."""
    if peers:
        sys.path.append(str(peers))
    found = [f"Triton {triton.__version__}", f"torch {torch.__version__.partition('+')[0]}"]
    for package in (*PACKAGES, "transformers"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package}: not installed")
    return ", ".join(found)


def step_lines(peers: Path | None, tutorials: Path | None) -> list[Line]:
    """The goals on a training step, and on the host."""
    return [*launch_lines(), *memory_lines(), *host_lines(peers, tutorials)]


def launch_lines() -> list[Line]:
    *others, own = step.launches()
    made = []
    for other in others:
        for goal, theirs in (
            ("launches a step, at most 40 %", other.split),
            ("the same, each operator once", other.launches),
        ):
            share = own.launches / theirs
            short = "" if share <= 0.4 else f"{share:.0%}"
            made.append(Line(goal, "GPT-2 small", "12 layers", "", own.launches, theirs,
                             other.provider, share <= 0.4, short))  # fmt: skip
    return made


def memory_lines() -> list[Line]:
    """Ours at most half of Hugging Face's and below the patched one; level 2 at most a quarter."""
    saved = step.saved()
    goal = "bytes saved for backward, a token and layer"
    wanted = [
        ("fastgpt", step.HUGGING_FACE, 0.5),
        ("fastgpt", step.PATCHED, 1.0),
        ("fastgpt", step.PLAIN, 1.0),
        ("fastgpt, recompute=1", step.HUGGING_FACE, 0.5),
        ("fastgpt, recompute=2", step.HUGGING_FACE, 0.25),
    ]
    made = []
    for provider, other, share in wanted:
        if provider in saved and other in saved:
            ours, limit = saved[provider], share * saved[other]
            short = "" if ours <= limit else f"{ours / limit - 1:.0%} over"
            said = f"{goal}, at most {share:.0%}" if share < 1 else goal
            made.append(Line(said, provider, "width 768", "", ours, saved[other], other,
                             ours <= limit, short))  # fmt: skip
    return made


def host_lines(peers: Path | None, tutorials: Path | None) -> list[Line]:
    made = []
    for what, costs in host.costs(peers, tutorials).items():
        others = {name: cost for name, cost in costs.items() if name != "fastgpt"}
        who = min(others, key=lambda name: others[name], default="")
        ours, theirs = costs["fastgpt"], others.get(who)
        met = None if theirs is None else ours <= theirs
        short = f"{ours / theirs:.1f} times" if theirs and not met else ""
        goal = "microseconds from call to launch"
        made.append(Line(goal, what, "", "", ours, theirs, who, met, short))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="a folder of pip install --no-deps --target")
    parser.add_argument("--tutorials", type=Path, help="Triton's python/tutorials")
    parser.add_argument("--keep", type=Path, help="a folder for the peers' rows: used if there")
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--only", help="regular expression of what is compared: 'layer norm'")
    parser.add_argument("--skip", nargs="+", default=[], choices=SECTIONS, help="for want of time")
    parser.add_argument("--every-configuration", action="store_true", help="of peers' autotuners")
    parser.add_argument("--markdown", type=Path, help="replace the tables in this page")
    parser.add_argument("--json", type=Path, help="write all lines to this file")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    options = [w for n in ("peers", "tutorials") if (v := getattr(args, n))
               for w in (f"--{n}", str(v.resolve()))]  # fmt: skip
    options += ["--every-configuration"] * args.every_configuration
    found = kernels.peers(args.target, options, say, args.only, args.keep)
    if not args.tutorials:
        found.missing["tutorials"] = "no package ships them: --tutorials DIR"
    rows, pairs = kernels.ours(args.target, say, args.only, everything="compile" not in args.skip)
    compiled = kernels.compiled(rows)
    compared = kernels.compared(found, args.target, pairs)
    moved = [] if args.only or "traffic" in args.skip else kernels.traffic(say)
    steps = [] if "step" in args.skip else step_lines(args.peers, args.tutorials)
    lines = [*compiled, *compared, *moved, *steps]
    say("")
    made = report.page(lines, compiled, compared, [*moved, *steps], args.target, found.missing)
    print(versions(args.peers), "\n")
    for title, content in made:
        print(title)
        print(text(*content) if isinstance(content, tuple) else "\n".join(content), "\n")
    print(f"{ABOUT}\n{len(lines)} goals in {time.perf_counter() - start:.0f} s")
    if args.markdown:
        parts = [f"Made with {versions(args.peers)}.", ABOUT]
        for title, content in made:
            parts.append(f"### {title}")
            listed = not isinstance(content, tuple)
            parts.append("\n".join(f"- {c}" for c in content) if listed else markdown(*content))
        page = args.markdown.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        body = "\n\n".join(parts)
        args.markdown.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
