"""transformers' models: attn_implementation="fastgpt", and causal losses without logits."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from fastgpt import huggingface, ops
from fastgpt.patching.feed_forward import linear
from fastgpt.patching.swap import Patched, Swap, fusable, kind, obstacle, own_forward
from fastgpt.patching.trace import parameters_of

# Whose forward is: the base model, slice_logits_to_keep, lm_head, loss_function, and no more. That
# of many others is the same to the letter, for transformers copies it.
MODELS = ("GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class HeadHow:
    """Names of forward's arguments in their order, and the type of lm_head."""

    takes: tuple[str, ...]
    types: tuple[type[nn.Module], ...]


class PatchedCausalLM(Patched):
    """In training mode and given labels: loss, and None for logits. Else the model's own forward.

    The model's own too where it is asked for a tuple, for some of the logits alone, or for a loss
    that is not transformers' own.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        how: HeadHow = self._fastgpt_how
        given = {**dict(zip(how.takes, args, strict=False)), **kwargs}
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        model: Any = self
        if (
            labels is None
            or not self.training
            or not isinstance(keep, int)
            or keep != 0
            or given.get("return_dict", model.config.return_dict) is False
            or model.loss_function is not _own_loss()
            or not fusable((model.lm_head,), how.types)
            or model.lm_head.weight.shape[0] != model.config.vocab_size
        ):
            return self.original(*args, **kwargs)
        for name in ("labels", "logits_to_keep", "return_dict"):
            given.pop(name, None)
        outputs = model.base_model(**given)
        ignore, count = given.get("ignore_index", -100), given.get("num_items_in_batch")
        targets = given.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        hidden = outputs.last_hidden_state
        head = model.lm_head
        loss = ops.linear_cross_entropy(
            hidden, head.weight, targets.to(hidden.device), bias=head.bias, ignore_index=ignore,
            reduction="mean" if count is None else "sum",
        )  # fmt: skip
        if count is not None:
            loss = loss / (count.to(loss.device) if hasattr(count, "to") else count)
        return _output(outputs, loss)


def _own_loss() -> Any:
    return sys.modules["transformers.loss.loss_utils"].ForCausalLMLoss


def _output(outputs: Any, loss: Any) -> Any:
    kinds = sys.modules["transformers.modeling_outputs"]
    fields = {"past_key_values", "hidden_states", "attentions", "cross_attentions"}
    crossed = hasattr(outputs, "cross_attentions")
    made = kinds.CausalLMOutputWithCrossAttentions if crossed else kinds.CausalLMOutputWithPast
    return made(loss=loss, **{name: getattr(outputs, name) for name in fields & set(dir(outputs))})


def _same(f: Any, g: Any) -> bool:
    """Whether two functions are one program, their docstrings aside."""
    if not (hasattr(f, "__code__") and hasattr(g, "__code__")):
        return False
    a, b = f.__code__, g.__code__
    consts = [[c for c in code.co_consts if not isinstance(c, str)] for code in (a, b)]
    return a.co_code == b.co_code and consts[0] == consts[1] and _names(a) == _names(b)


def _names(code: Any) -> list[str]:
    """All that it names; the base model is known by another way than its attribute."""
    names = [*code.co_names, *code.co_varnames]
    return ["base" if name in ("model", "transformer", "gpt_neox") else name for name in names]


def recognise_loss_head(module: nn.Module) -> Swap | str | None:
    """A swap if module's forward is that of one of MODELS; why not if it only looks like one; else
    None."""
    head = module._modules.get("lm_head")
    if head is None or not pretrained(module):
        return None
    import transformers

    if not any(
        _same(own_forward(module), inspect.unwrap(getattr(transformers, name).forward))
        for name in MODELS
    ):
        return f"its forward is none of {', '.join(MODELS)}"
    if not linear(head) or not hasattr(head, "out_features"):
        return "its lm_head is not nn.Linear"
    takes = tuple(p.name for p in parameters_of(module) if p.kind is p.POSITIONAL_OR_KEYWORD)
    why = obstacle(*head.parameters())
    if why is not None:
        return why
    words = "linear_cross_entropy in training: outputs.logits is None"
    return Swap(PatchedCausalLM, HeadHow(takes, (kind(head),)), words)


def pretrained(module: nn.Module) -> bool:
    """Whether it is one of transformers' models; transformers is not imported to find out."""
    module_ = sys.modules.get("transformers.modeling_utils")
    return module_ is not None and isinstance(module, module_.PreTrainedModel)


def asks_interface(module: nn.Module) -> bool:
    """Whether its forward takes its attention from transformers' AttentionInterface."""
    code = getattr(own_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_obstacle(model: Any) -> str | None:
    """Why attn_implementation="fastgpt" is not for a model of transformers', or None."""
    now = model.config._attn_implementation
    if now == "fastgpt":
        return "patched already"
    if now not in ("eager", "sdpa"):
        return f"attn_implementation is {now!r}"
    if not model._supports_sdpa or not model._can_set_attn_implementation():
        return "its attention is of another kind"
    try:
        huggingface.register()
    except ImportError as error:
        return str(error)
    return None


def switch_attention(model: Any) -> Callable[[], None]:
    """Set attn_implementation="fastgpt"; returns what sets it back."""
    configs = {id(m.config): m.config for m in model.modules() if pretrained(m)}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]

    def back() -> None:
        for config, was in before:
            config._attn_implementation_internal = was

    model.set_attn_implementation("fastgpt")
    return back
