"""Training a GPT: configuration, loop, evaluation, checkpoints, logs; on one rank or many."""

from fastgpt.data import DataConfig
from fastgpt.lora import LoraConfig
from fastgpt.parallel import ParallelConfig
from fastgpt.train.captured import CapturedStep
from fastgpt.train.checkpoint import CheckpointConfig, load
from fastgpt.train.config import BatchConfig, ModelConfig, TrainConfig
from fastgpt.train.evaluation import EvalConfig, Evaluation
from fastgpt.train.log import LogConfig
from fastgpt.train.loop import Step, Trainer
from fastgpt.train.optimizer import OptimConfig
from fastgpt.train.run import train
from fastgpt.train.schedule import ScheduleConfig

__all__ = [
    "BatchConfig",
    "CapturedStep",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "Evaluation",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "Step",
    "TrainConfig",
    "Trainer",
    "load",
    "train",
]
