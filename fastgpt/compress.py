"""Smaller models: weights of 8 or 4 bits, what that saves and what it costs.

    int8    a byte a weight and one scale a row; on a CPU with VNNI or AMX activations become bytes
            too, each row by its own range
    int4    half a byte a weight, with a scale and a least value for each 32; embedding and output
            layer stay int8

Rounding is to nearest, with no data: see `fastgpt.quantized`. Biases, norms and learned positions
keep their dtype, which is that of what is computed.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import lora
from fastgpt.config import QUANTIZED
from fastgpt.generation.tokens import stream
from fastgpt.model import GPT
from fastgpt.quantized import Quantized, swap
from fastgpt.tokenizer import Tokenizer

ROWS = 8  # of an evaluation's forward pass
PROMPT, NEW = 16, 64  # tokens of a timing
TOKENIZER = "tokenizer.json"


def compress(model: GPT, to: str) -> GPT:
    """Quantise a model's linear layers and token embedding, in place.

    The model then predicts and generates, without gradients to these weights. Its config says
    quantized, so what is saved of it is loaded as it is.

    Args:
        model: of float weights; LoRA is merged.
        to: "int8" or "int4".

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: to is neither, the model is quantised, or its widths do not fit int4.
    """
    if to not in QUANTIZED:
        raise ValueError(f"compress: to must be {' or '.join(QUANTIZED)}; got {to!r}")
    if model.config.quantized is not None:
        raise ValueError(
            f"compress: the model must have float weights; it has {model.config.quantized}"
        )
    if any(lora.layers(model)):
        lora.merge(model)
    swap(model, to)
    model.config = replace(model.config, quantized=to)
    return model.eval()


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


def command(source: str, to: str, out: str | None, text: str | None) -> None:
    """Quantise a model from and to files, and print its table; see `fastgpt compress --help`.

    Raises:
        ValueError: there is no such model; out is where it came from; the text has no tokenizer.
    """
    from fastgpt.data import read_text

    if to not in QUANTIZED:
        raise ValueError(f"compress: to must be {' or '.join(QUANTIZED)}; got {to!r}")
    here = Path(source).expanduser()
    if out is not None and Path(out).expanduser().resolve() == here.resolve():
        raise ValueError(f"compress: out must be another folder than the model's; got {out}")
    model, tokenizer, step = _read(source)
    tokens, lengths = None, None
    if text is not None:
        if tokenizer is None:
            raise ValueError(f"compress: a text needs {here / TOKENIZER}, which is not there")
        tokens = torch.tensor(tokenizer.encode(read_text(text)))
        lengths = token_lengths(tokenizer, model.config.vocab_size)
        if len(tokens) < 2:
            raise ValueError(f"compress: the text must be at least 2 tokens; got {len(tokens)}")
    before = measure(model, tokens, lengths)
    dtype = str(model.dtype).removeprefix("torch.")
    compress(model, to)
    print(table({dtype: before, to: measure(model, tokens, lengths)}))
    if out is None:
        return
    if step is None or tokenizer is None:
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save(Path(out) / TOKENIZER)
    else:
        from fastgpt.train import CheckpointConfig
        from fastgpt.train.checkpoint import Checkpointer

        Checkpointer(out, CheckpointConfig(asynchronous=False)).save(step, model, tokenizer)
    print(f"written: {out}")


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
