"""fastgpt: fused Triton kernels that GPT models train and generate with."""

from fastgpt import functional, huggingface, ops, optim
from fastgpt.generate import generate, stream
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops.backend import explain, use
from fastgpt.patching import patch
from fastgpt.tune import tune
from fastgpt.warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "explain",
    "functional",
    "generate",
    "huggingface",
    "ops",
    "optim",
    "patch",
    "stream",
    "tune",
    "use",
    "warmup",
]
