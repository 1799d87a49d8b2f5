"""A training run in its folder: data and tokenizer, log, progress bar, checkpoints, resume.

out/train.npy, out/held_out.npy    the ids trained on and those held out
out/run.yaml                       the configuration, as `fastgpt train --config` reads it
out/log.jsonl                      a line of JSON every log.every steps and every evaluation
out/step-.../                      checkpoints, see checkpoint/
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastgpt.data import read_text, read_tokens, split, tokenize, write_tokens
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint
from fastgpt.train.config import TrainConfig, check_same_run, flat, to_yaml
from fastgpt.train.loop import Evaluation, Step, Trainer, pick_device

TRAIN, HELD_OUT = "train.npy", "held_out.npy"


def train(config: TrainConfig) -> Trainer:
    """Train a model on text files, or go on with a run that was stopped, as config.resume says.

    SIGINT (Ctrl-C) and SIGTERM end it after the step under way, with a checkpoint.

    Args:
        config: of the run. A resumed run must keep the fields that make its numbers.

    Returns:
        The trainer; its `done` tells whether the run came to its end.

    Raises:
        ValueError: the text, the tokenizer, the folder or the configuration cannot be used.
        OSError: a file cannot be read or written.
    """
    out = Path(config.out)
    pick_device(config.device)
    begun = bool(checkpoint.checkpoints(out))
    if config.resume == "must" or (config.resume == "auto" and begun):
        trainer = _resume(config, out)
    else:
        if begun:
            raise ValueError(f"train: out must not hold a run, except to resume it; got {out}")
        if not config.data.files:
            raise ValueError("train: data.files must name at least one text file; got none")
        texts = [read_text(path) for path in config.data.files]
        given = config.data.tokenizer
        tokenizer = None if given is None else Tokenizer.load(given)
        trainer = prepare(config, texts, tokenizer)
        open_folder(out)
        write_tokens(out / TRAIN, trainer.batches.tokens)
        write_tokens(out / HELD_OUT, trainer.held_out.tokens)
        (out / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    run(trainer, out)
    return trainer


def prepare(
    config: TrainConfig, documents: Sequence[str], tokenizer: Tokenizer | None = None
) -> Trainer:
    """Split documents, train a tokenizer on the training part, make the model and its trainer.

    Raises:
        ValueError: a part of the text is shorter than the context.
    """
    training, held_out = split(documents, config.data.held_out, config.seed)
    if tokenizer is None:
        tokenizer = Tokenizer.train(training, config.data.vocab_size)
    shape = config.model.shape(tokenizer.vocab_size)
    ids = tokenize(tokenizer, training), tokenize(tokenizer, held_out)
    for name, part in zip(("training", "held-out"), ids, strict=True):
        if len(part) <= shape.block_size:
            raise ValueError(
                f"text: its {name} part must be longer than the context, block_size"
                f" {shape.block_size} tokens; got {len(part)} tokens"
            )
    torch.manual_seed(config.seed)
    return Trainer(config, GPT(shape), tokenizer, *ids)


def open_folder(out: Path) -> None:
    """Make the folder, and see that it can be written, before any work is done.

    Raises:
        ValueError: it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"out: the folder must be writable; got {out} ({error.strerror})"
        ) from None


def run(trainer: Trainer, out: Path, on_step: Callable[[Step], object] = lambda made: None) -> None:
    """Train to the end or to a signal, with a progress bar, a log and checkpoints in out."""
    extra = {"config": flat(trainer.config)}

    with interrupts() as stop, _Log(out / "log.jsonl", trainer) as log:

        def step(made: Step) -> None:
            log.step(made)
            on_step(made)

        saver = checkpoint.Checkpointer(out, trainer.config.checkpoint)
        trainer.fit(stop, step, log.evaluation, lambda: trainer.save(saver, extra))
        saver.wait()


def _resume(config: TrainConfig, out: Path) -> Trainer:
    saver = checkpoint.Checkpointer(out, config.checkpoint)
    folder = saver.latest() or checkpoint.find(out)
    state = checkpoint.read_json(folder / "train.json")
    before = state.get("config")
    if not isinstance(before, dict):
        raise ValueError(f"checkpoint: {folder}/train.json must hold the run's config")
    check_same_run(before, config)
    model, tokenizer = checkpoint.load(folder)
    trainer = Trainer(
        config, model, tokenizer, read_tokens(out / TRAIN), read_tokens(out / HELD_OUT)
    )
    trainer.restore(saver, folder)
    return trainer


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only set what the yielded function tells; a second SIGINT ends."""
    got: list[int] = []

    def note(signum: int, frame: object) -> None:
        if got and signum == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread only
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(got)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Log:
    """Lines of JSON in a file, and a bar on standard error."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self._path, self._trainer = path, trainer

    def __enter__(self) -> "_Log":
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(
                "train: needs the package tqdm; pip install 'fastgpt-triton[train]'"
            ) from None
        t = self._trainer
        self._forget_after(t.steps_done)
        self._file = open(self._path, "a", encoding="utf-8")
        self._bar = tqdm(
            total=1.0,  # the bar is the share of the run, by steps or by time
            initial=t.progress(),
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}",
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            file=sys.stderr,
        )
        self._tokens_a_step = t.rows * t.batches.block_size
        self._since, self._at = t.seconds, t.steps_done
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()

    def step(self, made: Step) -> None:
        t = self._trainer
        if made.step % t.config.log.every == 0 or t.done:
            spent = max(1e-9, t.seconds - self._since)
            rate = (made.step - self._at) * self._tokens_a_step / spent
            self._since, self._at = t.seconds, made.step
            self._bar.set_postfix_str(
                f"step {made.step}, loss {made.loss:.3f}, {rate:,.0f} tokens/s", refresh=False
            )
            self._write(asdict(made) | {"tokens_per_second": round(rate, 1)})
        self._bar.update(t.progress() - self._bar.n)

    def evaluation(self, step: int, result: Evaluation) -> None:
        self._since = self._trainer.seconds
        self._bar.write(
            f"step {step}: held-out loss {result.loss:.3f}, perplexity {result.perplexity:.1f},"
            f" {result.bits_per_byte:.3f} bits/byte",
            file=sys.stderr,
        )
        self._write({"step": step} | {f"held_out_{k}": v for k, v in asdict(result).items()})

    def _write(self, line: dict[str, Any]) -> None:
        seconds = round(self._trainer.seconds, 3)
        self._file.write(json.dumps(line | {"seconds": seconds, "time": time.time()}) + "\n")
        self._file.flush()

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that the checkpoint does not hold: they are made again."""
        kept = []
        if step and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, self._path)
