"""The commands `fastgpt generate`, `fastgpt chat` and `fastgpt next`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.generation.completion import Completion
    from fastgpt.generation.sampling import Sampling
    from fastgpt.tokenizer import Tokenizer

DEMO = "runs/demo"  # where `fastgpt demo` writes
TEMPERATURE = 0.8
REPLY = 256  # tokens
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generate(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    """Continue a prompt; return the exit code."""
    parser = kind("fastgpt generate", description="Continue a prompt with a trained model.")
    _add_prompt(parser, "without any a document begins")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="the most tokens; without it all that the context has room for",
    )  # fmt: skip
    _add_sampling(parser, TEMPERATURE)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--n", type=int, default=1, help="how many texts (%(default)s)")
    parser.add_argument("--beams", type=int, help="beam search with so many; nothing is drawn")
    parser.add_argument(
        "--length-penalty", type=float, help="of beams: above 0 longer ones gain (1.0)"
    )
    parser.add_argument(
        "--early-stopping", choices=("yes", "no", "never"),
        help="of beams: end when as many have ended; or when no open one is better (no), or can"
        " become so (never)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--stop-id", type=int, action="append", default=[], metavar="ID", help="end at this token"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on where the model ends the text"
    )
    parser.add_argument(
        "--overflow", choices=("refuse", "slide"), default="refuse",
        help="a text too long for the context: refuse it, or forget its older part (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--logprobs", type=int, nargs="?", const=0, metavar="K",
        help="list the tokens with their log-probabilities, and the K likeliest at each",
    )  # fmt: skip
    parser.add_argument(
        "--draft", metavar="MODEL",
        help="speculative decoding, with the same distribution: several tokens at a time are"
        " proposed by a smaller model of the same vocabulary, or by what stood in the text before"
        " (lookup), and kept where the model agrees",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.beams is not None:
        _check_beams(args)
    if args.draft is not None:
        _check_draft(args)
    for name in ("length_penalty", "early_stopping"):
        if args.beams is None and getattr(args, name) is not None:
            raise ValueError(f"generate: --{name.replace('_', '-')} is of beams; give --beams")
    for stop in args.stop:
        _check_text(stop, "--stop")
    sampling = _sampling(args, TEMPERATURE)

    from fastgpt.generation.beam import beam_search
    from fastgpt.generation.completion import Writing
    from fastgpt.generation.terminal import SEPARATOR, listed, say, stream_out

    model, tokenizer, text, ids = _open(args)
    eos = [*args.stop_id]
    if tokenizer is not None and tokenizer.eos is not None and not args.ignore_eos:
        eos.append(tokenizer.eos)
    if args.beams is not None:
        early: Any = {"yes": True, "never": "never"}.get(args.early_stopping, False)
        penalty = 1.0 if args.length_penalty is None else args.length_penalty
        (made,) = beam_search(
            model, [ids], args.max_new_tokens, tokenizer=tokenizer, beams=args.beams, n=args.n,
            length_penalty=penalty, early_stopping=early, eos=eos,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
    else:
        writing = Writing(
            model, [ids], args.max_new_tokens, tokenizer=tokenizer, n=args.n, sampling=sampling,
            seed=args.seed, eos=eos, stop=args.stop, logprobs=args.logprobs,
            overflow=args.overflow, draft=None if args.draft is None else _draft(args),
        )  # fmt: skip
        if not args.json and args.logprobs is None:
            stream_out(writing, text, args.n, tokenizer is not None)
            return 0
        for _ in writing:
            pass
        (made,) = writing.completions()
    if args.json:
        print(json.dumps(_told(text, ids, made), ensure_ascii=False))
        return 0
    for n, one in enumerate(made):
        if n:
            print(SEPARATOR)
        if one.score is not None:
            print(f"score {one.score:.4f}")
        say(text + one.text if tokenizer is not None else " ".join(map(str, one.ids)))
        print()
        if args.logprobs is not None:
            print(listed(one, tokenizer))
    return 0


def chat(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    """Talk with a model; return the exit code."""
    parser = kind(
        "fastgpt chat",
        description="Talk with a model that was trained on messages, a line each. /reset forgets"
        " the conversation; Ctrl-C ends a reply, Ctrl-D leaves.",
    )
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument(
        "--turn", metavar="TEXT",
        help="how a message is written, as --data.turn of its training; without it that of the"
        " run, or fastgpt's default",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=REPLY, metavar="N",
        help="the most tokens of a reply, and of half the context (%(default)s)",
    )  # fmt: skip
    _add_sampling(parser, TEMPERATURE)
    parser.add_argument("--seed", type=int, help="the same seed gives the same conversation")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"chat: max_new_tokens must be at least 1; got {args.max_new_tokens}")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"chat: a seed must not be negative; got {args.seed}")
    sampling = _sampling(args, TEMPERATURE)
    if args.system is not None:
        _check_text(args.system, "--system")

    import torch

    from fastgpt.data.config import DataConfig
    from fastgpt.generation.chat import Conversation
    from fastgpt.generation.source import turn_of
    from fastgpt.generation.terminal import converse

    model, tokenizer = _read_model(args)
    assert tokenizer is not None
    turn = DataConfig(turn=turn_of(args.model) if args.turn is None else args.turn).turn
    talk = Conversation(model, tokenizer, turn, args.system)
    new = min(args.max_new_tokens, model.config.block_size // 2)
    seed = int(torch.randint(2**62, ())) if args.seed is None else args.seed
    converse(talk, new, sampling, seed)
    return 0


def next_token(argv: Sequence[str], kind: type[argparse.ArgumentParser]) -> int:
    """Show the distribution of the next token; return the exit code."""
    parser = kind(
        "fastgpt next", description="What may come after a prompt, and how likely each token is."
    )
    _add_prompt(parser, "one must be given")
    parser.add_argument("--top", type=int, default=10, help="tokens to show (%(default)s)")
    _add_sampling(parser, 1.0)
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot them, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise ValueError(f"next: top must be at least 1; got {args.top}")
    if all(one is None for one in (args.prompt, args.text, args.file, args.ids)):
        raise ValueError("next: there must be a prompt; got none")
    sampling = _sampling(args, 1.0)

    from fastgpt.generation import show
    from fastgpt.generation.terminal import note

    model, tokenizer, text, ids = _open(args)
    found = show.next_token(model, ids, args.top, tokenizer, sampling)
    if args.json:
        told = {
            "prompt": text, "ids": ids, "entropy": found.entropy, "possible": found.possible,
            "next": [vars(one) for one in found.likeliest],
        }  # fmt: skip
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(show.table(found))
    if args.png is not None:
        title = text if tokenizer is not None else " ".join(map(str, ids))
        title = title if len(title) <= 40 else "…" + title[-40:]
        if said := show.plot(found, title.replace("\n", " "), args.png):
            note(said)
    return 0


# --- what is asked --------------------------------------------------------------------------------


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", "--checkpoint", default=DEMO, metavar="MODEL",
        help="a checkpoint, the folder of a run, or what GPT.from_pretrained takes: a folder in"
        " Hugging Face's layout, a GGUF file, a name on its Hub (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; the model's without")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def _add_prompt(parser: argparse.ArgumentParser, without: str) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument("prompt", nargs="?", metavar="PROMPT", help=f"a text; {without}")
    one.add_argument(
        "--prompt", dest="text", metavar="TEXT", help="the same, where it begins with a dash"
    )
    one.add_argument(
        "--file", metavar="FILE",
        help="read it from a file, or with - from standard input, without its last newline",
    )  # fmt: skip
    one.add_argument("--ids", metavar="ID,ID,...", help="it is these ids")
    _add_model(parser)


def _add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    for name, type_, told in (
        ("temperature", float, f"divides the logits; 0 takes the likeliest token ({temperature})"),
        ("top-k", int, "choose among the k likeliest tokens"),
        ("top-p", float, "choose among the likeliest tokens with this probability together"),
        ("min-p", float, "choose among tokens at least so likely relative to the likeliest"),
        ("repetition-penalty", float, "above 1 what came before is less likely (1.0)"),
    ):
        parser.add_argument(f"--{name}", type=type_, help=told)


def _sampling(args: argparse.Namespace, temperature: float) -> "Sampling":
    from fastgpt.generation.sampling import Sampling

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return Sampling(**{"temperature": temperature} | given)


def _check_beams(args: argparse.Namespace) -> None:
    """Refuse what does not go with a beam search."""
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"generate: --beams draws nothing and goes with no --{name.replace('_', '-')};"
                f" got {getattr(args, name)}"
            )
    if args.stop:
        raise ValueError("generate: --beams ends at tokens, by --stop-id, and goes with no --stop")
    if args.overflow == "slide":
        raise ValueError("generate: --beams goes with no --overflow slide")


def _check_draft(args: argparse.Namespace) -> None:
    """Refuse what does not go with speculative decoding."""
    if args.overflow == "slide":
        raise ValueError("generate: --draft goes with no --overflow slide")
    for name in ("beams", "logprobs"):
        if getattr(args, name) is not None:
            raise ValueError(f"generate: --draft goes with no --{name}; got {getattr(args, name)}")


def _draft(args: argparse.Namespace) -> Any:
    from fastgpt.generation.source import read_model
    from fastgpt.generation.speculative import Lookup
    from fastgpt.train.device import pick_device

    if args.draft == "lookup":
        return Lookup()
    return read_model(args.draft, device=pick_device(args.device), texts=False)[0]


def _check_text(text: str, name: str) -> None:
    """Refuse what was no UTF-8 on the command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(
            f"generate: {name} must be UTF-8; got byte 0x{byte:02x} at character {error.start}"
        ) from None


def _read_model(args: argparse.Namespace, texts: bool = True) -> "tuple[Any, Tokenizer | None]":
    from fastgpt.generation.source import read_model
    from fastgpt.train.device import pick_device

    if args.model == DEMO and not Path(DEMO).exists():
        raise ValueError(
            f"generate: there is no {DEMO}, which `fastgpt demo` makes; name another by --model"
        )
    return read_model(args.model, args.tokenizer, pick_device(args.device), texts=texts)


def _open(args: argparse.Namespace) -> "tuple[Any, Tokenizer | None, str, list[int]]":
    """Model, tokenizer, and the prompt as text and as ids."""
    text, given = "", None
    if args.ids is not None:
        try:
            given = [int(id) for id in args.ids.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"generate: --ids must be whole numbers; got {args.ids!r}") from None
    elif args.file is not None:
        text = _read_text(args.file)
    else:
        text = args.prompt or args.text or ""
        _check_text(text, "the prompt")
    model, tokenizer = _read_model(args, texts=given is None)
    if given is not None:
        from fastgpt.generation.completion import prompt_ids

        (ids,) = prompt_ids([given], model)
        return model, tokenizer, "" if tokenizer is None else tokenizer.decode(ids), ids
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    if not ids:
        if tokenizer.eos is None:
            raise ValueError("generate: this tokenizer has no end of text; give a prompt")
        ids = [tokenizer.eos]
    return model, tokenizer, text, ids


def _read_text(path: str) -> str:
    from fastgpt.generation.terminal import utf8

    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    text = utf8(raw, "generate: " + ("standard input" if path == "-" else path))
    return text.removesuffix("\n").removesuffix("\r")


def _told(text: str, ids: list[int], made: "Sequence[Completion]") -> dict[str, Any]:
    completions = [
        {name: value for name, value in vars(one).items() if value is not None} for one in made
    ]
    return {"prompt": text, "ids": ids, "completions": completions}
