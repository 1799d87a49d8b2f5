"""The training loop. Step n is a function of the configuration and the state after step n - 1.

The batch and the dropout masks of a step come from (seed, step) alone, so a run that is stopped
and resumed is, on one device, bit for bit the run that was not.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.data import Batches, Tokens
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.checkpoint import Checkpointer
from fastgpt.train.config import TrainConfig
from fastgpt.train.schedule import set_learning_rate

EVAL_ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """How well held-out text is predicted.

    Attributes:
        loss: mean over tokens, in nats.
        perplexity: exp(loss).
        bits_per_byte: bits of all tokens over the bytes of UTF-8 that they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 1, mean loss in nats, learning rate, gradient norm."""

    step: int
    loss: float
    lr: float
    grad_norm: float


def pick_device(name: str) -> torch.device:
    """The device called name; "auto" is CUDA if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"train: the device must be one that is here; got {name!r}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the device computes in it."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: dict[str, Any] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # not in older versions of torch
        fast = device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


class Trainer:
    """A model, its optimizer, its data, and the step they have reached.

    Args:
        config: of the run.
        model: to train; moved to the run's device.
        tokenizer: of the data.
        train_tokens, held_out_tokens: ids, each longer than the model's block_size.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: GPT,
        tokenizer: Tokenizer,
        train_tokens: Tokens,
        held_out_tokens: Tokens,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.device = pick_device(config.device)
        self.dtype = pick_precision(config.precision, self.device)
        self.model = model.to(self.device)
        self.optimizer = config.optim.build(self.model)
        T = model.config.block_size
        self.rows, self.passes = config.batch.split(T)
        self.batches = Batches(train_tokens, T, self.rows, config.seed)
        self.held_out = Batches(held_out_tokens, T, EVAL_ROWS)
        self.steps_done = 0
        self.seconds = 0.0  # spent in training and evaluation, also before a resume
        lengths = [len(b) for b in tokenizer.token_bytes]
        lengths += [0] * (model.config.vocab_size - len(lengths))
        self._bytes = torch.tensor(lengths)

    @property
    def done(self) -> bool:
        """Whether all steps are made, or the time is over."""
        return self.progress() >= 1.0

    def progress(self) -> float:
        """How much of the run is behind, in [0, 1]: by steps or by time, whichever is further."""
        c = self.config
        spent = 0.0 if c.max_seconds is None else self.seconds / c.max_seconds
        return min(1.0, max(self.steps_done / c.steps, spent))

    def learning_rate(self) -> float:
        """Of the next step."""
        factor = self.config.schedule.factor(self.steps_done, self.progress())
        return self.config.optim.lr * factor

    def step(self) -> Step:
        """Make one optimizer step."""
        start = time.monotonic()
        c = self.config
        lr = self.learning_rate()
        set_learning_rate(self.optimizer, c.schedule.factor(self.steps_done, self.progress()))
        torch.manual_seed(int(np.random.default_rng((c.seed, self.steps_done)).integers(2**62)))
        self.model.train()
        total = torch.zeros((), device=self.device)
        x, y = self.batches(self.steps_done)
        for inputs, targets in zip(x.chunk(self.passes), y.chunk(self.passes), strict=True):
            inputs, targets = self._to_device(inputs, targets)
            with self._autocast():
                loss = self.model(inputs, targets) / self.passes
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        made = Step(self.steps_done, float(total), lr, float(self.optimizer.grad_norm))
        self.seconds += time.monotonic() - start
        return made

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Predict held-out text, in windows of block_size that do not overlap."""
        start = time.monotonic()
        training = self.model.training
        self.model.eval()
        T, tokens = self.held_out.block_size, self.held_out.tokens
        windows = (len(tokens) - 1) // T
        n = min(windows, self.config.eval.windows or windows)
        chosen = [i * windows // n for i in range(n)]
        nats, count, length = 0.0, 0, 0
        for at in range(0, n, EVAL_ROWS):
            rows = [tokens[w * T : w * T + T + 1] for w in chosen[at : at + EVAL_ROWS]]
            both = torch.from_numpy(np.stack(rows).astype(np.int64))
            x, y = self._to_device(both[:, :-1], both[:, 1:])
            with self._autocast():
                nats += float(self.model(x, y)) * y.numel()
            count += y.numel()
            length += int(self._bytes[both[:, 1:]].sum())
        self.model.train(training)
        self.seconds += time.monotonic() - start
        loss = nats / count
        bits = nats / math.log(2.0) / max(1, length)
        return Evaluation(loss, math.exp(min(loss, 700.0)), bits)

    def fit(
        self,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[Step], None] = lambda made: None,
        on_eval: Callable[[int, Evaluation], None] = lambda step, result: None,
        save: Callable[[], object] = lambda: None,
    ) -> None:
        """Train until the run is done, or stop() is true after a step.

        Args:
            stop: asked after every step.
            on_step, on_eval: told of every step and evaluation.
            save: called every checkpoint.every steps and at the end, also that by stop().
        """
        c = self.config
        saved = self.steps_done  # a run starts from its checkpoint
        while not self.done:
            on_step(self.step())
            if self.done or stop():
                break
            n = self.steps_done
            if c.eval.every and n % c.eval.every == 0:
                on_eval(n, self.evaluate())
            if c.checkpoint.every and n % c.checkpoint.every == 0:
                save()
                saved = n
        if self.done:
            on_eval(self.steps_done, self.evaluate())
        if saved != self.steps_done:
            save()

    def save(self, saver: Checkpointer, extra: dict[str, Any]) -> None:
        """Write a checkpoint from which `restore` goes on; extra is JSON kept with it."""
        state = {"seconds": self.seconds, **extra}
        saver.save(self.steps_done, self.model, self.tokenizer, self.optimizer, state)

    def restore(self, saver: Checkpointer, folder: Path) -> dict[str, Any]:
        """Take up weights, moments and step from a checkpoint; return its train.json."""
        state = saver.load(folder, self.model, self.optimizer)
        step, seconds = state.get("step"), state.get("seconds")
        if not isinstance(step, int) or not isinstance(seconds, int | float):
            raise ValueError(f"checkpoint: {folder}/train.json must tell step and seconds")
        self.steps_done, self.seconds = step, float(seconds)
        return state

    def _to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":
            x, y = x.contiguous().pin_memory(), y.contiguous().pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)
