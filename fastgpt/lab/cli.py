"""fastgpt lab: the lab's command line."""

import argparse
import ast
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

EXAMPLES = """\
a kernel is
  layer_norm, attention, ffn      fastgpt's own; attention:D=128,dropout_p=0.1 for other sizes,
                                  attention._dq_kernel for one kernel alone
  FILE.yaml                       a spec, or launches that `fastgpt lab record` wrote
  FILE.py:KERNEL --args ...       a @triton.jit function and its arguments
  FILE.py:NAME                    a fastgpt.lab.Spec, or a list of them
  any of these @REVISION          as it was at a commit of its git repository

examples
  fastgpt lab layer_norm attention ffn
  fastgpt lab add.py:add_kernel --args x='bf16[N]' y='bf16[N]' n=N BLOCK=1024 \\
      --sizes N=65536 --grid 'cdiv(N, BLOCK)' --target sm_90 gfx942
  fastgpt lab record -o launches.yaml pytest tests/test_add.py
  fastgpt lab launches.yaml --with traffic sanitize --html lab.html
  fastgpt lab attention --gate 'spills == 0 and smem <= limit'
  fastgpt lab compare attention@HEAD~1 attention --target sm_90

exit code: 0; 1 if a gate is broken, a kernel does not compile or a fault was found; 2 for bad input
"""


def main(argv: Sequence[str], parser: type[argparse.ArgumentParser]) -> int:
    """Run `fastgpt lab`; return its exit code.

    Raises:
        ValueError, OSError, ImportError: bad input; the message is one line.
    """
    words = list(argv)
    if words[:1] == ["record"]:
        return _record(words[1:], parser)
    if words[:1] == ["compare"]:
        return _compare(words[1:], parser)
    return _study(words, parser)


def _common(said: argparse.ArgumentParser) -> None:
    from fastgpt.lab.chips import TARGETS

    said.add_argument(
        "--target", nargs="+", default=list(TARGETS), metavar="CHIP",
        help=f"compile for these (all of {', '.join(TARGETS)})",
    )  # fmt: skip
    said.add_argument("--gate", metavar="RULE", help="exit with 1 if a row breaks it")
    said.add_argument("--workers", type=int, help="processes (one a core)")


def _parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    from fastgpt.lab.result import SECTIONS

    said = kind(
        prog="fastgpt lab",
        description="Compile Triton kernels for chips that need not be there, and say what came "
        "out: resources, instructions, cost; run them here to count traffic and find faults.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    said.add_argument("kernels", nargs="+", metavar="KERNEL")
    _common(said)
    said.add_argument(
        "--with", nargs="+", default=[], dest="sections", choices=[*SECTIONS, "all"],
        metavar="SECTION", help=f"also run them here: {', '.join(SECTIONS)} or all",
    )  # fmt: skip
    said.add_argument(
        "--args", nargs="+", default=[], metavar="NAME=VALUE",
        help="of FILE.py:KERNEL: bf16[M,N] a tensor, *bf16 a pointer, i32, i32:16, a number",
    )  # fmt: skip
    said.add_argument("--sizes", nargs="+", default=[], metavar="NAME=N", help="names for --args")
    said.add_argument("--grid", nargs="+", metavar="N", help="of FILE.py:KERNEL")
    said.add_argument(
        "--options", nargs="+", default=[], metavar="NAME=N", help="num_warps=8 num_stages=3"
    )
    said.add_argument(
        "--configs", choices=("first", "all"), default="first",
        help="of a kernel under @triton.autotune (%(default)s)",
    )  # fmt: skip
    said.add_argument("--json", metavar="FILE", help="write everything; - for standard output")
    said.add_argument("--csv", metavar="FILE", help="write the rows; - for standard output")
    said.add_argument("--markdown", metavar="FILE", help="write the tables as a page of docs")
    said.add_argument("--html", metavar="FILE", help="write a page that needs no network")
    return said


def _study(argv: list[str], kind: type[argparse.ArgumentParser]) -> int:
    args = _parser(kind).parse_args(argv)
    from fastgpt.lab import table
    from fastgpt.lab.chips import TARGETS
    from fastgpt.lab.result import SECTIONS, to_json
    from fastgpt.lab.spec import Spec
    from fastgpt.lab.workbench import study, subject

    sections = SECTIONS if "all" in args.sections else args.sections
    if args.gate:  # before minutes of work
        table.check_rule(args.gate, "traffic" in sections)
    by_hand = None
    if args.args:
        by_hand = Spec(
            kernel="",
            args=_pairs(args.args, "--args"),
            grid=args.grid,
            options=_pairs(args.options, "--options"),
            sizes=_pairs(args.sizes, "--sizes"),
        )
    targets, bad = _known(args.target)
    subjects = []
    for name in args.kernels:
        try:
            found = subject(name, by_hand)
            found.launches((targets or TARGETS)[0], "first")  # its arguments fit its signature
            subjects.append(found)
        except ValueError as error:
            bad.append(str(error))
    for line in bad:
        print(line, file=sys.stderr)
    if not subjects or not targets:
        return 2
    with _Progress() as progress:
        result = study(subjects, targets, sections, args.configs, args.workers, progress.say)
    to_stdout = "-" in (args.json, args.csv)
    if not to_stdout:
        print(table.report(result))
    if args.json:
        _write(args.json, json.dumps(to_json(result), indent=1) + "\n")
    if args.csv:
        _write(args.csv, table.to_csv(result))
    if args.markdown:
        _write(args.markdown, table.document(result, shlex.join(["fastgpt", "lab", *argv])))
    if args.html:
        from fastgpt.lab import page

        page.write(result, args.html)
    broken = table.gate(result, args.gate) if args.gate else []
    for line in broken:
        print(f"gate: {line}", file=sys.stderr)
    if not to_stdout:
        kernels = len({row.kernel for row in result.rows})
        chips = len({row.target for row in result.rows})
        said = [f"{_many(kernels, 'kernel')} on {_many(chips, 'chip')} in {result.seconds:.0f} s"]
        if any(row.cost for row in result.rows):
            said.append("ceilings bound a speed and do not predict it (docs/lab.md)")
        if args.gate:
            said.append(f"the gate {'is broken' if broken else 'holds'}")
        print("\n" + "; ".join(said))
    faults = result.findings or any(row.error for row in result.rows)
    if bad:
        return 2
    return 1 if broken or faults or any(not n.agrees for n in result.numbers) else 0


def _compare(argv: list[str], kind: type[argparse.ArgumentParser]) -> int:
    said = kind(
        prog="fastgpt lab compare",
        description="Two kernels, or one at two revisions: the columns that differ.",
    )
    said.add_argument("before", metavar="KERNEL")
    said.add_argument("after", metavar="KERNEL")
    _common(said)
    args = said.parse_args(argv)
    from dataclasses import replace

    from fastgpt.lab import table
    from fastgpt.lab.result import Result
    from fastgpt.lab.workbench import study, subject

    if args.gate:
        table.check_rule(args.gate, traffic=False)
    sides: list[Result] = []
    with _Progress() as progress:
        for name in (args.before, args.after):
            sides.append(study([subject(name)], args.target, workers=args.workers,
                               progress=progress.say))  # fmt: skip
    lines = table.compare(sides[0].rows, sides[1].rows)
    if lines:
        heads = ["kernel", "target", "column", args.before, args.after, "change"]
        print(table.text(heads, lines))
    else:
        print(f"{args.before} and {args.after}: no column differs")
    broken = table.gate(replace(sides[1], notes=()), args.gate) if args.gate else []
    for line in broken:
        print(f"gate: {line}", file=sys.stderr)
    return 1 if broken or any(row.error for row in sides[1].rows) else 0


def _record(argv: list[str], kind: type[argparse.ArgumentParser]) -> int:
    said = kind(
        prog="fastgpt lab record",
        description="Run a program written for a GPU on the CPU, and write down its launches.",
    )
    said.add_argument("-o", "--out", default="launches.yaml", help="(%(default)s)")
    said.add_argument(
        "program", nargs=argparse.REMAINDER, help="SCRIPT.py ..., -m MODULE ..., or pytest ..."
    )
    args = said.parse_args(argv)
    program = [w for w in args.program[:1] if w != "--"] + args.program[1:]
    if not program:
        raise ValueError("record: a program is needed: SCRIPT.py ..., -m MODULE ..., or pytest ...")
    from fastgpt.lab.record import run

    count = run(program, args.out)
    print(f"{count} launches written to {args.out}; next: fastgpt lab {args.out}")
    return 0


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _known(targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The targets that are known, each once, and a line for each that is not."""
    from fastgpt.lab.chips import TARGETS, chip

    bad = []
    for target in targets:
        try:
            chip(target)
        except ValueError as error:
            bad.append(f"lab: {error}")
    return [t for t in dict.fromkeys(targets) if t in TARGETS], bad


def _pairs(said: Sequence[str], option: str) -> dict[str, Any]:
    """NAME=VALUE words as a dictionary; a value is a Python literal if it is one, else text."""
    made: dict[str, Any] = {}
    for word in said:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"lab: {option} takes NAME=VALUE; got {word!r}")
        try:
            made[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            made[name] = value
    return made


def _write(where: str, text: str) -> None:
    """To a file, whole or not at all; - is standard output."""
    if where == "-":
        print(text, end="")
        return
    from fastgpt.lab.files import write_whole

    write_whole(where, text)


class _Progress:
    """One line on a terminal's standard error that says what is under way."""

    def __init__(self) -> None:
        self.shows = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def say(self, what: str, done: int, of: int) -> None:
        if self.shows:
            print(f"\r\x1b[K{done}/{of} {what}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
