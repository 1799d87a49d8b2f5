"""fastgpt: fused Triton kernels that GPT models train and generate with."""

from fastgpt import ops
from fastgpt.ops.backend import explain, use

__version__ = "0.1.0"
__all__ = ["explain", "ops", "use"]
