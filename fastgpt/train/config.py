"""What a training run is told: one frozen dataclass, whose fields are the command's options."""

from dataclasses import dataclass, replace

from fastgpt.model import GPTConfig

PRECISIONS = ("auto", "float32", "bfloat16")

# Fields that may differ between the two halves of a resumed run.
FREE = (
    "data",
    "out",
    "tokenizer",
    "device",
    "max_seconds",
    "log_every",
    "eval_every",
    "save_every",
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: UTF-8 text files to train on.
        out: the folder of the run: checkpoints, log.jsonl, the token arrays.
        tokenizer: a tokenizer.json to use; None trains one on the training part.
        vocab_size: ids of a tokenizer that is trained.
        held_out: share of the text that is held out to evaluate on.
        preset: the model's shape; the fields down to n_embd change it where they are given.
        block_size: the context, in tokens.
        n_layer: blocks.
        n_head: heads.
        n_embd: width.
        dropout: probability.
        steps: optimizer steps.
        batch_size: windows of block_size tokens in one forward pass.
        accumulate: forward passes to one optimizer step.
        lr: the highest learning rate.
        min_lr: the learning rate at the end, as a share of lr.
        warmup: steps over which the learning rate rises from 0.
        weight_decay: of matrices and embeddings.
        beta1: AdamW's.
        beta2: AdamW's.
        clip: the largest norm of all gradients together; 0 for no bound.
        seed: of the split, the weights, the order of the data and dropout.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device has it.
        device: "auto" (CUDA if there is one), "cpu", "cuda", ...
        max_seconds: if given, stop after this time; the learning rate then falls with the steps or
            with the time, whichever is further on.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations; 0 for one at the end only.
        eval_windows: the most windows of held-out text that are evaluated, from all over it; 0 for
            all.
        save_every: steps between checkpoints; 0 for one at the end only.
    """

    data: tuple[str, ...] = ()
    out: str = "runs/train"
    tokenizer: str | None = None
    vocab_size: int = 2048
    held_out: float = 0.1
    preset: str = "tiny"
    block_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float = 0.0
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    max_seconds: float | None = None
    log_every: int = 10
    eval_every: int = 200
    eval_windows: int = 512
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"train: {name} must be at least 1; got {value}")
        for name in (
            "warmup", "seed", "eval_every", "eval_windows", "save_every",
            "weight_decay", "clip",
        ):  # fmt: skip
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"train: {name} must not be negative; got {value}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"train: {name} must lie in [0, 1); got {value}")
        if not self.lr > 0.0:
            raise ValueError(f"train: lr must be positive; got {self.lr}")
        if not 0.0 <= self.min_lr <= 1.0:
            raise ValueError(f"train: min_lr is a share of lr, in [0, 1]; got {self.min_lr}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"train: held_out must lie in (0, 1); got {self.held_out}")
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise ValueError(f"train: max_seconds must be positive; got {self.max_seconds}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"train: precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}"
            )
        self.model(1)

    def model(self, vocab_size: int) -> GPTConfig:
        """The model's shape, for a tokenizer of vocab_size ids."""
        shape = {
            name: value
            for name in ("block_size", "n_layer", "n_head", "n_embd")
            if (value := getattr(self, name)) is not None
        }
        return replace(
            GPTConfig.preset(self.preset), vocab_size=vocab_size, dropout=self.dropout, **shape
        )
