"""Checkpoints of a run, by all its ranks together, written while training goes on."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from fastgpt import lora
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.checkpoint import folder as folders
from fastgpt.train.checkpoint.folder import (
    CONFIG,
    FORMAT,
    MODEL,
    OPTIMIZER,
    TOKENIZER,
    TRAIN,
    VERSION,
    one_line,
)  # fmt: skip
from fastgpt.train.checkpoint.read import model_config, read_json, reading

T = TypeVar("T")
logger = logging.getLogger("fastgpt")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are made and which are kept.

    Attributes:
        every: steps between checkpoints; 0 for one at the end only.
        keep: how many of the newest are kept. From the second on they are there for the case
            that the first is damaged.
        best: keep also the one with the lowest held-out loss.
        asynchronous: write while training goes on, from a copy in the CPU's memory.
    """

    every: int = 500
    keep: int = 2
    best: bool = False
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint: every must not be negative; got {self.every}")
        if self.keep < 1:
            raise ValueError(f"checkpoint: keep must be at least 1; got {self.keep}")


class Ranks(Protocol):
    """Who takes part: this process's number and how many there are."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...


class Checkpointer:
    """Saves and loads the state of a run. Every rank makes one, and calls the same methods.

    Args:
        out: the run's folder, on a file system that all ranks share; made if need be.
        config: when and how many.
        layout: the ranks, as torch.distributed has them; None is one process.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        config: CheckpointConfig = CheckpointConfig(),
        layout: Ranks | None = None,
    ) -> None:
        self.out, self.config = Path(out), config
        self.rank, self.world = (0, 1) if layout is None else (layout.rank, layout.world)
        # Of its own: training's collectives go on beside those of a save.
        self._group = dist.new_group(backend="gloo") if self.world > 1 else None
        self._buffers: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._good: set[Path] = set()
        self._bad: set[Path] = set()

    def save(
        self,
        step: int,
        model: nn.Module,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer | None = None,
        state: dict[str, Any] | None = None,
        held_out_loss: float | None = None,
    ) -> None:
        """Make a checkpoint of now. What is asynchronous is complete after `wait`.

        Args:
            step: names the checkpoint.
            model: a GPT, also within DistributedDataParallel or torch.compile, its parameters
                tensors that all ranks have, or DTensors.
            tokenizer: of the model.
            optimizer: of the model's parameters.
            state: JSON that is kept with it.
            held_out_loss: by which the best is known.

        Raises:
            OSError: this save, or the one before if asynchronous, has failed: the disk is full,
                the folder cannot be written. No part of a checkpoint is left, older ones are.
        """
        from fastgpt.train.checkpoint import tensors

        self.wait()
        about = {"step": step, "held_out_loss": held_out_loss}
        config = asdict(tensors.bare(model).config)  # type: ignore[call-overload]
        shape = {"format": FORMAT, "version": VERSION, "model": config}
        if adapted := lora.describe(tensors.bare(model)):
            shape["lora"] = adapted
        texts = {
            CONFIG: folders.dump(shape),
            TRAIN: folders.dump({**(state or {}), **about}),
        }
        parts = {MODEL: tensors.model_tensors(model)}
        if optimizer is not None:
            parts[OPTIMIZER] = tensors.optimizer_tensors(model, optimizer)
        if not self.config.asynchronous:
            self._write(step, parts, texts, tokenizer)
            return
        if self._buffers is None:
            from torch.distributed.checkpoint.staging import BlockingAsyncStager

            # Pinned memory is kept from save to save.
            self._buffers = BlockingAsyncStager(torch.cuda.is_available())
        parts = self._buffers.stage(parts)
        self._thread = threading.Thread(
            target=self._in_background, args=(step, parts, texts, tokenizer), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            OSError: an asynchronous save has failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Path | None:
        """The newest checkpoint that is as it was written; None if the run has none.

        Damaged ones are passed over, which rank 0 says, and are removed by the next save.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        self.wait()
        found = self._on_first(lambda: folders.checkpoints(self.out))
        for candidate in found:
            if (wrong := self._verify(candidate)) is None:
                return candidate
            self._bad.add(candidate)
            if self.rank == 0:
                logger.warning("checkpoint: %s is damaged and passed over; %s", candidate, wrong)
        if found:
            raise ValueError(f"checkpoint: {self.out} must hold a whole one; all are damaged")
        return None

    def load(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> dict[str, Any]:
        """Fill a model, and its new optimizer, from a checkpoint of any number of ranks.

        Returns:
            What `save` was given as state, with "step" and "held_out_loss".

        Raises:
            ValueError: it is no checkpoint, or damaged, or of another model.
        """
        from fastgpt.train.checkpoint import tensors

        folder = Path(folder)
        if folder not in self._good and (wrong := self._verify(folder)):
            raise ValueError(f"checkpoint: {folder} is damaged; {wrong}")
        config, here = model_config(folder), tensors.bare(model).config
        if config != here:
            raise ValueError(f"checkpoint: the model must have the run's shape; got {config}")
        with reading(folder):
            weights = tensors.model_tensors(model)
            saved = self._on_first(lambda: tensors.index(folder / MODEL))
            tensors.same(weights, saved)
            tensors.read(weights, folder / MODEL, saved, self._group)
            tensors.set_model(model, weights)
            if optimizer is not None:
                saved = self._on_first(lambda: self._optimizer_index(folder))
                places = tensors.optimizer_places(model, optimizer, saved)
                tensors.read(places, folder / OPTIMIZER, saved, self._group)
                tensors.set_optimizer(model, optimizer, places)
        return read_json(folder / TRAIN)

    def _optimizer_index(self, folder: Path) -> Any:
        from fastgpt.train.checkpoint import tensors

        if not (folder / OPTIMIZER).is_dir():
            raise ValueError("it has no optimizer's state")
        return tensors.index(folder / OPTIMIZER)

    def _in_background(self, *save: Any) -> None:
        try:
            self._write(*save)
        except BaseException as error:
            self._error = error

    def _write(
        self,
        step: int,
        parts: dict[str, dict[str, torch.Tensor]],
        texts: dict[str, str],
        tokenizer: Tokenizer,
    ) -> None:
        from fastgpt.train.checkpoint import tensors

        part: Path | None = None
        try:
            part = self.out / self._on_first(lambda: folders.begin(self.out, step).name)
            for name, those in parts.items():
                tensors.write(those, part / name, self._group, self.world)
            sums = self._on_all(lambda: self._sums(part))
            final = self._on_first(lambda: self._finish(part, texts, tokenizer, sums).name)
        except Exception as error:
            what = f"checkpoint: step {step} is not saved; "
            if _is_a_lost_rank(error):
                raise ConnectionError(what + "another rank has gone") from None
            raise OSError(what + one_line(error)) from None
        finally:
            if part is not None and self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)  # gone if all went well
        self._good.add(self.out / final)
        self._bad.clear()

    def _sums(self, part: Path) -> dict[str, str]:
        """Of the files that this rank has written."""
        own = part.glob(f"*/shard-{self.rank + 1:05d}-*")
        return {file.relative_to(part).as_posix(): folders.sha256(file) for file in own}

    def _finish(
        self,
        part: Path,
        texts: dict[str, str],
        tokenizer: Tokenizer,
        sums: list[dict[str, str]],
    ) -> Path:
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        tokenizer.save(part / TOKENIZER)
        all_sums = {name: folders.sha256(part / name) for name in (*texts, TOKENIZER)}
        for of_rank in sums:
            if lost := [name for name in of_rank if not (part / name).is_file()]:
                raise OSError(f"{self.out} must be shared by all ranks; {lost[0]} is not there")
            all_sums |= of_rank
        folders.write_sums(part, all_sums)
        final = folders.commit(part)
        folders.prune(final, self.config.keep, self.config.best, self._bad)
        return final

    def _verify(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, each rank having read its share of it."""
        said = self._on_all(lambda: folders.verify(folder, self.rank, self.world))
        wrong = next((text for text in said if text), None)
        if wrong is None:
            self._good.add(folder)
        return wrong

    def _each(self, work: Callable[[], T]) -> T:
        """What work gives on this rank, once it is done on all of them.

        Raises:
            OSError: some rank could not; which and why.
        """
        reason = value = None
        try:
            value = work()
        except Exception as error:
            reason = one_line(error)
        for rank, why in enumerate(self._gather(reason)):
            if why is not None:
                raise OSError(why if self.world == 1 else f"rank {rank}: {why}")
        return cast(T, value)

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """What work gives on each rank."""
        return self._gather(self._each(work))

    def _on_first(self, work: Callable[[], T]) -> T:
        """What work gives on rank 0, on all ranks."""
        return cast(T, self._on_all(lambda: work() if self.rank == 0 else None)[0])

    def _gather(self, value: T) -> list[T]:
        every = [value] * self.world
        if self._group is not None:
            dist.all_gather_object(every, value, group=self._group)
        return every


def _is_a_lost_rank(error: Exception) -> bool:
    """torch has no one class for it: gloo's errors are RuntimeErrors that name its source."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
