"""What a GPT looks at, and why it says what it says, under the fused kernels as without them.

Names are found when they are first used, so that `fastgpt explain --help` does without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.interpret.attribution import Attribution, token_attribution
    from fastgpt.interpret.capture import Attention, Captured, capture_attention
    from fastgpt.interpret.explanation import Explanation, explain_text
    from fastgpt.interpret.heads import DirectLogits, direct_logits, head_ablation
    from fastgpt.interpret.lens import logit_lens
    from fastgpt.interpret.rollout import attention_rollout

__all__ = [
    "Attention",
    "Attribution",
    "Captured",
    "DirectLogits",
    "Explanation",
    "attention_rollout",
    "capture_attention",
    "direct_logits",
    "explain_text",
    "head_ablation",
    "logit_lens",
    "token_attribution",
]
_HOMES = {
    "Attention": "capture", "Attribution": "attribution", "Captured": "capture",
    "DirectLogits": "heads", "Explanation": "explanation", "attention_rollout": "rollout",
    "capture_attention": "capture", "direct_logits": "heads", "explain_text": "explanation",
    "head_ablation": "heads", "logit_lens": "lens", "token_attribution": "attribution",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgpt.interpret' has no attribute {name!r}")
    found = getattr(import_module(f"fastgpt.interpret.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
