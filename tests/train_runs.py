"""Small runs for the tests of training."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgpt.data import DataConfig
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
)
from fastgpt.train.run import prepare

TEXT = "\n\n".join(
    f"In year {n} the {'quick' if n % 3 else 'slow'} fox met {n * n} dogs; 白日依山尽 {n}."
    for n in range(300)
)
CONFIG = TrainConfig(
    steps=12,
    device="cpu",
    model=ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2),
    data=DataConfig(vocab_size=300),
    batch=BatchConfig(rows=4),
    optim=OptimConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup=3),
    eval=EvalConfig(every=5),
    checkpoint=CheckpointConfig(every=4),
    log=LogConfig(every=1),
)


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A configuration with other values, by dotted names."""
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        if group:
            name, value = group, replace(getattr(config, group), **{field: value})
        config = replace(config, **{name: value})
    return config


def trainer(
    changes: dict[str, Any] | None = None, documents: Sequence[str] = (TEXT,), **top: Any
) -> Trainer:
    return prepare(changed(CONFIG, {**(changes or {}), **top}), documents)


def log(out: str | Path) -> list[dict[str, Any]]:
    """The numbers of log.jsonl, without those of the clock."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    keep = ("step", "loss", "lr", "grad_norm", "skipped", "held_out_loss", "sample")
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]
