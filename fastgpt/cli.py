"""The command line: demo, prepare, train, compress, generate, chat, next, explain, export, ...

Bad input ends it with one line on standard error and exit code 2. Under `python -X dev` the
traceback comes too.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

USAGE = """usage: fastgpt COMMAND ...

commands:
  demo      train a small GPT on real text in about two minutes, and show what it learned
  prepare   text, JSONL or a dataset to a corpus of token shards, for many runs
  train     train a GPT on text files
  compress  make a model's weights 8 or 4 bits each, or fewer
  generate  continue a prompt with a trained model
  chat      talk with a model that was trained on messages
  next      show how likely each token is to come next
  explain   what a model looks at, and why it goes on with a text as it does
  export    write a trained model in Hugging Face's layout
  tune      measure tiles on this machine's GPU, and use the fastest from then on
  bench     time ops and a GPT beside others' ways on this machine
  lab       what a Triton kernel became on each chip, and its faults, with no GPU
  plan      memory, traffic and least time of a training run on 1 to 25,000 devices

fastgpt COMMAND --help tells a command's options.
"""
STOPPED = 130  # as a shell reports SIGINT
PIPE_CLOSED = 141  # as a shell reports SIGPIPE


class _Parser(argparse.ArgumentParser):
    """argparse, with an error of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for out in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something else
            out.reconfigure(errors="replace")  # type: ignore[union-attr]
    commands = {
        "demo": _demo, "prepare": _prepare, "train": _train, "compress": _compress,
        "generate": _generate, "chat": _chat, "next": _next, "explain": _explain,
        "export": _export, "tune": _tune, "bench": _bench, "lab": _lab, "plan": _plan,
    }  # fmt: skip
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            code = 0 if argv else 2
        elif argv[0] == "--version":
            from fastgpt import __version__

            print(f"fastgpt {__version__}")
            code = 0
        elif argv[0] not in commands:
            raise ValueError(
                f"fastgpt: the command must be one of {', '.join(commands)}; got {argv[0]!r}"
            )
        else:
            code = commands[argv[0]](argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone; Python's own flush at exit must not fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return STOPPED
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        print(_line(error), file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    """One line that says the rule and what came."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"file: {error.filename} cannot be used; {(error.strerror or str(error)).lower()}"
    return " ".join(str(error).split()) or type(error).__name__


def _demo(argv: list[str]) -> int:
    parser = _Parser("fastgpt demo", description="Train a small GPT and show what it learned.")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE",
        help="UTF-8 text to train on; without it Python's language reference",
    )  # fmt: skip
    parser.add_argument("--out", default="runs/demo", help="folder of the run (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="the longest to train (%(default)s)"
    )
    parser.add_argument("--prompt", help="text to continue in the end")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    args = parser.parse_args(argv)
    from fastgpt.demo import demo

    return 0 if demo(args.text, args.out, args.minutes, args.prompt, args.seed) else STOPPED


def _prepare(argv: list[str]) -> int:
    from fastgpt.data import DataConfig, prepare
    from fastgpt.data.config import FORMATS, REPEATS

    parser = _Parser(
        "fastgpt prepare",
        description="Divide documents into a training and a held-out part and write them as token"
        " shards: a corpus, which fastgpt train --data.files CORPUS takes. A preparation that was"
        " stopped goes on; a finished corpus is never overwritten.",
    )
    default = DataConfig()
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, JSONL, or datasets' names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument(
        "--held-out-files", nargs="+", default=[], metavar="FILE", help="what to evaluate on"
    )
    parser.add_argument("--format", choices=FORMATS, default=default.format)
    parser.add_argument("--deduplicate", choices=REPEATS, default=default.deduplicate)
    for name, kind, told in (
        ("separator", str, "what stands between two documents of a text file; none: a file is one"),
        ("text_field", str, "where a record keeps its text (%(default)s)"),
        ("turn", str, "how a message of a chat is written (%(default)r)"),
        ("tokenizer", str, "a tokenizer.json; without it one is trained on the training part"),
        ("vocab_size", int, "ids of a tokenizer that is trained (%(default)s)"),
        ("held_out", float, "share to evaluate on, without --held-out-files (%(default)s)"),
        ("shard_bytes", int, "text of a shard (%(default)s)"),
    ):
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=getattr(default, name), help=told
        )
    parser.add_argument("--seed", type=int, default=0, help="of the division (%(default)s)")
    args = vars(parser.parse_args(argv))
    out, seed = args.pop("out"), args.pop("seed")
    for name in ("files", "held_out_files"):
        args[name] = tuple(args[name])
    corpus = prepare(DataConfig(**args), out, seed)
    print(
        f"{corpus.folder}: {len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held"
        f" out, in {corpus.train.documents + corpus.held_out.documents:,} documents;"
        f" {corpus.told['repeats_dropped']:,} repeats left out; {corpus.vocab_size:,} ids"
    )
    return 0


def _train(argv: list[str]) -> int:
    from fastgpt.train.cli import main as train

    return train(argv)


def _generate(argv: list[str]) -> int:
    from fastgpt.generation.cli import generate

    return generate(argv, _Parser)


def _chat(argv: list[str]) -> int:
    from fastgpt.generation.cli import chat

    return chat(argv, _Parser)


def _next(argv: list[str]) -> int:
    from fastgpt.generation.cli import next_token

    return next_token(argv, _Parser)


def _compress(argv: list[str]) -> int:
    parser = _Parser(
        "fastgpt compress",
        description="Make a model's weights 8 or 4 bits each, or remove heads and feed-forward"
        " columns and train what is left a little; and tell what it saves and costs.",
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help="a checkpoint, a run's folder, or what GPT.from_pretrained takes",
    )  # fmt: skip
    parser.add_argument(
        "--to", required=True, action="append",
        help="int8, int4, or prune=0.5 with the share of heads and columns to remove, after which"
        " another --to int8 or --to int4 may follow",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="write it here, as what MODEL is; without it only the table"
    )
    parser.add_argument(
        "--text", metavar="FILE",
        help="UTF-8 text to predict, best one that was not trained on; or a corpus, as the folder"
        " data of a run, of which the held-out part is predicted and the other may be trained on",
    )  # fmt: skip
    parser.add_argument(
        "--train-text", metavar="FILE",
        help="text like that it was trained on: tells what to prune, by gradients, and heals",
    )  # fmt: skip
    parser.add_argument(
        "--heal-steps", type=int, default=0,
        help="optimizer steps on the training text after pruning (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--heal-lr", type=float, default=3e-4, help="their learning rate (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(argv)
    from fastgpt.compress import command
    from fastgpt.train import Step

    def said(made: Step) -> None:
        if made.step % max(1, args.heal_steps // 10) == 0:
            print(f"heal: step {made.step}, loss {made.loss:.3f}", file=sys.stderr, flush=True)

    command(
        args.model, args.to, args.out, args.text, args.train_text, args.heal_steps, args.heal_lr,
        args.device, said,
    )  # fmt: skip
    return 0


def _export(argv: list[str]) -> int:
    parser = _Parser(
        "fastgpt export",
        description="Write a trained model as Hugging Face's libraries read it: model.safetensors,"
        " config.json and tokenizer.json; or as one GGUF file for llama.cpp; with LoRA merged into"
        " the weights.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the folder of a run"
    )
    parser.add_argument(
        "--best", action="store_true",
        help="of a run, that with the lowest held-out loss; else the newest",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write, or a file NAME.gguf"
    )
    args = parser.parse_args(argv)
    from fastgpt.train import checkpoint

    source = checkpoint.best(args.checkpoint) if args.best else args.checkpoint
    if source is None:
        raise ValueError(f"export: --best needs a run with a held-out loss; got {args.checkpoint}")
    checkpoint.export(source, args.out)
    gguf = args.out.endswith(".gguf")
    files = "weights and tokenizer" if gguf else "model.safetensors, config.json, tokenizer.json"
    print(f"{args.out}: {files}")
    return 0


def _explain(argv: list[str]) -> int:
    from fastgpt.interpret.cli import main as explain

    return explain(argv, _Parser)


def _tune(argv: list[str]) -> int:
    from fastgpt.tune_ops import DTYPES, TASKS

    said = "; ".join(f"{n} takes {', '.join(task.sizes)}" for n, task in TASKS.items())
    parser = _Parser(
        "fastgpt tune",
        description="Time tiles of the kernels on this machine's GPU, keep the fastest that are"
        " right, and use them from then on.",
        epilog=f"sizes: {said}. The file is FASTGPT_CACHE, or fastgpt/tiles.json in the user's"
        " cache folder.",
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP[:NAME=NUMBER,...]",
        help=f"of {', '.join(TASKS)}; all of them, at GPT-2's sizes, without",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16; float32 in the interpreter")
    parser.add_argument(
        "--device", default="cuda",
        help="cuda; or cpu with TRITON_INTERPRET=1, to try it out (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=20, help="timings of each (%(default)s)")
    parser.add_argument(
        "--candidates", type=int, default=24, help="the most for each tile (%(default)s)"
    )
    parser.add_argument("--cache", metavar="FILE", help="write here")
    args = parser.parse_args(argv)
    try:
        from fastgpt.tune import tune
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("tune: needs the package triton; pip install triton") from None
    tune(
        args.ops, dtype=DTYPES.get(args.dtype), device=args.device, rounds=args.rounds,
        candidates=args.candidates, path=args.cache,
    )  # fmt: skip
    return 0


def _bench(argv: list[str]) -> int:
    from fastgpt.bench.cli import main as bench

    return bench(argv, _Parser)


def _lab(argv: list[str]) -> int:
    try:
        from fastgpt.lab.cli import main as lab

        return lab(argv, _Parser)
    except ModuleNotFoundError as error:
        if error.name not in ("triton", "yaml", "jinja2"):
            raise
        raise ImportError(
            f"lab: needs the package {error.name}; pip install 'fastgpt-triton[lab]'"
        ) from None


def _plan(argv: list[str]) -> int:
    from fastgpt.plan.cli import main as plan

    return plan(argv, _Parser)
