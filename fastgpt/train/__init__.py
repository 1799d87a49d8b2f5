"""Training a GPT: configuration, loop, checkpoints."""

from fastgpt.train.captured import CapturedStep
from fastgpt.train.checkpoint import load
from fastgpt.train.config import TrainConfig
from fastgpt.train.loop import Evaluation, Trainer
from fastgpt.train.run import train

__all__ = ["CapturedStep", "Evaluation", "TrainConfig", "Trainer", "load", "train"]
