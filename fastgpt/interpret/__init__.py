"""What a GPT looks at, and why it says what it says, under the fused kernels as without them."""

from fastgpt.interpret.capture import Attention, Captured, capture_attention

__all__ = ["Attention", "Captured", "capture_attention"]
