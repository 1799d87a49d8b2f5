"""The command `fastgpt explain`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.model import GPT
    from fastgpt.tokenizer import Tokenizer


def main(argv: Sequence[str], parser_class: type[argparse.ArgumentParser]) -> int:
    """Explain one text, in words, as JSON, as plots, as a page.

    Raises:
        ValueError, ImportError, OSError: in one line.
    """
    parser = parser_class(
        "fastgpt explain",
        description="Show what a model looks at, and why it goes on with a text as it does:"
        " attention, logit lens, attribution to the tokens, and what is lost without each head.",
    )
    parser.add_argument("text", metavar="TEXT", help="what the model is to go on with")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a checkpoint, the folder of a run, one that transformers saved, with its"
        " tokenizer.json, or a .gguf file",
    )  # fmt: skip
    parser.add_argument("--target", metavar="TOKEN", help="explain this token, not the likeliest")
    for name, told in (
        ("layers", "layers"), ("heads", "heads"), ("rows", "positions that look"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", metavar="N,...",
            help=f"{told} whose attention is kept, from 0, or from the end as -1; all without",
        )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write one interactive page, by itself")
    parser.add_argument("--png", metavar="DIR", help="write plots into this folder")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON instead")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(argv)
    numbers = {name: _numbers(name, getattr(args, name)) for name in ("layers", "heads", "rows")}
    if args.png is not None:
        from fastgpt.interpret.plots import needs_matplotlib

        needs_matplotlib()
    from fastgpt.interpret.explanation import explain_text
    from fastgpt.interpret.terminal import report

    model, tokenizer = read(args.checkpoint, args.device)
    found = explain_text(model, tokenizer, args.text, target=args.target, **numbers)
    print(json.dumps(found.as_json(), ensure_ascii=False) if args.json else report(found))
    written = []
    if args.html is not None:
        from fastgpt.interpret import page

        page.write(found, args.html)
        written.append(args.html)
    if args.png is not None:
        from fastgpt.interpret.plots import draw

        written += draw(found, Path(args.png))
    if written and not args.json:
        print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _numbers(name: str, given: str | None) -> list[int] | None:
    if given is None or given == "all":
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(
            f"explain: --{name} must be integers with commas between; got {given!r}"
        ) from None


def read(source: str, device: str) -> "tuple[GPT, Tokenizer]":
    """A model and its tokenizer, from a checkpoint, a folder of transformers' or a GGUF file.

    Raises:
        ValueError: there is no such model, or no tokenizer beside it.
    """
    from fastgpt import lora
    from fastgpt.model import GPT
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.train.checkpoint import find, load, read_json
    from fastgpt.train.checkpoint.folder import FORMAT
    from fastgpt.train.device import pick_device

    where, here = pick_device(device), Path(source).expanduser()
    try:
        ours = read_json(find(here) / "config.json").get("format") == FORMAT
    except ValueError:
        ours = False
    if ours:
        model, tokenizer = load(here, where)
        if any(lora.layers(model)):
            lora.merge(model)
        return model.eval(), tokenizer
    model = GPT.from_pretrained(source).to(where)
    file = here if here.suffix == ".gguf" else here / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"explain: a text needs {file}, which is not there")
    return model, Tokenizer.load(file)
