"""Whether the kernel of an op runs for arguments that torch's function takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import backend

TORCHS = "what torch's own function makes of these"  # the reason where torch is to refuse
_disabled = torch._C._disabled_torch_function_impl


def _foreign(t: Tensor) -> str | None:
    """What makes a tensor none for a kernel, whatever the op."""
    if t.layout != torch.strided or t.is_nested:
        return "the kernel takes no sparse or nested tensor"
    if torch.compiler.is_compiling():
        return None
    if type(t) is not Tensor and type(t).__torch_function__ is not _disabled:
        return f"{type(t).__name__} overrides torch's functions"
    return None


def obstacle(
    tensors: Sequence[Tensor | None], rule: Callable[..., str | None], *rest: Any
) -> str | None:
    """What keeps a kernel from these, of which the first must be given; rule(*tensors, *rest) says
    what is the op's own."""
    x = tensors[0]
    if not isinstance(x, Tensor) or not all(t is None or isinstance(t, Tensor) for t in tensors):
        return TORCHS
    for t in tensors:
        if t is not None and (why := TORCHS if t.device != x.device else _foreign(t)):
            return why
    return rule(*tensors, *rest)


def chosen(
    op: str, tensors: Sequence[Tensor | None], rule: Callable[..., str | None], *rest: Any
) -> bool:
    """Whether the kernel of op runs; the rule is not asked where no kernel could."""
    x = tensors[0]
    if not isinstance(x, Tensor):
        return False
    why = obstacle(tensors, rule, *rest) if backend.runs_kernel(x) else None
    return backend.kernel_chosen(op, x, why)
