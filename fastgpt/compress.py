"""Smaller models: weights of 8 or 4 bits, fewer of them, what that saves and what it costs.

    int8    a byte a weight and one scale a row; on a CPU with VNNI or AMX activations become bytes
            too, each row by its own range
    int4    half a byte a weight, with a scale and a least value for each 32; embedding and output
            layer stay int8
    prune=0.5   half of the heads and of the feed-forward's columns go, see `fastgpt.prune`

Rounding is to nearest, with no data: see `fastgpt.quantized`. Biases, norms and learned positions
keep their dtype, which is that of what is computed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import lora
from fastgpt.config import QUANTIZED
from fastgpt.data import Corpus, Part, read_text
from fastgpt.generation.tokens import stream
from fastgpt.model import GPT
from fastgpt.prune import heal, prune, windows
from fastgpt.quantized import Quantized, swap
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import Step
from fastgpt.train.device import pick_device

ROWS = 8  # of an evaluation's forward pass
PROMPT, NEW = 16, 64  # tokens of a timing
MOST = 2**18  # tokens of a corpus that are predicted
TOKENIZER = "tokenizer.json"


def compress(model: GPT, to: str, rows: Tensor | None = None) -> GPT:
    """Make a model smaller, in place: quantise its linear layers and token embedding, or prune it.

    A quantised model predicts and generates, without gradients to these weights. The config tells
    what was done, so what is saved is loaded as it is. A pruned model is to be healed next, by
    `fastgpt.prune.heal` or any other training, and may be quantised after.

    Args:
        model: of float weights; LoRA is merged.
        to: "int8", "int4", or "prune=0.5" with the share to remove.
        rows: (n, T + 1) int64, text that tells what to prune, see `fastgpt.prune.prune`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: to is none of these, the model is quantised, or its widths do not fit int4.

    Examples:
        >>> model = fastgpt.GPT(fastgpt.GPTConfig.preset("tiny"))
        >>> fastgpt.compress(model, "int8").config.quantized
        'int8'
    """
    if (share := _share(to)) is not None:
        return prune(model, share, rows)
    if model.config.quantized is not None:
        raise ValueError(
            f"compress: the model must have float weights; it has {model.config.quantized}"
        )
    if any(lora.layers(model)):
        lora.merge(model)
    swap(model, to)
    model.config = replace(model.config, quantized=to)
    return model.eval()


def _share(to: str) -> float | None:
    """What to remove by pruning; None for int8 and int4."""
    if to in QUANTIZED:
        return None
    name, _, number = to.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if name != "prune" or not 0.0 < share < 1.0:
        raise ValueError(
            "compress: to must be int8, int4 or prune=SHARE with a share between 0 and 1;"
            f" got {to!r}"
        )
    return share


@dataclass(frozen=True)
class Measured:
    """What a model takes and gives.

    Attributes:
        weights: bytes of the weights, as in a file.
        memory: the same with the copies in the CPU's order that int8 and int4 layers keep.
        loss: nats a token of the text; None without one.
        bits_per_byte: of the text; None without one, or without a tokenizer's bytes.
        tokens_per_second: one row, 64 tokens after 16; None where the context is shorter.
    """

    weights: int
    memory: int
    loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None


def measure(
    model: GPT, tokens: Tensor | None = None, token_bytes: Sequence[int] | None = None
) -> Measured:
    """Size, loss on a text, and speed of a model on this machine.

    Args:
        model: any GPT.
        tokens: (n,) int64, n at least 2, a text's ids.
        token_bytes: bytes of UTF-8 of each id.
    """
    loss, per_byte = None, None
    if tokens is not None:
        loss = _loss(model, tokens)
        if token_bytes is not None:
            length = sum(token_bytes[i] for i in tokens[1:].tolist())
            per_byte = loss * (len(tokens) - 1) / math.log(2.0) / max(1, length)
    speed = _speed(model)
    weights = sum(t.nbytes for t in model.state_dict().values())
    kept = [t for m in model.modules() if isinstance(m, Quantized) for t in m.copies()]
    memory = weights + sum(t.numel() * t.dtype.itemsize for t in kept)
    return Measured(weights, memory, loss, per_byte, speed)


@torch.no_grad()
def _loss(model: GPT, tokens: Tensor) -> float:
    """Mean nats a token, in rows of the context's length that do not overlap."""
    T = min(model.config.block_size, len(tokens) - 1)
    n = -(-(len(tokens) - 1) // T)
    rows = F.pad(tokens, (0, n * T + 1 - len(tokens)), value=-1)
    ids, targets = rows[:-1].view(n, T), rows[1:].view(n, T)
    training, device = model.training, model.ln_f.weight.device
    model.eval()
    total = 0.0
    for x, y in zip(ids.split(ROWS), targets.split(ROWS), strict=True):
        seen = y.masked_fill(y < 0, -100)
        loss = model(x.clamp(min=0).to(device), seen.to(device))
        total += float(loss) * int((y >= 0).sum())
    model.train(training)
    return total / (len(tokens) - 1)


def _speed(model: GPT) -> float | None:
    c = model.config
    if c.block_size < PROMPT + NEW:
        return None
    ids = torch.arange(PROMPT, device=model.ln_f.weight.device)[None] % c.vocab_size
    best = math.inf
    for _ in range(3):
        tokens = stream(model, ids, NEW, temperature=0.0)
        start = time.perf_counter()
        for token in tokens:
            token.tolist()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return NEW / best


def table(rows: dict[str, Measured]) -> str:
    """Measurements below each other, the first row's the standard of the changes in loss."""
    heads = ("", "weights", "memory", "nats/token", "", "bits/byte", "tokens/s")
    lines = [heads]
    first = next(iter(rows.values()))
    for name, m in rows.items():
        change = ""
        if m is not first and m.loss is not None and first.loss:
            change = f"{m.loss / first.loss - 1.0:+.2%}"
        lines.append((
            name, f"{m.weights / 1e6:.1f} MB", f"{m.memory / 1e6:.1f} MB",
            "-" if m.loss is None else f"{m.loss:.4f}", change,
            "-" if m.bits_per_byte is None else f"{m.bits_per_byte:.4f}",
            "-" if m.tokens_per_second is None else f"{m.tokens_per_second:.1f}",
        ))  # fmt: skip
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(z))
        .rstrip()
        for z in (list(zip(line, wide, strict=True)) for line in lines)
    )  # fmt: skip


def token_lengths(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Bytes of UTF-8 of each id of a model."""
    lengths = [len(b) for b in tokenizer.token_bytes]
    return lengths + [0] * (vocab_size - len(lengths))


def command(
    source: str, to: Sequence[str], out: str | None = None, text: str | None = None,
    train_text: str | None = None, heal_steps: int = 0, heal_lr: float = 3e-4,
    device: str = "cpu", on_step: Callable[[Step], None] = lambda made: None,
) -> None:  # fmt: skip
    """Make a model of files smaller, write it, print its table; see `fastgpt compress --help`.

    Raises:
        ValueError: there is no such model; out is where it came from; a text has no tokenizer, or
            is the same twice; what is asked for does not go together.
    """
    _check(source, to, out, text, train_text, heal_steps)
    model, tokenizer, step = _read(source)
    model.to(pick_device(device))
    train, tokens, lengths = None, None, None
    if text is not None or train_text is not None:
        if tokenizer is None:
            file = Path(source).expanduser() / TOKENIZER
            raise ValueError(f"compress: a text needs {file}, which is not there")
        lengths = token_lengths(tokenizer, model.config.vocab_size)
        train, tokens = _texts(text, train_text, tokenizer)
    rows: dict[str, Measured] = {}
    rows[str(model.dtype).removeprefix("torch.")] = measure(model, tokens, lengths)
    for name in to:
        prunes = name not in QUANTIZED
        seen = None if train is None or not prunes else windows(train, model.config.block_size)
        compress(model, name, seen)
        rows[name] = measure(model, tokens, lengths)
        if prunes and heal_steps and train is not None:
            heal(model, train, heal_steps, lr=heal_lr, on_step=on_step)
            rows[f"{name}, {heal_steps} steps"] = measure(model, tokens, lengths)
    print(table(rows))
    if out is None:
        return
    if step is None or tokenizer is None:
        own = _save(model, out)
        if tokenizer is not None:
            tokenizer.save(Path(out) / TOKENIZER)
    else:
        from fastgpt.train import CheckpointConfig
        from fastgpt.train.checkpoint import Checkpointer

        own = False
        Checkpointer(out, CheckpointConfig(asynchronous=False)).save(step, model, tokenizer)
    print(f"written: {out}" + (", in a layout that fastgpt alone reads" if own else ""))


def _check(
    source: str, to: Sequence[str], out: str | None, text: str | None, train_text: str | None,
    heal_steps: int,
) -> None:  # fmt: skip
    """See that the command's options go together, before any work is done."""
    prunes = [_share(name) is not None for name in to]
    if prunes not in ([True], [False], [True, False]):
        raise ValueError(
            "compress: to may be given twice, first prune=SHARE and then int8 or int4;"
            f" got {', '.join(to)}"
        )
    if out is not None and Path(out).expanduser().resolve() == Path(source).expanduser().resolve():
        raise ValueError(f"compress: out must be another folder than the model's; got {out}")
    corpus = text is not None and Path(text).is_dir()
    if heal_steps < 0:
        raise ValueError(f"compress: heal-steps must not be negative; got {heal_steps}")
    if heal_steps and not (prunes[0] and (corpus or train_text is not None)):
        raise ValueError(
            "compress: heal-steps need prune=SHARE, and train-text or a text that is a corpus"
        )
    if text is not None and train_text is not None and not corpus:
        if Path(text).resolve() == Path(train_text).resolve():
            raise ValueError(
                f"compress: text must be another than train-text, which is learned; got {text}"
            )


def _texts(
    text: str | None, train_text: str | None, tokenizer: Tokenizer
) -> tuple[Part | None, Tensor | None]:
    """What may be learned, and the ids to predict. A corpus has both."""
    parts: dict[str, Part | None] = {}
    for name, path, held_out in (("text", text, True), ("train-text", train_text, False)):
        if path is None:
            parts[name] = None
        elif Path(path).is_dir():
            corpus = Corpus.open(path, tokenizer)
            parts[name] = corpus.held_out if held_out else corpus.train
            if train_text is None:
                parts["learned"] = corpus.train
        else:
            parts[name] = Part.of([tokenizer.encode(read_text(path))])
    part = parts["text"]
    if part is None:
        return parts["train-text"], None
    if len(part) < 2:
        raise ValueError(f"compress: the text must be at least 2 tokens; got {len(part)}")
    ids = part.read(0, min(len(part), MOST))[0]
    return parts.get("learned", parts["train-text"]), torch.from_numpy(ids.astype("int64"))


def _save(model: GPT, out: str) -> bool:
    """Write a folder, in Hugging Face's layout if that has the shape; whether it is our own."""
    try:
        model.save_pretrained(out)
        return model.config.quantized is not None
    except ValueError:
        model.save_pretrained(out, own=True)
        return True


def _read(source: str) -> tuple[GPT, Tokenizer | None, int | None]:
    """A model, its tokenizer, and if it is a checkpoint of fastgpt's its step."""
    from fastgpt.train.checkpoint import find, load, read_json
    from fastgpt.train.checkpoint.folder import FORMAT, TRAIN

    here = Path(source).expanduser()
    try:
        checkpoint = find(here)
        ours = read_json(checkpoint / "config.json").get("format") == FORMAT
    except ValueError:
        ours = False
    if ours:
        model, tokenizer = load(here)
        return model.eval(), tokenizer, int(read_json(checkpoint / TRAIN).get("step", 0))
    model = GPT.from_pretrained(source)
    file = here / TOKENIZER
    return model, Tokenizer.load(file) if file.is_file() else None, None
