"""Hugging Face's transformers on fastgpt: `register()` once, then attn_implementation="fastgpt".

    fastgpt.huggingface.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastgpt")

transformers is imported by `register`, not before.
"""

__all__ = ["register"]


def register() -> None:
    """Make attn_implementation="fastgpt" known to transformers; a second call changes nothing.

    Afterwards from_pretrained(..., attn_implementation="fastgpt"), from_config of the same and
    model.set_attn_implementation("fastgpt") run a model's attention on `fastgpt.ops.attention`.

    Raises:
        ImportError: transformers is not installed, or is not a version that this was written for.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface

        from fastgpt.huggingface.attention import attention
        from fastgpt.huggingface.mask import attention_mask
    except ImportError as error:
        raise ImportError(
            f"huggingface.register: transformers must be 5.17 or newer, below 6; {error}"
        ) from None
    AttentionInterface.register("fastgpt", attention)
    AttentionMaskInterface.register("fastgpt", attention_mask)
