"""A training run in its folder: data and tokenizer, log, progress bar, checkpoints, resume.

out/run.yaml       the configuration, as `fastgpt train --config` reads it
out/data/          the token shards, unless data.files names a folder of them
out/log.jsonl      a line of JSON every log.every steps, and for every evaluation and sample
out/step-.../      checkpoints, see checkpoint/
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastgpt import lora
from fastgpt.data import Corpus, Part, split
from fastgpt.data import prepare as prepare_corpus
from fastgpt.model import GPT
from fastgpt.parallel import Layout
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint
from fastgpt.train.checkpoint import Checkpointer
from fastgpt.train.config import TrainConfig, check_same_run, flat, to_yaml
from fastgpt.train.device import pick_device
from fastgpt.train.given import given_model, given_tokenizer
from fastgpt.train.log import Log, require
from fastgpt.train.loop import Step, Trainer

DATA = "data"
REFUSALS = (ValueError, TypeError, OSError, ImportError)
T = TypeVar("T")


def train(config: TrainConfig) -> Trainer:
    """Train a model, or go on with a run that was stopped, as config.resume says.

    Under torchrun every rank calls this. SIGINT (Ctrl-C) and SIGTERM, to any rank, end the run
    after the step under way, with a checkpoint.

    Args:
        config: of the run. A resumed run must keep the fields that make its numbers.

    Returns:
        The trainer; its `done` tells whether the run came to its end.

    Raises:
        ValueError: the data, the tokenizer, the folder or the configuration cannot be used, or
            the ranks disagree; on all ranks, with the same message.
        OSError: a file cannot be read or written, or another rank has gone.
        FloatingPointError: see `Trainer.fit`.
    """
    out = Path(config.out)
    layout = Layout.start(config.parallel, pick_device(config.device))
    try:
        layout.agree("train", flat(config))
        ranks = _Ranks(layout)
        ranks.first(lambda: require(config.log))
        saver = None
        if ranks.first(lambda: _goes_on(config, out)):
            trainer, saver = _resume(config, out, layout, ranks)
        else:
            trainer = _begin(config, out, layout, ranks)
        run(trainer, out, saver=saver)
        return trainer
    except (RuntimeError, OSError) as error:
        if layout.world > 1 and _is_a_lost_rank(error):
            raise ConnectionError(
                f"train: another rank has gone, so rank {layout.rank} ends;"
                " --resume auto goes on from the last checkpoint"
            ) from None
        raise
    finally:
        layout.stop()


def prepare(
    config: TrainConfig, documents: Sequence[str], tokenizer: Tokenizer | None = None
) -> Trainer:
    """Divide documents, train a tokenizer on the training part, make the model and its trainer.

    All of it in memory: config.data tells the share to hold out, the size of the vocabulary and
    the packing.

    Raises:
        ValueError: a part of the text is shorter than the context.
    """
    given = None if config.model.init is None else _given(config)
    training, held_out = split(documents, config.data.held_out, config.seed)
    if tokenizer is None and (file := _tokenizer_file(config)) is not None:
        tokenizer = Tokenizer.load(file)
    if tokenizer is None:
        tokenizer = Tokenizer.train(training, config.data.vocab_size)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    parts = [
        Part.of([ids + end for ids in tokenizer.encode_all(part)]) for part in (training, held_out)
    ]
    return _trainer(config, tokenizer, parts[0], parts[1], model=given)


def run(
    trainer: Trainer, out: Path, on_step: Callable[[Step], None] = lambda made: None,
    saver: Checkpointer | None = None,
) -> None:  # fmt: skip
    """Train to the end or to a signal, with a progress bar, a log and checkpoints in out.

    Args:
        saver: that which a resumed run was loaded by: it knows the damaged ones it passed over.
    """
    saver = saver or Checkpointer(out, trainer.config.checkpoint, trainer.layout)
    extra = {"config": flat(trainer.config)}

    def save(held_out_loss: float | None) -> None:
        trainer.save(saver, extra, held_out_loss)

    try:
        with interrupts() as stop:
            if trainer.layout.is_main:
                with Log(out, trainer) as log:

                    def step(made: Step) -> None:
                        log.step(made)
                        on_step(made)

                    trainer.fit(stop, step, log.evaluation, save, log.sample)
            else:
                trainer.fit(stop, on_step, save=save)
    except BaseException:
        with suppress(OSError):  # what ended the run is said, not what that did to a save
            saver.wait()
        raise
    saver.wait()


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


def _goes_on(config: TrainConfig, out: Path) -> bool:
    """Whether there is a run to go on with."""
    begun = bool(checkpoint.checkpoints(out))
    if begun and config.resume == "never":
        raise ValueError(f"train: out must not hold a run, except to resume it; got {out}")
    return config.resume == "must" or begun


def _begin(config: TrainConfig, out: Path, layout: Layout, ranks: "_Ranks") -> Trainer:
    absent = next((p for p in (*reversed(out.parents), out) if not p.exists()), None)
    try:
        given = None if config.model.init is None else ranks.all(lambda: _given(config))
        folder: Path = ranks.first(lambda: _prepared(config, out))
        corpus = ranks.all(lambda: Corpus.open(folder))
        trainer = _trainer(config, corpus.tokenizer, corpus.train, corpus.held_out, layout, given)
    except REFUSALS as error:
        # Shards that are good are kept where the disk was full; of what is refused nothing is.
        keep = isinstance(error, OSError) and (out / DATA).exists()
        if absent is not None and layout.is_main and not keep:
            shutil.rmtree(absent, ignore_errors=True)
        raise
    ranks.first(lambda: (out / "run.yaml").write_text(to_yaml(config), encoding="utf-8"))
    return trainer


def _prepared(config: TrainConfig, out: Path) -> Path:
    open_folder(out)
    file = _tokenizer_file(config)
    data = replace(config.data, tokenizer=None if file is None else str(file))
    return prepare_corpus(data, out / DATA, config.seed).folder


def _tokenizer_file(config: TrainConfig) -> str | Path | None:
    """The tokenizer.json that is asked for, by itself or with weights."""
    if config.data.tokenizer is not None or config.model.init is None:
        return config.data.tokenizer
    return given_tokenizer(config.model.init)


def _given(config: TrainConfig) -> GPT:
    """The weights of config.model.init."""
    c = config.model
    return given_model(str(c.init), dropout=c.dropout, block_size=c.block_size)


def _resume(
    config: TrainConfig, out: Path, layout: Layout, ranks: "_Ranks"
) -> tuple[Trainer, Checkpointer]:
    saver = Checkpointer(out, config.checkpoint, layout)
    folder = saver.latest() or checkpoint.find(out)

    def read() -> tuple[Tokenizer, Corpus]:
        before = checkpoint.read_json(folder / "train.json").get("config")
        if not isinstance(before, dict):
            raise ValueError(f"checkpoint: {folder}/train.json must hold the run's config")
        check_same_run(before, config)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        # A run that was given a corpus has made none of its own.
        given = [] if (out / DATA).is_dir() else list(map(Path, config.data.files))
        return tokenizer, Corpus.open((given or [out / DATA])[0], tokenizer)

    tokenizer, corpus = ranks.all(read)
    model = None if config.model.init is None else GPT(checkpoint.model_config(folder))
    trainer = _trainer(config, tokenizer, corpus.train, corpus.held_out, layout, model)
    trainer.restore(saver, folder)
    return trainer, saver


def _trainer(
    config: TrainConfig, tokenizer: Tokenizer, train: Part, held_out: Part,
    layout: Layout | None = None, model: GPT | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of a model, which is drawn if none is given."""
    shape = config.model.shape(tokenizer.vocab_size) if model is None else model.config
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"model: its vocab_size {shape.vocab_size} must have room for the tokenizer's ids;"
            f" got {tokenizer.vocab_size}"
        )
    for name, part in (("training", train), ("held-out", held_out)):
        if config.data.packing == "concat" and len(part) <= shape.block_size:
            raise ValueError(
                f"text: its {name} part must be longer than the context, block_size"
                f" {shape.block_size} tokens; got {len(part)} tokens"
            )
    torch.manual_seed(config.seed)
    model = GPT(shape) if model is None else model
    if config.lora.rank:
        lora.add(model, config.lora)
    return Trainer(config, model, tokenizer, train, held_out, layout)


class _Ranks:
    """Work that ends on all ranks alike: what one refuses, all refuse."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # Rank 0 may take long over the data. gloo tells at once if it dies.
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(days=7)) if layout.world > 1 else None
        )

    def all(self, work: Callable[[], T]) -> T:
        """What work gives on this rank, once it is done on all of them."""
        if self._group is None:
            return work()
        refusal: Exception | None = None
        try:
            value = work()
        except REFUSALS as error:
            refusal = error
        said: list[Any] = [None] * self._layout.world
        dist.all_gather_object(said, refusal and str(refusal), group=self._group)
        if refusal is not None:
            raise refusal
        for rank, text in enumerate(said):
            if text is not None:
                raise ValueError(text if rank == 0 else f"rank {rank}: {text}")
        return value

    def first(self, work: Callable[[], T]) -> T:
        """What work gives on rank 0, on all of them."""
        box: list[Any] = [self.all(lambda: work() if self._layout.is_main else None)]
        if self._group is not None:
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        value: T = box[0]
        return value


def _is_a_lost_rank(error: Exception) -> bool:
    """torch has no one class for it: gloo's errors are RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


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
