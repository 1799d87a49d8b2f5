"""Hugging Face's transformers on fastgpt, and fastgpt's GPT in transformers.

    fastgpt.huggingface.register()  # once
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastgpt")
    model = FastGPTForCausalLM.from_gpt(gpt)  # generate, Trainer, pipeline, save_pretrained

transformers is imported when it is needed, not before.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.huggingface.model import FastGPTConfig, FastGPTForCausalLM

__all__ = ["FastGPTConfig", "FastGPTForCausalLM", "register"]


def register() -> None:
    """Make fastgpt known to transformers; a second call changes nothing.

    Afterwards from_pretrained(..., attn_implementation="fastgpt"), from_config of the same and
    model.set_attn_implementation("fastgpt") run a model's attention on `fastgpt.ops.attention`, and
    AutoConfig and AutoModelForCausalLM know FastGPTConfig and FastGPTForCausalLM.

    Raises:
        ImportError: transformers is not installed, or is not a version that this was written for.
    """
    try:
        from transformers import (
            AttentionInterface,
            AttentionMaskInterface,
            AutoConfig,
            AutoModelForCausalLM,
        )

        from fastgpt.huggingface.attention import attention
        from fastgpt.huggingface.mask import attention_mask
        from fastgpt.huggingface.model import FastGPTConfig, FastGPTForCausalLM
    except ImportError as error:
        raise ImportError(
            f"huggingface.register: transformers must be 5.17 or newer, below 6; {error}"
        ) from None
    AttentionInterface.register("fastgpt", attention)
    AttentionMaskInterface.register("fastgpt", attention_mask)
    AutoConfig.register("fastgpt", FastGPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(FastGPTConfig, FastGPTForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    """The two classes, which need transformers to be there; they come registered."""
    if name not in ("FastGPTConfig", "FastGPTForCausalLM"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    from fastgpt.huggingface import model

    return getattr(model, name)
