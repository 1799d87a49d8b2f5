"""The torch.library namespace `fastgpt`: every op has one implementation for all devices.

An implementation chooses kernel or plain PyTorch by `backend.runs_kernel`. Registering one under
"CUDA" and another under "CPU" would not do: under the sanitizer the dispatcher sees CPU tensors.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

_lib = torch.library.Library("fastgpt", "DEF")
Fn = TypeVar("Fn", bound=Callable[..., Any])


def define(schema: str) -> None:
    """Declare an op: "name(Tensor x, ...) -> Tensor"."""
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def impl(name: str) -> Callable[[Fn], Fn]:
    """Implement a declared op, for every device, below autograd."""

    def register(fn: Fn) -> Fn:
        _lib.impl(name, fn, "CompositeExplicitAutograd")
        return fn

    return register


def flops(name: str) -> Callable[[Fn], Fn]:
    """Tell torch's FlopCounterMode what a declared op costs, as a function of its shapes."""
    return register_flop_formula(getattr(torch.ops.fastgpt, name))
