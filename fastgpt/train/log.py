"""What a run says of itself: log.jsonl, TensorBoard, wandb, and a bar on standard error.

A line of log.jsonl is a JSON object. Steps: step, loss (nats), lr, grad_norm, skipped (steps so
far), tokens (so far), tokens_per_second, mfu (null where the peak is unknown), peak_memory (bytes);
null too is what is not finite.
Evaluations: held_out_loss, held_out_perplexity, held_out_bits_per_byte. Samples: sample. All have
seconds, spent in the run, and time, since 1970.
"""

import importlib.util
import json
import math
import os
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.train.device import peak_flops, peak_memory

if TYPE_CHECKING:
    from fastgpt.train.evaluation import Evaluation
    from fastgpt.train.loop import Step, Trainer

FILE, WANDB = "log.jsonl", "wandb-run"


@dataclass(frozen=True)
class LogConfig:
    """What is written about the run.

    Attributes:
        every: steps between lines of the log.
        tensorboard: whether to write the same for TensorBoard, to out/tensorboard.
        wandb: a project of Weights & Biases to write the same to; None for none.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log: every must be at least 1; got {self.every}")
        if self.wandb == "":
            raise ValueError("log: wandb must be a project's name; leave it out for none")


class Log:
    """Of the rank that speaks; opened by `with`. `require` is to be asked before.

    Args:
        out: the run's folder.
        trainer: whose run it is.
    """

    def __init__(self, out: Path, trainer: "Trainer") -> None:
        self._out, self._trainer = out, trainer
        t = trainer
        device = t.layout.device
        self._tokens_a_step = t.rows * t.block_size
        self._flops_a_step = t.rows * t.model.flops(t.block_size, training=True)
        peak = peak_flops(device, t.dtype)
        self._peak = None if peak is None else peak * t.layout.world
        self._device = device

    def __enter__(self) -> "Log":
        t, config = self._trainer, self._trainer.config.log
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(  # type: ignore[no-untyped-call]
                str(self._out / "tensorboard"), purge_step=t.steps_done + 1
            )
        self._wandb = None if config.wandb is None else _wandb(config.wandb, self._out, t)
        self._forget_after(t.steps_done)
        self._file = open(self._out / FILE, "a", encoding="utf-8")
        self._bar = tqdm(
            total=1.0,  # the bar is the share of the run, by steps or by time
            initial=t.progress(),
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed}<{remaining}{postfix}",
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            file=sys.stderr,
        )
        self._since, self._at = t.seconds, t.steps_done
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()  # type: ignore[no-untyped-call]
        if self._wandb is not None:
            self._wandb.finish()

    def step(self, made: "Step") -> None:
        """Count a step, and every log.every steps write of it."""
        t = self._trainer
        if made.step % t.config.log.every == 0 or t.done:
            loss, norm = made.loss, made.grad_norm  # waits for the GPU, before the time is taken
            spent = max(1e-9, t.seconds - self._since)
            steps = made.step - self._at
            self._since, self._at = t.seconds, made.step
            rate = steps * self._tokens_a_step / spent
            mfu = None if self._peak is None else steps * self._flops_a_step / spent / self._peak
            self._write(
                {
                    "step": made.step, "loss": loss, "lr": made.lr, "grad_norm": norm,
                    "skipped": made.skipped, "tokens": made.step * self._tokens_a_step,
                    "tokens_per_second": round(rate, 1),
                    "mfu": None if mfu is None else round(mfu, 4),
                    "peak_memory": peak_memory(self._device),
                }
            )  # fmt: skip
            said = f"step {made.step}, loss {loss:.3f}, {rate:,.0f} tokens/s"
            said += "" if mfu is None else f", MFU {mfu:.1%}"
            said += f", {made.skipped} skipped" if made.skipped else ""
            self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(t.progress() - self._bar.n)

    def evaluation(self, step: int, result: "Evaluation") -> None:
        """Write of an evaluation."""
        self._since = self._trainer.seconds
        self.say(
            f"step {step}: held-out loss {result.loss:.3f}, perplexity {result.perplexity:.1f},"
            f" {result.bits_per_byte:.3f} bits/byte"
        )
        self._write({"step": step} | {f"held_out_{k}": v for k, v in asdict(result).items()})

    def sample(self, step: int, text: str) -> None:
        """Write a text that the model has made."""
        self._since = self._trainer.seconds
        seen = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
        self.say(f"step {step}: {seen}")
        self._write({"step": step, "sample": text})

    def say(self, text: str) -> None:
        """A line on standard error, above the bar."""
        self._bar.write(text, file=sys.stderr)

    def _write(self, line: dict[str, Any]) -> None:
        line = {k: None if _is_no_number(v) else v for k, v in line.items()}
        whole = line | {"seconds": round(self._trainer.seconds, 3), "time": time.time()}
        self._file.write(json.dumps(whole, ensure_ascii=False) + "\n")
        self._file.flush()
        step = line["step"]
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add_text(name, value, step)  # type: ignore[no-untyped-call]
                else:
                    self._board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that the checkpoint does not hold: they are made again."""
        path = self._out / FILE
        kept = []
        if step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)


def _is_no_number(value: Any) -> bool:
    """JSON has no nan and no infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def require(config: LogConfig) -> None:
    """See that the packages are there that the log needs.

    Raises:
        ImportError: tqdm, tensorboard or wandb is asked for and not installed.
    """
    wanted = {
        "tqdm": "'fastgpt-triton[train]'",
        "tensorboard": "'fastgpt-triton[train]'" if config.tensorboard else None,
        "wandb": "wandb" if config.wandb is not None else None,
    }
    for package, where in wanted.items():
        if where is not None and importlib.util.find_spec(package) is None:
            raise ImportError(f"train: needs the package {package}; pip install {where}")


def _wandb(project: str, out: Path, trainer: "Trainer") -> Any:
    """A run of Weights & Biases, the same one again when the run is resumed."""
    import wandb  # type: ignore[import-not-found]

    from fastgpt.train.config import flat

    path = out / WANDB
    if trainer.steps_done == 0 or not path.exists():
        path.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    try:
        return wandb.init(
            project=project, dir=str(out), id=path.read_text(encoding="utf-8").strip(),
            resume="allow", config=flat(trainer.config),
        )  # fmt: skip
    except wandb.Error as error:
        raise ValueError(f"log: wandb must be able to start; it says {error}") from None
