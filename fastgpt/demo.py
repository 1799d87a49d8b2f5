"""The whole of it in three minutes: text, tokenizer, training, result, sample, and the ops.

The text is one that lies on every machine with Python: the language's own reference.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastgpt.data import Tokens, read_text, unigram_bits
from fastgpt.generation.tokens import stream
from fastgpt.lab import agreement
from fastgpt.ops.backend import explain
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    Step,
    TrainConfig,
    Trainer,
    checkpoint,
)  # fmt: skip
from fastgpt.train.run import open_folder, prepare, run

PROMPT = 'The "for" statement'
NEW_TOKENS = 96
INTERPRETER_SECONDS = 60.0


def demo(
    text: Sequence[str] = (),
    out: str = "runs/demo",
    minutes: float = 2.0,
    prompt: str | None = None,
    seed: int = 0,
) -> bool:
    """Train a small GPT on real text, print what it learned, and keep it in out.

    Args:
        text: UTF-8 files; none is Python's language reference.
        out: the folder for the checkpoint; an earlier demo's there is replaced.
        minutes: how long to train.
        prompt: what to continue; None is a sentence's beginning from the text.
        seed: of everything drawn.

    Returns:
        Whether the training came to its end, and was not stopped.

    Raises:
        ValueError: the text or the folder cannot be used.
    """
    begun = time.monotonic()
    config = TrainConfig(
        out=out,
        seed=seed,
        steps=1500,
        max_seconds=60.0 * minutes,
        model=ModelConfig(block_size=128),
        data=DataConfig(files=tuple(text)),
        batch=BatchConfig(rows=8),
        optim=OptimConfig(lr=1e-3, beta2=0.99),
        schedule=ScheduleConfig(warmup=50),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )
    title, documents = _documents(text)
    trainer = prepare(config, documents)
    open_folder(Path(out))

    train, held_out = _ids(trainer)
    tokenizer, model = trainer.tokenizer, trainer.model
    sizes = [sum(_lengths(tokenizer, ids)) for ids in (train, held_out)]
    _section("Text")
    print(title)
    print(f"{sizes[0]:,} bytes to train on, {sizes[1]:,} held out; repeated paragraphs left out")
    _section("Tokenizer")
    print(
        f"byte-level BPE trained on the training part: {tokenizer.vocab_size} ids,"
        f" {sizes[0] / len(train):.2f} bytes a token"
    )
    print(f"{len(train):,} tokens to train on, {len(held_out):,} held out")
    _section("Model")
    c = model.config
    print(
        f"GPT, {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}:"
        f" {model.num_params():,} parameters"
    )
    dtype = str(trainer.dtype).removeprefix("torch.")
    print(f"on {trainer.layout.device}, matrix products in {dtype}; at most {minutes:g} minutes")
    _section("Training")
    tune = _Threads(trainer) if trainer.layout.device.type == "cpu" else lambda made: None
    run(trainer, Path(out), tune)
    if not trainer.done:
        print(f"stopped after {trainer.steps_done} steps")
        return False
    tokens = trainer.steps_done * c.block_size * trainer.rows
    print(
        f"{trainer.steps_done} steps, {tokens:,} tokens ({tokens / len(train):.1f} times the text)"
        f" in {trainer.seconds:.0f} s"
    )
    _section("Held-out text")
    _report(trainer)
    print(f"checkpoint: {checkpoint.find(out)}")
    _section("Sample")
    _sample(trainer, _prompt(prompt, text, tokenizer, held_out), seed)
    _section("Ops")
    for choice in explain():
        print(f"trained with {choice}")
    print("largest error against float64:")
    try:
        print(agreement.measure(INTERPRETER_SECONDS))
    except RuntimeError as error:
        print(f"not measured: {error}")
    print(f"\ndone in {time.monotonic() - begun:.0f} s")
    return True


def _documents(text: Sequence[str]) -> tuple[str, list[str]]:
    """A line about the text, and its documents."""
    if text:
        return ", ".join(text), [read_text(path) for path in text]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "demo: this Python comes without its reference, pydoc_data.topics; give --text FILE"
        ) from None
    return f"Python's language reference, {len(topics)} topics", list(topics.values())


def _ids(trainer: Trainer) -> tuple[Tokens, Tokens]:
    """Of the training part and the held-out part."""
    parts = (trainer.batches.part, trainer.held_out.part)
    train, held_out = (part.read(0, len(part))[0] for part in parts)
    return train, held_out


def _lengths(tokenizer: Tokenizer, ids: Tokens) -> list[int]:
    table = [len(b) for b in tokenizer.token_bytes]
    return [table[id] for id in ids.tolist()]


def _report(trainer: Trainer) -> None:
    """The model beside what knows frequencies only."""
    train, held_out = _ids(trainer)
    tokenizer = trainer.tokenizer
    per_token = unigram_bits(train, held_out, tokenizer.vocab_size)
    a_token = sum(_lengths(tokenizer, held_out)) / len(held_out)
    table = tokenizer.token_bytes
    raw = [
        np.frombuffer(b"".join(table[id] for id in ids.tolist()), np.uint8)
        for ids in (train, held_out)
    ]
    result = trainer.evaluate()
    print(f"{'':<34}{'nats/token':>11}{'bits/byte':>11}")
    print(f"{'frequencies of bytes':<34}{'':>11}{unigram_bits(raw[0], raw[1], 256):>11.3f}")
    nats = per_token * float(np.log(2.0))
    print(f"{'frequencies of tokens (unigram)':<34}{nats:>11.3f}{per_token / a_token:>11.3f}")
    print(f"{'this model':<34}{result.loss:>11.3f}{result.bits_per_byte:>11.3f}")


def _prompt(prompt: str | None, text: Sequence[str], tokenizer: Tokenizer, ids: Tokens) -> str:
    if prompt is not None:
        return prompt
    if not text:
        return PROMPT
    return tokenizer.decode(ids[:8].tolist()).rstrip("\ufffd")


def _sample(trainer: Trainer, prompt: str, seed: int) -> None:
    model, tokenizer = trainer.model, trainer.tokenizer
    ids = torch.tensor([tokenizer.encode(prompt)], device=trainer.layout.device)
    n = min(NEW_TOKENS, model.config.block_size - ids.shape[1])
    new = stream(model, ids, n, temperature=0.8, top_p=0.95, seed=seed, eos=tokenizer.eos)
    sys.stdout.write(prompt)
    for piece in tokenizer.stream(int(token) for token in new):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _section(name: str) -> None:
    print(f"\n{name}\n{'-' * len(name)}", flush=True)


class _Threads:
    """Keeps torch at the number of threads that is fastest now.

    PyTorch's threads wait for each other after every op. Where another process has one of the
    cores they wait for its time slices, and one thread is several times as fast as two. Every
    SECONDS each number makes one step, and the fastest makes those that follow.
    """

    SECONDS = 30.0

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        most = torch.get_num_threads()
        self._numbers = sorted({most, max(1, most // 2), 1}, reverse=True)
        self._left: list[int] = []
        self._times: dict[int, float] = {}
        self._since = 0.0  # trainer.seconds when the step began
        self._next = 0.0

    def __call__(self, made: Step) -> None:
        now = self._trainer.seconds
        if self._left:
            self._times[self._left.pop()] = now - self._since
            if self._left:
                torch.set_num_threads(self._left[-1])
            else:
                torch.set_num_threads(min(self._times, key=self._times.__getitem__))
        elif now >= self._next and len(self._numbers) > 1:
            self._next = now + self.SECONDS
            self._left = self._numbers[::-1]
            torch.set_num_threads(self._left[-1])
        self._since = now
