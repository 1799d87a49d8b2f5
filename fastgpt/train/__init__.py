"""Training a GPT: configuration, loop, checkpoints."""

from fastgpt.train.captured import CapturedStep
from fastgpt.train.checkpoint import load
from fastgpt.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastgpt.train.loop import Evaluation, Trainer
from fastgpt.train.run import train

__all__ = [
    "BatchConfig",
    "CapturedStep",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "Evaluation",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "load",
    "train",
]
