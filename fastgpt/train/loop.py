"""The training loop. Step n is a function of the configuration and the state after step n - 1.

The batch and the dropout masks of a step come from (seed, step) alone, so a run that is stopped
and resumed is, on as many ranks, bit for bit the run that was not. On another number of ranks it
reads the same batches, and differs by rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.data import Batch, Part, Sampler
from fastgpt.model import GPT
from fastgpt.parallel import Layout
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.checkpoint import Checkpointer
from fastgpt.train.config import TrainConfig
from fastgpt.train.device import autocast, pick_device, pick_precision
from fastgpt.train.evaluation import Evaluation, evaluate, write
from fastgpt.train.schedule import set_learning_rate


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step. To read its numbers waits for the GPU to have made it.

    Attributes:
        step: its number, from 1.
        lr: learning rate.
        values: (3,) float32 on the device: loss, gradient norm, steps skipped so far.
    """

    step: int
    lr: float
    values: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step):
            return NotImplemented
        return (self.step, self.lr, self.read()) == (other.step, other.lr, other.read())

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _numbers(self) -> tuple[float, ...]:
        return tuple(self.values.tolist())

    def read(self) -> tuple[float, ...]:
        """All three, once the GPU has made them."""
        return self._numbers

    @property
    def loss(self) -> float:
        """Mean over the tokens of all ranks, in nats."""
        return self._numbers[0]

    @property
    def grad_norm(self) -> float:
        """Of all gradients together, before they were clipped."""
        return self._numbers[1]

    @property
    def skipped(self) -> int:
        """Steps so far whose loss or gradient was not finite, and which changed nothing."""
        return int(self._numbers[2])


class Trainer:
    """A model, its optimizer, its data, and the step they have reached.

    Args:
        config: of the run.
        model: to train; moved to the run's device, and shared among the ranks.
        tokenizer: of the data.
        train, held_out: the parts of the data.
        layout: the ranks; None is this process alone.

    Attributes:
        rows, passes: of a step: windows over all ranks, and forward passes on each.
        steps_done: optimizer steps.
        seconds: spent in training and evaluation, also before a resume.

    Raises:
        ValueError: the batch does not divide among the ranks, or a part of the data is too short.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: GPT,
        tokenizer: Tokenizer,
        train: Part,
        held_out: Part,
        layout: Layout | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        if layout is None:
            layout = Layout.start(config.parallel, pick_device(config.device))
        self.layout = layout
        self.dtype = pick_precision(config.precision, layout.device)
        self.block_size = T = model.config.block_size
        self.rows, self.passes = config.batch.split(T, layout.data_world)
        packing = config.data.packing
        self.batches = Sampler(train, T, self.rows, config.seed, packing)
        self.held_out = Sampler(held_out, T, 1, config.seed, packing)
        lengths = [len(b) for b in tokenizer.token_bytes]
        lengths += [0] * (model.config.vocab_size - len(lengths))
        self._bytes = torch.tensor(lengths)

        model = model.to(layout.device)
        if config.compile:
            _compile(model, whole=layout.config.fsdp * layout.config.tp * layout.config.cp == 1)
        self.model = layout.parallelize(model, None if self.dtype == torch.float32 else self.dtype)
        self.optimizer = config.optim.build(self.model, skip_nonfinite=True)
        self.scaler = torch.amp.GradScaler(layout.device.type, enabled=self.dtype == torch.float16)
        # To agree by gloo makes no rank wait for its GPU.
        self._group = dist.new_group(backend="gloo") if layout.world > 1 else None
        self.steps_done = 0
        self.seconds = 0.0
        self._event: torch.cuda.Event | None = None  # the end of the last step
        # Steps that were not finite: in all, and one after the other up to now.
        self._skipped, self._in_a_row = torch.zeros(2, device=layout.device)

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
        """Make one optimizer step. One whose loss or gradient is not finite changes nothing."""
        start = time.monotonic()
        c, layout = self.config, self.layout
        lr = self.learning_rate()
        set_learning_rate(self.optimizer, c.schedule.factor(self.steps_done, self.progress()))
        layout.seed(int(np.random.default_rng((c.seed, self.steps_done)).integers(2**62)))
        self.model.train()
        batches = split(
            self.batches(self.steps_done, layout.data_rank, layout.data_world), self.passes
        )
        count = layout.count(*batches)
        total = torch.zeros((), device=layout.device)
        for n, batch in enumerate(batches, 1):
            batch = batch.to(layout.device)
            with layout.no_sync(self.model, n < len(batches)):
                with autocast(layout.device, self.dtype):
                    loss = layout.loss(self.model, batch, count)
                # Where the loss is not finite every gradient shall be so, on all ranks.
                one = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                self.scaler.scale(loss).backward(one)
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        norm = self.optimizer.grad_norm
        bad = (~norm.isfinite()).float()
        self._skipped = self._skipped + bad
        self._in_a_row = (self._in_a_row + 1.0) * bad
        values = torch.stack([layout.all_reduce(total, "mean"), norm, self._skipped])
        made = Step(self.steps_done, lr, values)
        self._wait(made)
        self.seconds += time.monotonic() - start
        return made

    def evaluate(self) -> Evaluation:
        """Predict held-out text, in rows that do not overlap; all ranks call this."""
        start = time.monotonic()
        result = evaluate(
            self.model, self.held_out, self._bytes, self.layout, self.dtype,
            self.config.eval.windows,
        )  # fmt: skip
        self.seconds += time.monotonic() - start
        return result

    def write(self) -> list[str]:
        """Texts as config.eval asks for; all ranks call this."""
        start = time.monotonic()
        with autocast(self.layout.device, self.dtype):
            texts = write(
                self.model, self.tokenizer, self.config.eval, self.layout.device, self.config.seed
            )
        self.seconds += time.monotonic() - start
        return texts

    def fit(
        self,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[Step], None] = lambda made: None,
        on_eval: Callable[[int, Evaluation], None] = lambda step, result: None,
        save: Callable[[float | None], object] = lambda held_out_loss: None,
        on_text: Callable[[int, str], None] = lambda step, text: None,
    ) -> None:
        """Train until the run is done, or stop() is true after a step on any rank.

        Args:
            stop: asked after every step.
            on_step, on_eval, on_text: told of every step, evaluation and text that is written.
            save: called every checkpoint.every steps and at the end, also that by stop(), with the
                held-out loss if it was measured after this very step.

        Raises:
            FloatingPointError: the losses or gradients of config.max_skipped steps one after the
                other are not finite.
        """
        c = self.config
        saved = self.steps_done  # a run starts from its checkpoint

        def look() -> float:
            result = self.evaluate()
            on_eval(self.steps_done, result)
            for text in self.write() if c.eval.samples else []:
                on_text(self.steps_done, text)
            return result.loss

        while not self.done:
            on_step(self.step())
            stopped = self._agree(stop())
            n = self.steps_done
            if n % c.log.every == 0 or self.done or stopped:
                self._check_finite()
            if self.done or stopped:
                break
            loss = look() if c.eval.every and n % c.eval.every == 0 else None
            if c.checkpoint.every and n % c.checkpoint.every == 0:
                save(loss)
                saved = n
        loss = look() if self.done else None
        if saved != self.steps_done:
            save(loss)

    def save(
        self, saver: Checkpointer, extra: dict[str, Any], held_out_loss: float | None = None
    ) -> None:
        """Write a checkpoint from which `restore` goes on; extra is JSON kept with it."""
        state = {
            "seconds": self.seconds, "skipped": int(self._skipped),
            "scaler": self.scaler.state_dict(), **extra,
        }  # fmt: skip
        saver.save(
            self.steps_done, self.model, self.tokenizer, self.optimizer, state, held_out_loss
        )

    def restore(self, saver: Checkpointer, folder: Path) -> dict[str, Any]:
        """Take up weights, moments and step from a checkpoint; return its train.json."""
        state = saver.load(folder, self.model, self.optimizer)
        step, seconds = state.get("step"), state.get("seconds")
        if not isinstance(step, int) or not isinstance(seconds, int | float):
            raise ValueError(f"checkpoint: {folder}/train.json must tell step and seconds")
        self.steps_done, self.seconds = step, float(seconds)
        self._skipped.fill_(state.get("skipped", 0))
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state

    def _wait(self, made: Step) -> None:
        """Keep the host at most a step ahead of the GPU, so that its clock tells the GPU's time.

        Where the step is logged its numbers are waited for, here and not outside of the clock.
        """
        if made.step % self.config.log.every == 0:
            made.read()
        if self.layout.device.type == "cuda":
            before, self._event = self._event, torch.cuda.Event()
            self._event.record()
            if before is not None:
                before.synchronize()

    def _agree(self, stop: bool) -> bool:
        """Whether any rank is to stop; the time of the slowest becomes that of all."""
        if self._group is None:
            return stop
        said = torch.tensor([float(stop), self.seconds], dtype=torch.float64)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
        self.seconds = float(said[1])
        return bool(said[0])

    def _check_finite(self) -> None:
        if (row := int(self._in_a_row)) >= self.config.max_skipped:
            raise FloatingPointError(
                f"train: losses and gradients must be finite; those of the last {row} steps, up to"
                f" step {self.steps_done}, are not"
            )


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into parts of equally many rows."""
    B, T = batch.idx.shape
    rows = B // parts
    made = []
    for n in range(parts):
        here = slice(n * rows, (n + 1) * rows)
        cu = batch.cu_seqlens
        if cu is not None:  # a document ends with its row
            start, stop = n * rows * T, (n + 1) * rows * T
            cu = cu[(cu >= start) & (cu <= stop)] - start
        made.append(Batch(batch.idx[here], batch.targets[here], cu, batch.max_seqlen))
    return made


def _compile(model: GPT, whole: bool) -> None:
    """In place: the state_dict's names stay. Where weights are gathered, a block at a time."""
    if whole:
        model.compile()
        return
    for block in model.h:
        block.compile()
