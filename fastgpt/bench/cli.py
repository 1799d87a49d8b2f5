"""The command `fastgpt bench`, and its forms `fastgpt bench compare` and `fastgpt bench show`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

STOPPED = 130  # as a shell reports SIGINT
OPS = (
    "attention", "attention_decode", "layer_norm", "rms_norm", "ffn", "linear_cross_entropy",
    "cross_entropy", "embedding", "rotary", "quantized_linear", "adamw",
)  # fmt: skip
MODELS = ("step", "prefill", "decode")

EPILOG = """providers are used where they are installed, and it is said where not; one whose values
differ from PyTorch's (a model's from Hugging Face's) is not timed. `fastgpt bench compare A.json
B.json` says what moved between two runs, `fastgpt bench show A.json` shows one again.
Compiled providers find what an earlier run compiled in the caches of torch on the disk."""


def main(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    """Run the command; return its exit code."""
    if argv and argv[0] == "compare":
        return _compare(argv[1:], kind)
    if argv and argv[0] == "show":
        return _show(argv[1:], kind)
    parser = kind(
        prog="fastgpt bench",
        description="Time fastgpt beside others' ways: interleaved, as medians and ratios.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "what", nargs="*", metavar="OP",
        help=f"of {', '.join(OPS)}; or a whole GPT-2's {', '.join(MODELS)}; all ops without",
    )  # fmt: skip
    for name, said in (
        ("forward", "without gradients; the default"),
        ("backward", "what comes after a forward"),
        ("both", "forward and backward"),
    ):
        parser.add_argument(f"--{name}", action="append_const", dest="modes", const=name, help=said)
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="NAME=N,N,...", type=_values,
        help="sizes, as T=128,512 B=4; every combination is timed",
    )  # fmt: skip
    parser.add_argument(
        "--positions", type=_numbers, metavar="N,N,...",
        help="with decode alone: one step with so many positions held, beside what reading them"
        " must take",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "float16", "bfloat16", "autocast", "int8"),
        help="float32; bfloat16 on a GPU; autocast, bfloat16 products of float32 weights, is for"
        " step, int8 weights are for decode",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="only these; - stands for a space"
    )
    parser.add_argument(
        "--suite", choices=("cpu", "gpu"),
        help="all that docs/performance.md shows of this CPU, under 10 minutes; or all of"
        " docs/gpu.md on this GPU: checks, tiles, times, under 20 minutes",
    )  # fmt: skip
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="nanoGPT's folder")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="of a CPU, for every provider")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json",
        help="results, and FILE.csv beside it; without, bench-DATE-TIME.json",
    )  # fmt: skip
    _shown(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"bench: --rounds must be at least 1; got {args.rounds}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"bench: --threads must be at least 1; got {args.threads}")
    if args.suite and (args.what or args.sweep or args.dtype or args.modes or args.device):
        raise ValueError("bench: --suite says itself what is timed; it takes no OP and no sizes")
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"bench: --out must end in .json; got {args.out}")

    if args.positions and (args.what != ["decode"] or args.sweep or args.modes or args.html):
        raise ValueError("bench: --positions goes with decode alone, without sizes and --html")
    if args.positions and (args.rounds < 3 or len(set(args.dtype or [])) > 1):
        raise ValueError("bench: --positions needs at least 3 rounds, and one --dtype at most")

    import torch

    from fastgpt.bench.run import Wanted, bench, default_name
    from fastgpt.bench.show import Shown

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.suite is not None:
        device = "cpu" if args.suite == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda needs a GPU that torch sees; there is none")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.positions:
        from fastgpt.bench import positions

        dtype = (args.dtype or ["bfloat16" if device == "cuda" else "float32"])[0]
        if dtype in ("autocast", "int8"):
            raise ValueError(f"bench: --positions is of weights of 16 or 32 bits; got {dtype}")
        Shown(args.markdown, None, args.png).check()
        positions.run(
            args.positions, args.rounds, getattr(torch, dtype), device, args.markdown, args.png
        )
        return 0
    wanted = Wanted(
        what=tuple(args.what) or OPS,
        device=device,
        dtypes=tuple(args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])),
        modes=tuple(dict.fromkeys(args.modes or ["forward"])),
        sweep=tuple(args.sweep),
        providers=tuple(args.providers) if args.providers else None,
        rounds=args.rounds,
        nanogpt=args.nanogpt,
    )
    shown = Shown(args.markdown, args.html, args.png)
    planned = None
    if args.suite == "cpu":
        from fastgpt.bench.suite import cpu

        planned = cpu()
    out = args.out or default_name()
    if args.suite == "gpu":
        from fastgpt.bench.gpu import gpu

        return 0 if gpu(wanted, out, shown) else STOPPED
    return 0 if bench(wanted, out, shown, planned) else STOPPED


def _shown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.md", help="tables, between two lines of this page"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page that needs no network")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plots; needs matplotlib")


def _show(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    parser = kind(prog="fastgpt bench show", description="Show a run again, or as a page.")
    parser.add_argument("run", type=Path, metavar="A.json")
    _shown(parser)
    args = parser.parse_args(argv)

    from fastgpt.bench.result import read, table
    from fastgpt.bench.show import Shown

    shown = Shown(args.markdown, args.html, args.png)
    shown.check()
    run = read(args.run)
    written = shown.write(run)
    for line in [] if written else table(run.rows):
        print(line)
    if written:
        print(", ".join(map(str, written)))
    return 0


def _numbers(word: str) -> tuple[int, ...]:
    """1,2,3 as numbers, in their order."""
    try:
        values = tuple(sorted({int(n) for n in word.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"must be N,N,... from 1 on; got {word!r}")
    return values


def _values(word: str) -> tuple[str, tuple[int, ...]]:
    """T=128,512 as a name and numbers."""
    name, _, numbers = word.partition("=")
    try:
        values = tuple(int(n) for n in numbers.split(","))
    except ValueError:
        values = ()
    if not name or not values or min(values) < 0:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER,NUMBER,...; got {word!r}")
    return name, values


def _compare(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    from fastgpt.bench.compare import LEAST

    parser = kind(
        prog="fastgpt bench compare",
        description="Say what moved between two runs beyond noise; exit with 1 if anything is"
        " slower, larger or no longer timed.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--least", type=float, default=LEAST, metavar="PART",
        help="the smallest relative change that counts (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.least >= 0:
        raise ValueError(f"bench compare: --least must be at least 0; got {args.least}")

    from fastgpt.bench.compare import compare, report
    from fastgpt.bench.result import read

    before, after = read(args.before), read(args.after)
    moved = compare(before, after, args.least)
    for line in report(before, after, moved):
        print(line)
    return 1 if any(one.worse for one in moved) else 0
