"""What a training run is told: frozen dataclasses, whose fields are the command's options.

A group is a field of TrainConfig: `--optim.lr 1e-3` is `optim: {lr: 1e-3}` in YAML.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastgpt.data import DataConfig
from fastgpt.lora import LoraConfig
from fastgpt.model import GPTConfig
from fastgpt.parallel import ParallelConfig
from fastgpt.train.checkpoint import CheckpointConfig
from fastgpt.train.device import PRECISIONS
from fastgpt.train.evaluation import EvalConfig
from fastgpt.train.log import LogConfig
from fastgpt.train.optimizer import OptimConfig
from fastgpt.train.schedule import ScheduleConfig

RESUME = ("never", "auto", "must")

# Fields, or whole groups, that may differ between the parts of a resumed run.
FREE = (
    "out", "device", "max_seconds", "max_skipped", "compile", "resume", "data.files",
    "data.tokenizer", "eval", "checkpoint", "log", "parallel",
)  # fmt: skip


def _at_least(low: float, group: str, config: Any, *names: str) -> None:
    for name in names:
        if not (value := getattr(config, name)) >= low:
            rule = "must not be negative" if low == 0 else f"must be at least {low}"
            raise ValueError(f"{group}: {name} {rule}; got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape, or the weights that a run begins with.

    Attributes:
        init: weights to fine-tune, which give the shape, and the tokenizer unless data has one: a
            run or a checkpoint, a folder in Hugging Face's layout, a GGUF file, or a name on the
            Hugging Face Hub. A block_size is then a shorter context than theirs.
        preset: a name that GPTConfig.preset knows; the other fields change it where they are given.
        block_size: the context, in tokens.
        n_layer: blocks.
        n_head: heads.
        n_embd: width.
        dropout: probability.
    """

    init: str | None = None
    preset: str = "tiny"
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.init is None:
            self.shape(1)
            return
        for name in ("n_layer", "n_head", "n_embd"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"model: init gives the shape, so {name} must be left out; got {value}"
                )

    def shape(self, vocab_size: int) -> GPTConfig:
        """The model's configuration, for a tokenizer of vocab_size ids."""
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout")
        given = {k: value for k in names if (value := getattr(self, k)) is not None}
        return replace(GPTConfig.preset(self.preset), vocab_size=vocab_size, **given)


@dataclass(frozen=True)
class BatchConfig:
    """How much one optimizer step reads.

    Attributes:
        tokens: of a step, over all ranks and forward passes; None is one forward pass of `rows`.
        rows: the most windows of block_size tokens in a rank's forward pass. How many passes make
            a step follows from both: as few as divide it evenly.
    """

    tokens: int | None = None
    rows: int = 16

    def __post_init__(self) -> None:
        _at_least(1, "batch", self, "rows")
        if self.tokens is not None:
            _at_least(1, "batch", self, "tokens")

    def split(self, block_size: int, ranks: int = 1) -> tuple[int, int]:
        """A step's rows over all ranks, and into how many forward passes each rank cuts its share.

        Raises:
            ValueError: the tokens of a step are no whole rows, or the rows no whole shares.
        """
        tokens = self.rows * block_size if self.tokens is None else self.tokens
        rows, rest = divmod(tokens, block_size)
        if rest or not rows:
            raise ValueError(
                f"batch: tokens must be a multiple of block_size {block_size}; got {tokens}"
            )
        own, rest = divmod(rows, ranks)
        if rest:
            raise ValueError(
                f"batch: a step's {rows} rows of {block_size} tokens must divide among {ranks}"
                " ranks; they do not"
            )
        passes = next(n for n in range(1, own + 1) if own % n == 0 and own // n <= self.rows)
        return rows, passes


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        out: the folder of the run: checkpoints, log.jsonl, the token arrays.
        seed: of the split, the weights, the order of the data and dropout.
        steps: optimizer steps.
        max_seconds: if given, stop after this time; the learning rate then falls with the steps or
            with the time, whichever is further on.
        device: "auto" (CUDA if there is one), "cpu", "cuda", ...
        precision: "float32", "bfloat16" or "float16" of matrix products (autocast; float16 with a
            scaled loss), or "auto": bfloat16 where the device has it.
        compile: torch.compile the model: at first some minutes, then faster.
        max_skipped: a step whose loss or gradient is not finite changes nothing; after so many of
            them one after the other the run stops.
        resume: "never" begins a run and refuses a folder that holds one; "must" goes on with the
            run there; "auto" goes on if there is one and begins it otherwise.
        model: its shape.
        data: what is trained on.
        batch: how much one step reads.
        optim: the optimizer.
        schedule: the learning rate over the run.
        eval: when held-out text is predicted.
        checkpoint: when the run is saved.
        log: what is written about it.
        lora: with a rank, low-rank matrices beside the blocks' frozen linear layers are trained.
        parallel: how many ranks share what, under torchrun.
    """

    out: str = "runs/train"
    seed: int = 0
    steps: int = 1000
    max_seconds: float | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    max_skipped: int = 20
    resume: str = "never"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "steps", "max_skipped")
        _at_least(0, "train", self, "seed")
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise ValueError(f"train: max_seconds must be positive; got {self.max_seconds}")
        for name, known in (("precision", PRECISIONS), ("resume", RESUME)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"train: {name} must be one of {', '.join(known)}; got {value!r}")
        if self.lora.rank and self.parallel.tp != 1:
            raise ValueError(f"train: lora needs parallel.tp 1; got {self.parallel.tp}")


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its dotted name, as JSON holds it: {"steps": 1000, "optim.lr": 1e-3, ...}."""
    found: dict[str, Any] = {}

    def walk(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(f"{prefix}{name}.", value)
            else:
                found[prefix + name] = value

    walk("", json.loads(json.dumps(asdict(config))))
    return found


def to_yaml(config: TrainConfig) -> str:
    """The configuration as `fastgpt train --config` reads it."""
    lines = []
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {k}: {_scalar(v)}" for k, v in value.items()]
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """As JSON, which is YAML but for floats like 1e-08: YAML 1.1 wants the point in 1.0e-08."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def check_same_run(before: dict[str, Any], now: TrainConfig) -> None:
    """A resumed run must keep what makes its numbers.

    Args:
        before: `flat` of the run's configuration when it was saved.

    Raises:
        ValueError: a field that is not FREE differs.
    """
    for name, value in flat(now).items():
        if name in FREE or name.split(".")[0] in FREE:
            continue
        if name == "batch.rows" and now.batch.tokens is not None:
            continue  # then it is of no matter to what a step reads
        if before.get(name) != value:
            raise ValueError(
                f"train: a resumed run must keep its {name}, {before.get(name)}; got {value}"
            )
