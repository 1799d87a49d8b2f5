"""The command `fastgpt plan`, and its forms `published` and `update`."""

import argparse
import contextlib
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.config import GPTConfig
    from fastgpt.plan.best import Plan

EPILOG = """clusters: v100, a100-40gb, a100, h100, h200, b200, mi300x, rtx4090, tpu-v4; or a .yaml
file with
  base: h100          # one of these, to start from
  inter_gbs: 25       # and any of peak_tflops, bandwidth_gbs, memory_gib, gpus_per_node, intra_gbs,
                      # inter_gbs, intra_us, inter_us, reserve_gib: of one device, one direction

fastgpt plan published      published runs beside their bounds, as Markdown
fastgpt plan update FILE    run again what is said to make the tables of FILE

examples:
  fastgpt plan gpt3-175b --cluster h100 --gpus 1024
  fastgpt plan llama3-8b --cluster ours.yaml --gpus 8,64,512 --tokens 2e12
  fastgpt plan gpt2 --cluster a100 --gpus 8 --layout fsdp=8,micro_batch=16
"""
BLOCK = re.compile(r"(<!-- made by: fastgpt plan (.*?) -->\n).*?(<!-- end -->)", re.S)


def main(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    """Run the command; return its exit code.

    Raises:
        ValueError, TypeError, OSError, ImportError: bad input; the message is one line.
    """
    if argv[:1] == ["published"]:
        said = "Published runs beside their bounds, as Markdown."
        kind("fastgpt plan published", description=said).parse_args(argv[1:])
        from fastgpt.plan.published import table

        print(table())
        return 0
    if argv[:1] == ["update"]:
        return _update(argv[1:], kind)
    return _plan(argv, kind)


def _plan(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    parser = kind(
        prog="fastgpt plan",
        description="Memory, traffic and the least time of a training step on machines that need"
        " not be here, for every layout; the best one, and what binds it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a preset of GPTConfig, or a .yaml file of its attributes"
    )
    parser.add_argument("--cluster", default="h100", help="see below (%(default)s)")
    parser.add_argument(
        "--gpus", default="8", metavar="N[,N...]", help="devices; one line each for several"
    )
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens; the model's without")
    parser.add_argument(
        "--batch", type=float, metavar="N", help="tokens of a step; 0.5 to 4 M without, by size"
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="to train on, for the days; without 20 a parameter",
    )
    parser.add_argument("--layout", metavar="NAME=N,...", help="this one, and no search")
    parser.add_argument(
        "--pipeline", action="store_true",
        help="look at pipelines too, which are a model only: fastgpt trains without them",
    )  # fmt: skip
    parser.add_argument(
        "--recompute", nargs="+", choices=("0", "1", "2", "block"), metavar="LEVEL",
        default=["0", "1", "2", "block"], help="of 0, 1, 2 and block, all blocks made again (all)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=10, help="rows of the table (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything; - for standard output")
    args = parser.parse_args(argv)
    sizes = _sizes(args.gpus)
    if args.top < 1:
        raise ValueError(f"plan: --top must be at least 1; got {args.top}")
    for option in ("batch", "tokens", "sequence"):
        value = getattr(args, option)
        if value is not None and not value >= 1:
            raise ValueError(f"plan: --{option} must be at least 1; got {value:g}")

    from fastgpt.plan import Plan, batch_sequences, cluster, estimate, search
    from fastgpt.plan.layout import parse
    from fastgpt.plan.measure import parameters
    from fastgpt.plan.table import growth, report

    name, config = _model(args.model)
    where = cluster(args.cluster)
    T = args.sequence or config.block_size
    sequences = batch_sequences(config, T, None if args.batch is None else int(args.batch))
    budget = args.tokens or 20.0 * parameters(config)
    if args.layout:
        layout = parse(args.layout)
        made = estimate(config, layout, T, sequences, where)
        plans = [Plan(config, where, layout.world, T, (made,), None)]
        if not made.fits:
            print(f"plan: {layout} takes {made.bytes / 2**30:.1f} GiB; {where.usable / 2**30:.1f}"
                  " are left for tensors")  # fmt: skip
    else:
        plans = [
            search(config, where, n, T, sequences, pipeline=args.pipeline,
                   recompute=tuple(args.recompute)) for n in sizes
        ]  # fmt: skip
    if args.json:
        _write(args.json, _json(name, plans, budget))
    if args.json != "-":
        many = len(plans) > 1
        print(growth(name, plans, budget) if many else report(name, plans[0], budget, args.top))
    return 0


def _sizes(words: str) -> list[int]:
    try:
        sizes = [int(word) for word in words.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > 2**15:
        raise ValueError(f"plan: --gpus must be numbers from 1 to {2**15}; got {words!r}")
    return sizes


def _model(name: str) -> "tuple[str, GPTConfig]":
    """A preset, or a file."""
    from fastgpt.config import GPTConfig

    if not name.endswith((".yaml", ".yml", ".json")):
        return name, GPTConfig.preset(name)
    try:
        import yaml
    except ImportError:
        raise ImportError("plan: needs the package pyyaml; pip install pyyaml") from None
    try:
        said = yaml.safe_load(Path(name).read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"plan: {name} is no YAML; {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"plan: {name} must map GPTConfig's attributes to values")
    for key in said:
        if key not in GPTConfig.__dataclass_fields__:
            known = ", ".join(GPTConfig.__dataclass_fields__)
            raise ValueError(f"plan: {name}: GPTConfig has {known}; got {key!r}")
    return Path(name).stem, GPTConfig(**said)


def _json(name: str, plans: "Sequence[Plan]", budget: float) -> str:
    made = {
        "model": name,
        "token_budget": budget,
        "plans": [plan.to_json() | {"days": plan.best.days(budget)} for plan in plans],
    }
    return json.dumps(made, indent=1) + "\n"


def _write(where: str, text: str) -> None:
    if where == "-":
        print(text, end="")
        return
    from fastgpt.lab.files import write_whole

    write_whole(where, text)


def _update(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    parser = kind(
        prog="fastgpt plan update",
        description="Run again what is said to make the tables of a Markdown file: all between"
        " <!-- made by: fastgpt plan ... --> and <!-- end -->.",
    )
    parser.add_argument("file", metavar="FILE")
    args = parser.parse_args(argv)
    from fastgpt.lab.files import write_whole

    text = Path(args.file).read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise ValueError(f"plan update: {args.file} has no <!-- made by: fastgpt plan ... -->")

    def again(block: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(shlex.split(block[2]), kind)
        made = out.getvalue()
        fenced = made if made.startswith("|") else f"```text\n{made}```\n"
        return f"{block[1]}{fenced}{block[3]}"

    write_whole(args.file, BLOCK.sub(again, text))
    return 0
